"""Runs the samples of every op that has kernels on a backend, forward and backward, once: what sanitizers watch.

    python tests/every_sample.py --backend cuda --dtype bfloat16 --dtype float32

Values are checked elsewhere. With ``--emulated 90,4,8192`` the emulated device has that capability, number of
processors and shared memory per block. The last line is the number of calls.
"""

from __future__ import annotations

import argparse

import on_device

on_device.install()

import torch
from harness import evaluate, on
from op_db import RECORDS, samples_on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--dtype", action="append", required=True)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--classes", type=int, default=21)
    parser.add_argument("--emulated", help="CAPABILITY,PROCESSORS,BYTES")
    parser.add_argument("--first", action="store_true", help="only the first sample of each op")
    parser.add_argument("--op", action="append", choices=list(RECORDS), help="default: all that have kernels")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.emulated:
        from mfd_fast.backends import cuda

        cuda.native().set_device(*map(int, asked.emulated.split(",")))
    calls = 0
    for record in RECORDS.values():
        if asked.backend not in record.backends or record.name not in (asked.op or RECORDS):
            continue
        names = samples_on(record, asked.backend)
        for name in names[:1] if asked.first else names:
            for dtype in asked.dtype:
                size = {"rows": asked.rows, "classes": asked.classes}
                arguments = record.samples(dtype=getattr(torch, dtype), **size)[name]
                print(f"{record.name} {name} {dtype}", flush=True)
                for differentiable in (record.differentiable[:1], record.differentiable):
                    evaluate(record, on(record, asked.backend), arguments, names=differentiable)
                    calls += 1
    on_device.check_inputs()
    print(f"{calls} calls")


if __name__ == "__main__":
    main()
