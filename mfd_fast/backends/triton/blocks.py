"""Tile shapes: which block of rows and columns a program owns, chosen from the shape alone."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

MAX_UNIT = 16  # elements; 16 bytes of the smallest dtype are 8
VECTOR_BYTES = 16  # widest load of one thread
MAX_HELD = 4096  # elements of 4 bytes or less of the longest row that a program holds in registers


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
def choose_blocks(columns: int, widest: int, unit: int, many_sums: bool = False) -> Blocks:
    """Blocks for rows of ``columns`` columns whose larger dtype has ``widest`` bytes, aligned to ``unit`` elements.

    At most 16 elements of each side per thread (8 of 8 bytes): more spills.
    Half of it where every lane carries ``many_sums`` from tile to tile.
    """
    vector = min(VECTOR_BYTES // widest, unit)
    wide = max(widest // 4, 1)  # registers per element
    size = _power_of_two(columns)
    if size <= MAX_HELD // wide:
        per_warp = 512 // wide
        warps = max(size // per_warp, 1)
        vec = min(vector, size) if vector * widest >= 8 else max(size // (32 * warps), 1)
        lanes = size // vec
        # Four rows per thread: what is known of a row is held by every thread that works on it.
        rows = max(min(per_warp // size, 4 * 32 // lanes), 1)
        return Blocks(rows, lanes, vec, vector * widest >= 8, False, warps)
    # Of the longest rows one per processor is in flight, so that a second read finds them in the L2 cache.
    warps, per_thread = (16, 32 // widest) if columns > 65536 else (8, 16 // wide)
    per_thread = per_thread // 2 if many_sums else per_thread
    if vector * widest < VECTOR_BYTES:
        return Blocks(1, 32 * warps, min(per_thread, 8), False, True, warps)
    return Blocks(1, 32 * warps * per_thread // vector, vector, True, True, warps)


def common_unit(*counts: int) -> int:
    """Largest power of two up to ``MAX_UNIT`` that divides all counts and strides (elements)."""
    return math.gcd(MAX_UNIT, *counts)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
