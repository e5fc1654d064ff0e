"""Tile shapes: which block of rows and columns a program owns, chosen from the shape alone."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

MAX_UNIT = 16  # elements; 16 bytes of the smallest dtype are 8
VECTOR_BYTES = 16  # widest load of one thread
MAX_HELD = 8192  # elements of 4 bytes or less of the longest row that a program holds in registers


class Blocks(NamedTuple):
    """A tile [rows, lanes, vec] of a program of ``warps`` warps; ``loop``: a row needs several tiles.

    ``contiguous``: a lane holds ``vec`` neighbours (one vector load); else every ``lanes``-th column,
    which keeps the loads of a warp together where rows are not aligned.
    """

    rows: int
    lanes: int
    vec: int
    contiguous: bool
    loop: bool
    warps: int


@functools.lru_cache(maxsize=1024)
def choose_blocks(columns: int, widest: int, unit: int) -> Blocks:
    """Blocks for rows of ``columns`` columns whose larger dtype has ``widest`` bytes, aligned to ``unit`` elements.

    At most 32 elements of each side per thread (16 of 8 bytes, 16 where a lane carries running sums): more spills.
    """
    vector = min(VECTOR_BYTES // widest, unit)
    wide = max(widest // 4, 1)  # registers per element
    size = _power_of_two(columns)
    if size <= MAX_HELD // wide:
        per_warp = 1024 // wide
        warps = max(size // per_warp, 1)
        vec = min(vector, size) if vector * widest >= 8 else max(size // (32 * warps), 1)
        lanes = size // vec
        # Four rows per thread: what is known of a row is held by every thread that works on it.
        rows = max(min(per_warp // size, 4 * 32 // lanes), 1)
        return Blocks(rows, lanes, vec, vector * widest >= 8, False, warps)
    warps, per_thread = (32, 8 // wide) if columns > 65536 else (8, 16 // wide)
    if vector * widest < VECTOR_BYTES:
        return Blocks(1, 32 * warps, min(per_thread, 8), False, True, warps)
    return Blocks(1, 32 * warps * per_thread // vector, vector, True, True, warps)


def common_unit(*counts: int) -> int:
    """Largest power of two up to ``MAX_UNIT`` that divides all counts and strides (elements)."""
    return math.gcd(MAX_UNIT, *counts)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
