"""The modelled time of recorded instructions on one multiprocessor of an H200: ``simulator.cpp`` and its numbers."""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .counting import BYTES_PER_CLOCK, class_of, is_store
from .machine import Access
from .sass import Instruction, Kernel

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "machine-code"

#: Of a class: the pipe (order of simulator.cpp), clocks it is taken for a warp, clocks to the result.
PIPES = {
    "fma": (0, 2, 4),
    "imad": (1, 2, 4),
    "alu": (2, 2, 5),
    "mufu": (3, 8, 14),
    "conversion": (3, 8, 14),
    "fp64": (4, 2, 8),
    "shared": (5, 1, 24),
    "global": (5, 1, 30),
    "shuffle": (5, 1, 22),
    "uniform": (6, 2, 12),
    "constant": (7, 0, 30),
    "control": (7, 0, 4),
    "barrier": (7, 0, 10),
    "tensor": (8, 16, 33),
    "other": (7, 0, 20),
}
PLAIN, DRAM_LOAD, CACHE_LOAD, STORE, BLOCK_BARRIER, BRANCH, SHARED, CLUSTER_BARRIER = range(8)
CACHE_BYTES_PER_CLOCK = 24.0
DRAM_LATENCY, CACHE_LATENCY, LAUNCH, BARRIER, BRANCH_TAKEN = 1000.0, 270.0, 400.0, 20.0, 4.0
CLUSTER_BARRIER_LATENCY, PEER_LATENCY = 220, 180
BRANCHES = ("BRA", "BRX", "CALL", "RET", "BSYNC", "JMP")

Steps = list[tuple[int, "Access | None"]]


@dataclass
class Time:
    """``busy`` is the share of the schedulers' slots that issued."""

    clocks: float
    busy: float
    bytes_in_flight: float


@functools.cache
def simulator() -> Path:
    """The compiled simulator."""
    source = HERE / "simulator.cpp"
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    program = BUILD / f"simulator-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"
    if not program.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = program.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [*compiler, "-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", source, "-o", partial], check=True
        )
        partial.rename(program)
    return program


def _step(instruction: Instruction, access: Access | None, follows: bool, cached: set[int]) -> bytes:
    kind_of = class_of(instruction)
    pipe, occupancy, latency = PIPES[kind_of]
    kind, dram_bytes, cache_bytes, waves = PLAIN, 0, 0, 1
    name = instruction.name
    if name == "ULDC":
        latency = 10
    elif name == "REDUX":
        waves = 2
    elif name == "BAR":
        kind = BLOCK_BARRIER
    elif name == "UCGABAR_WAIT":
        kind, latency = CLUSTER_BARRIER, CLUSTER_BARRIER_LATENCY
    elif name == "LD" and access is None:
        latency = PEER_LATENCY
    elif name in BRANCHES and not follows:
        kind = BRANCH
    if access is not None and kind_of == "shared":
        kind, waves = SHARED, access.units
    elif access is not None and kind_of == "global":
        cache_bytes = access.units * 32
        waves = max(1, -(-access.bytes // 128))
        if is_store(instruction):
            kind, dram_bytes = STORE, access.bytes  # the L2 cache merges what is written of a sector
        else:
            line = access.address // 512
            kind = CACHE_LOAD if line in cached or name.startswith("ATOM") else DRAM_LOAD
            dram_bytes = cache_bytes
            cached.add(line)
    control = instruction.stall, instruction.writes, instruction.reads, instruction.waits
    return struct.pack("<6B5H", pipe, *control, kind, occupancy, latency, dram_bytes, waves, cache_bytes)


def _pack(kernel: Kernel, steps: Steps, cached: set[int]) -> bytes:
    packed = bytearray(struct.pack("<i", len(steps)))
    for k, (index, access) in enumerate(steps):
        follows = k + 1 == len(steps) or steps[k + 1][0] == index + 1
        packed += _step(kernel.instructions[index], access, follows, cached)
    return bytes(packed)


def simulate(kernel: Kernel, warps: list[Steps], resident: int, blocks: int = 0) -> Time:
    """``warps`` are those of one block, of which ``resident`` run at a time and ``blocks`` (or as many) in all.

    Whichever warp first touches a line of a block's data brings it from DRAM.
    """
    cached: set[int] = set()
    head = struct.pack("<3i", resident, blocks or resident, len(warps))
    model = (BYTES_PER_CLOCK, CACHE_BYTES_PER_CLOCK, DRAM_LATENCY, CACHE_LATENCY, LAUNCH, BARRIER, BRANCH_TAKEN)
    data = head + struct.pack("<7d", *model) + b"".join(_pack(kernel, steps, cached) for steps in warps)
    done = subprocess.run([simulator()], input=data, capture_output=True, check=True)
    clocks, issued, in_flight = (float(x) for x in done.stdout.split()[:3])
    return Time(clocks, issued / clocks / 4, in_flight)
