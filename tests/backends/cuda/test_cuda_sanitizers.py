"""Every CUDA kernel through the emulator under sanitizers: out-of-bounds accesses, undefined behaviour, races."""

import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_emulator
import every_sample
import pytest
import verdicts
from op_db import RECORDS, samples_on

pytestmark = pytest.mark.rest

# Optimizing takes longer than it saves.
ADDRESS = ("-O0", "-fsanitize=address,undefined", "-fno-omit-frame-pointer")
THREADS = ("-O0", *cuda_emulator.THREADS, "-fsanitize=thread")
#: Small shared memory makes short rows long ones: a block per row, a cluster per row, a row in two passes.
RUNGS = ("90,4,232448:1100", "90,4,8192:2100", "80,4,8192:2100")


def sanitized(library, flags, *arguments):
    """The number of calls of every_sample, with the emulated module and Python under a sanitizer, which says nothing.

    Kept for the same sources and compiler: the module's folder names those of the kernels and the flags.
    """
    module = cuda_emulator.module(*flags)
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    trees = (verdicts.ROOT / "mfd_fast", Path(every_sample.__file__).resolve().parent, Path(__file__).resolve())
    said = (module.parent.name, compiler, sys.version, library, *arguments)
    return verdicts.kept("sanitizers", trees, said, lambda: run(module, library, *arguments))


def run(module, library, *arguments):
    found = subprocess.run(["g++", f"-print-file-name={library}"], capture_output=True, text=True, check=True)
    environ = {
        **os.environ,
        "LD_PRELOAD": str(Path(found.stdout.strip()).resolve()),
        "MFD_FAST_CUDA_EMULATOR": str(module),
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
        "UBSAN_OPTIONS": "halt_on_error=1",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, every_sample.__file__, "--backend=cuda", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environ,
    )
    said = f"{done.stdout[-5000:]}\nexit status {done.returncode}"
    assert done.returncode == 0, said
    assert not re.search(r"ERROR: |runtime error|data race", done.stdout), said
    return int(re.search(r"^(\d+) calls$", done.stdout, re.MULTILINE)[1])


def test_address_and_undefined_behaviour_sanitizers_are_silent():
    """All samples on two roads, in one of two dtypes each, and every rung."""
    calls = sanitized(
        "libasan.so", ADDRESS, "--dtype=bfloat16", "--dtype=float32", *(f"--emulated={rung}" for rung in RUNGS)
    )
    records = [record for record in RECORDS.values() if "cuda" in record.backends]
    samples = sum(len(samples_on(record, "cuda")) for record in records)
    assert calls == 2 * (samples + len(RUNGS) * len(records))


def test_thread_sanitizer_is_silent():
    """Each CUDA thread is a thread of its own: a barrier that the kernels lack would be a race."""
    rungs = ("90,4,232448:1100", "90,4,5120:1100")  # a block, a cluster of 4
    few = ("--dtype=bfloat16", "--first", "--rows=1")
    assert sanitized("libtsan.so", THREADS, *few, *(f"--emulated={rung}" for rung in rungs)) > 0
