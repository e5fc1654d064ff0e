"""Runs the samples of every op that has kernels on a backend, forward and backward, once: what sanitizers watch.

    python tests/support/every_sample.py --backend cuda --dtype bfloat16 --dtype float32

Values are checked elsewhere. Several dtypes take turns from sample to sample. With ``--emulated 90,4,8192:2100`` the
first sample of each op also runs with 2100 classes on an emulated device of that capability, number of processors and
shared memory per block. The last line is the number of calls.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import on_device
import torch
from harness import OpRecord, evaluate, on
from op_db import RECORDS, samples_on
from variants import variants_on

from mfd_fast.bench import memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--dtype", action="append", required=True)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--classes", type=int, default=21)
    parser.add_argument("--emulated", action="append", default=[], metavar="CAPABILITY,PROCESSORS,BYTES:CLASSES")
    parser.add_argument("--first", action="store_true", help="only the first sample of each op")
    parser.add_argument("--variants", action="store_true", help="only one sample of each class of kernels")
    parser.add_argument("--kernels", action="store_true", help="also name the kernels that a GPU has run")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    chosen = every_first if asked.first else variants_on if asked.variants else samples_on

    def calls_of_all() -> int:
        return run(asked.backend, asked.dtype, asked.rows, asked.classes, chosen)

    if asked.kernels:
        calls, names = memory.kernels(calls_of_all)
        print("".join(f"kernel {name}\n" for name in sorted(set(names))), end="")
    else:
        calls = calls_of_all()
    for case in asked.emulated:
        from mfd_fast.backends import cuda

        device, classes = case.split(":")
        print(case)
        cuda.native().set_device(*map(int, device.split(",")))
        calls += run(asked.backend, asked.dtype[:1], min(asked.rows, 2), int(classes), every_first)
    on_device.check_inputs()
    print(f"{calls} calls")


Names = Callable[[OpRecord, str], list[str]]


def every_first(record: OpRecord, backend: str) -> list[str]:
    return samples_on(record, backend)[:1]


def run(backend: str, dtypes: list[str], rows: int, classes: int, chosen: Names) -> int:
    """The ``chosen`` samples of every op; the number of calls."""
    calls = 0
    for record in RECORDS.values():
        if backend not in record.backends:
            continue
        for name in chosen(record, backend):
            dtype = dtypes[calls // 2 % len(dtypes)]
            arguments = record.samples(dtype=getattr(torch, dtype), rows=rows, classes=classes)[name]
            print(f"{record.name} {name} {dtype}", flush=True)
            for differentiable in (record.differentiable[:1], record.differentiable):
                evaluate(record, on(record, backend), arguments, names=differentiable)
                calls += 1
    return calls


if __name__ == "__main__":
    main()
