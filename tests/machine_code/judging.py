"""Whether a kernel's machine code still costs what counts.json says, and keeps the rules of the column loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .__main__ import name_of

#: What the executed instructions depend on.
SHAPE = ("kernel", "code", "threads", "shared_bytes", "cluster", "grid_blocks")
#: By how much the instructions of a pair may grow.
TOLERANCE = 1.02


def judge(kept: dict[str, Any], found: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> list[str]:
    """What is wrong with a kernel of which ``kept`` is recorded and ``found`` are the facts of today's launch.

    Only code that has changed is executed again, by ``measure``.
    """
    changed = any(kept[key] != found[key] for key in SHAPE)
    record = measure() if changed else kept
    name, faults = name_of(kept), []
    now, before = record["instructions_per_pair"], kept["instructions_per_pair"]
    if now > TOLERANCE * before:
        faults.append(f"{name}: {now} instructions a column, {before} in counts.json")
    if record["doubles_in_loops"]:
        faults.append(f"{name}: {record['doubles_in_loops']} instructions of float64 in loops over columns")
    aligned = record["shape"][-1] * (4 if record["dtype"] == "float32" else 2) % 16 == 0
    if aligned and record["narrow_in_loops"]:
        faults.append(f"{name}: {record['narrow_in_loops']} accesses of fewer than 16 bytes in loops over columns")
    # Triton's programs take turns; a CUDA block walks over its rows.
    if record["backend"] == "cuda" and record["grid_blocks"] > record["resident_blocks"]:
        faults.append(f"{name}: {record['grid_blocks']} blocks where {record['resident_blocks']} are resident")
    return faults
