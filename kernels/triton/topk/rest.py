"""The classes that a sparse teacher does not list; one row per program.

A bitmap of the row, one bit per column, tells them apart while the student's logits stream past. No sum is the
difference of two others, so that a tiny rest keeps its digits.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..rows.arithmetic import INF, LAST, LOG2E, finite_max, first_column, moved, power, rescale, rescale_moment
from ..rows.sides import read


class Rest(NamedTuple):
    """Over the classes not listed, [1]; 0 if not asked for.

    top: max x. total: sum of e = exp((x - top)/T). moment: of e*(x - top). powers, power_moment: the same of
    e^degree. at_one: sum of exp(x - top). spread: of x - shift. column: first one of the maximum. nans: number of NaN.
    """

    top: tl.tensor
    total: tl.tensor
    moment: tl.tensor
    powers: tl.tensor
    power_moment: tl.tensor
    at_one: tl.tensor
    spread: tl.tensor
    column: tl.tensor
    nans: tl.tensor


@triton.jit
def over_tile(values):
    """Sum per row of a tile."""
    return tl.sum(tl.sum(values, 2), 1)


@triton.jit
def n_words(classes):
    """Integers of a row's bitmap."""
    return (classes + 31) // 32


@triton.jit
def row_bits(p, at):
    """Where the bitmap of each row begins, a tile."""
    return p.bits_ptr + (at.row * n_words(at.classes))[:, None, None]


@triton.jit
def mark_listed(bits, index, listed, words, col, BLOCK: tl.constexpr):
    """Sets the bits of the listed columns in a bitmap of ``words`` integers; whether one is listed twice, [1]."""
    for first in range(0, words, BLOCK):
        tl.store(bits + first + col, tl.zeros(col.shape, tl.int32), mask=first + col < words)
    tl.debug_barrier()
    bit = tl.full(index.shape, 1, tl.int32) << (index & 31)
    before = tl.atomic_or(bits + (index >> 5), bit, mask=listed, sem="relaxed", scope="cta")
    tl.debug_barrier()
    return over_tile((listed & ((before & bit) != 0)).to(tl.int32)) > 0


@triton.jit
def is_listed(bits, col, keep):
    """Read past the first cache, which atomics do not update."""
    word = tl.load(bits + (col >> 5), mask=keep, other=0, cache_modifier=".cg")
    return ((word >> (col & 31)) & 1) != 0


@triton.jit
def no_rest(DTYPE: tl.constexpr):
    """Sums of nothing."""
    none = tl.zeros([1], DTYPE)
    return Rest(none - INF, none, none, none, none, none, none, tl.full([1], LAST, tl.int32), tl.zeros([1], tl.int32))


@triton.jit
def weighted(e, d):
    """Lane sums of e*d with 0*(-inf) = 0."""
    return tl.sum(tl.where(e > 0.0, e * d, 0.0), 2)


@triton.jit
def rest_sums(s, bits, at, col, shift, degree, POWERS: tl.constexpr, AT_ONE: tl.constexpr, how):
    """`Rest` of the student's row, read once; every lane keeps its own maximum until the end."""
    top = tl.full([1, how.LANES], -INF, s.T.dtype)
    total = tl.zeros([1, how.LANES], s.T.dtype)
    moment, powers, power_moment, at_one, spread = total, total, total, total, total
    column = tl.full([1, how.LANES], LAST, tl.int32)
    nans = tl.zeros([1, how.LANES], tl.int32)
    c = s.c[:, None]
    raised = c * degree.to(s.c.dtype)[:, None]
    c1 = tl.full([1, 1], LOG2E, s.c.dtype)
    for first in range(0, at.classes, how.LANES * how.VEC):
        here = col + first
        keep = at.counted[:, None, None] & (here < at.classes)
        others = keep & (is_listed(bits, here, keep) == 0)
        x = tl.where(others, read(s, here, keep, "evict_last"), -INF)
        to = tl.maximum(top, tl.max(x, 2))
        d = x - finite_max(to)[:, :, None]
        e = power(d, s.c[:, None, None])
        moment = rescale_moment(moment, total, moved(top, to), top, to, c) + weighted(e, d)
        total = rescale(total, top, to, c) + tl.sum(e, 2)
        if POWERS:
            e = power(d, raised[:, :, None])
            power_moment = rescale_moment(power_moment, powers, moved(top, to), top, to, raised) + weighted(e, d)
            powers = rescale(powers, top, to, raised) + tl.sum(e, 2)
        if AT_ONE:
            at_one = rescale(at_one, top, to, c1) + tl.sum(power(d, c1[:, :, None]), 2)
        if how.SMOOTH:
            spread += tl.sum(tl.where(others, x - shift[:, None, None], 0.0), 2)
        if how.TERMS:
            found = first_column(x, to[:, :, None], here)
            column = tl.where(to > top, found, tl.minimum(column, found))
            nans += tl.sum((x != x).to(tl.int32), 2)
        top = to
    row_top = tl.max(top, 1)
    to = row_top[:, None] + tl.zeros_like(top)
    moment = rescale_moment(moment, total, moved(top, to), top, to, c)
    power_moment = rescale_moment(power_moment, powers, moved(top, to), top, to, raised)
    total, moment = tl.sum(rescale(total, top, to, c), 1), tl.sum(moment, 1)
    powers, power_moment = tl.sum(rescale(powers, top, to, raised), 1), tl.sum(power_moment, 1)
    at_one, spread = tl.sum(rescale(at_one, top, to, c1), 1), tl.sum(spread, 1)
    column = tl.min(tl.where(top == to, column, LAST), 1)
    return Rest(row_top, total, moment, powers, power_moment, at_one, spread, column, tl.sum(nans, 1))
