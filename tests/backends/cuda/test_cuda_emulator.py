"""The emulator itself: sound kernels give the right numbers, planted faults are found."""

import os
import re
import subprocess

import cuda_emulator
import pytest

SANITIZERS = {
    "fibres": (),
    "address": ("-fsanitize=address,undefined", "-fno-omit-frame-pointer"),
    "threads": (*cuda_emulator.THREADS, "-fsanitize=thread"),
}

DIVERGENT = {
    "some_threads_wait": r"divergent barrier: thread 8 of block 0 has left, others wait at self_test\.cpp:\d+",
    "two_barriers": r"divergent barrier: __syncthreads at self_test\.cpp:\d+ and at self_test\.cpp:\d+",
    "barrier_against_shuffle": r"divergent barrier: every thread waits, thread 31 of block 0",
    "unequal_masks": r"warp masks differ: thread \d+ of block 0 at self_test\.cpp:\d+",
    "too_much_shared": r"invalid argument",
    "cluster_on_sm_80": r"invalid argument",
}
#: What is said instead where the operating system chooses the order of the threads.
IN_ANY_ORDER = {
    "some_threads_wait": r"divergent barrier: thread \d+ of block 0 (has left|waits at .*, others have left)",
    "barrier_against_shuffle": r"divergent barrier: every thread waits, thread \d+ of block 0",
}


def run(name: str, kind: str) -> tuple[int, str]:
    """Exit status and output of one kernel of self_test.cpp."""
    command = [cuda_emulator.program("self_test.cpp", *SANITIZERS[kind]), name]
    environ = {**os.environ, "TSAN_OPTIONS": "exitcode=66", "UBSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)
    return done.returncode, done.stdout


@pytest.mark.parametrize("kind", SANITIZERS)
def test_sound_kernels_pass(kind: str) -> None:
    status, said = run("sound", kind)
    assert status == 0
    assert said.endswith("done\n")


@pytest.mark.parametrize("kind", SANITIZERS)
@pytest.mark.parametrize("name", DIVERGENT)
def test_the_emulator_refuses_what_a_gpu_would_hang_on(name: str, kind: str) -> None:
    status, said = run(name, kind)
    assert status != 0
    expected = IN_ANY_ORDER if kind == "threads" and name in IN_ANY_ORDER else DIVERGENT
    assert re.search(expected[name], said), said


@pytest.mark.parametrize("name", ["shared_overrun", "global_overrun"])
def test_the_address_sanitizer_finds_an_access_out_of_bounds(name: str) -> None:
    status, said = run(name, "address")
    assert status != 0
    assert "heap-buffer-overflow" in said
    assert "block_sum" in said


def test_the_thread_sanitizer_finds_a_missing_barrier() -> None:
    status, said = run("missing_barrier", "threads")
    assert status == 66
    assert "data race" in said
    assert "block_sum" in said
    assert run("missing_barrier", "fibres")[0] == 0, "fibres alone cannot see it"
