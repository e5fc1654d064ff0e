"""Tile shapes: which block of rows and columns a program owns, chosen from the shape alone."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

MAX_UNIT = 16  # elements; 16 bytes of the smallest dtype are 8
VECTOR_BYTES = 16  # widest load of one thread
THREAD_BYTES = 32  # of each side in the registers of one thread
LONG = 65536  # columns; longer rows take more warps
SHORT = 16384  # columns; shorter rows of `plain_scalar` take less
HELD = 32  # elements of each side, of a thread of `plain_scalar`
HELD_WARPS = 8  # of the program that holds the longest row that is read once


class BlockSizes(NamedTuple):
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
def choose_blocks(columns: int, widest: int, unit: int, heavy: bool = False, heaviest: bool = False) -> BlockSizes:
    """Sizes for rows of ``columns`` columns whose larger dtype has ``widest`` bytes, aligned to ``unit`` elements.

    A thread holds 32 bytes of each side, half of it for a ``heavy`` kernel: more spills. The ``heaviest`` ones need the
    registers of more warps as well.
    """
    vector = min(VECTOR_BYTES // widest, unit)
    wide_enough = vector * widest >= 8
    per_thread = THREAD_BYTES // widest // (2 if heavy else 1)
    size = power_of_two(columns)
    if size <= HELD_WARPS * 32 * per_thread:
        per_warp = 32 * per_thread
        warps = max(size // per_warp, 1)
        vec = min(vector, size) if wide_enough else max(size // (32 * warps), 1)
        lanes = size // vec
        # Four rows per thread: what is known of a row is held by every thread that works on it.
        rows = max(min(per_warp // size, 4 * 32 // lanes), 1)
        return BlockSizes(rows, lanes, vec, wide_enough, False, warps)
    # Of the longest rows one per processor is in flight, so that a second read finds them in the L2 cache.
    warps = 16 if columns > LONG and not heaviest else 8
    if vector * widest < VECTOR_BYTES:
        return BlockSizes(1, 32 * warps, per_thread, False, True, warps)
    return BlockSizes(1, 32 * warps * per_thread // vector, vector, True, True, warps)


def choose_plain_blocks(columns: int, widest: int, unit: int, heavy: bool) -> BlockSizes:
    """Sizes of `plain_scalar`: a thread holds `HELD` elements of each side, half of them for a ``heavy``
    divergence, or a vector of longer rows.
    """
    held = HELD // 2 if heavy else HELD
    vector = min(VECTOR_BYTES // widest, unit)
    wide_enough = vector * widest >= 8
    size = power_of_two(columns)
    if size <= HELD_WARPS // 2 * 32 * held:
        warps = max(size // (32 * held), 1)
        vec = min(vector, size) if wide_enough else max(size // (32 * warps), 1)
        lanes = size // vec
        rows = max(min(32 * held // size, 2 * 32 // lanes), 1)
        return BlockSizes(rows, lanes, vec, wide_enough, False, warps)
    warps = 16 if columns > LONG else 8 if columns > SHORT else 4
    return BlockSizes(1, 32 * warps, VECTOR_BYTES // widest, vector * widest == VECTOR_BYTES, True, warps)


def choose_row_blocks(columns: int, widest: int, unit: int, slots: int) -> BlockSizes:
    """Sizes of programs that own one row, and beside it ``slots`` values in registers."""
    vector = min(VECTOR_BYTES // widest, unit)
    wide_enough = vector * widest >= 8
    per_thread = THREAD_BYTES // widest // 2
    size = power_of_two(columns)
    warps = min(max(size // (32 * per_thread), slots // 512, 1), HELD_WARPS)
    size = min(size, 32 * warps * per_thread)
    vec = min(vector, size) if wide_enough else max(size // (32 * warps), 1)
    return BlockSizes(1, size // vec, vec, wide_enough, True, warps)


def common_unit(*counts: int) -> int:
    """Largest power of two up to ``MAX_UNIT`` that divides all counts and strides (elements)."""
    return math.gcd(MAX_UNIT, *counts)


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
