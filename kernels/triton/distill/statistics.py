"""Statistics of row pairs in one read: maxima, sums of exponentials, the sum of the online divergences, by-products.

DKD and NKD see the classes other than the label here; `with_label` brings the label back.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..rows.arithmetic import (
    INF,
    LAST,
    LOG2E,
    divide,
    entropy_sum,
    finite_max,
    first_column,
    moved,
    power,
    rescale,
    rescale_moment,
    soft_gap,
)
from ..rows.sides import read
from .divergences import CROSS_ENTROPY, DKD, FORWARD, NKD, NONE


class Sums(NamedTuple):
    """Sums relative to the maxima, per lane [ROWS, LANES] or per row [ROWS]; 0 if not asked for.

    ss, st: of es, et. cross: of et*soft_gap where x is finite; blocked: max y where x is -inf. spread: of x - shift.
    s1, t1: of exp(x - max x), exp(y - max y). xs, yt: of es*(x - max x), et*(y - max y). ix, iy: first column of the
    maximum. nans: number of NaN.
    """

    ss: tl.tensor
    st: tl.tensor
    cross: tl.tensor
    blocked: tl.tensor
    s1: tl.tensor
    t1: tl.tensor
    spread: tl.tensor
    xs: tl.tensor
    yt: tl.tensor
    ix: tl.tensor
    iy: tl.tensor
    nans: tl.tensor


@triton.jit
def but_label(x, col, label, how):
    """x, -inf at the label where the divergence decouples it."""
    if (how.DIVERGENCE == DKD) or (how.DIVERGENCE == NKD):
        return tl.where(col == label[:, None, None], -INF, x)
    else:
        return x


@triton.jit
def guarded_cross(x, y, dx, dy, et, rho, how):
    """Lane sums of et*soft_gap where x is finite, and max y where x is -inf."""
    WITHOUT_P: tl.constexpr = (how.DIVERGENCE == NKD) or (how.DIVERGENCE == CROSS_ENTROPY)
    cut = x == -INF
    gap = soft_gap(dx, dy, rho[:, None, None], WITHOUT_P)
    cross = tl.sum(et * tl.where((et > 0.0) & (cut == 0), gap, 0.0), 2)
    return cross, tl.max(tl.where(cut, y, -INF), 2)


@triton.jit
def tile_sums(x, y, col, keep, ms, mt, s, t, rho, label, shift, PLAIN: tl.constexpr, how):
    """Lane sums of one tile relative to the maxima ms, mt [ROWS, LANES or 1, 1]; x, y are as `but_label` left them.

    keep None: the whole tile. PLAIN, FORWARD alone: cross is not finite where x or y is -inf.
    """
    none = tl.zeros([x.shape[0], x.shape[1]], x.dtype)
    ss, st, cross, blocked, s1, t1, spread, xs, yt = none, none, none, none, none, none, none, none, none
    ix = tl.zeros([x.shape[0], x.shape[1]], tl.int32)
    iy, nans = ix, ix
    dx = x - finite_max(ms)
    dy = y - finite_max(mt)
    cs, ct = s.c[:, None, None], t.c[:, None, None]
    c1 = tl.full([1, 1, 1], LOG2E, cs.dtype)
    if how.DIVERGENCE != NONE:
        es = power(dx, cs)
        et = power(dy, ct)
        ss, st = tl.sum(es, 2), tl.sum(et, 2)
        if how.DIVERGENCE <= NKD:
            if PLAIN:
                cross = tl.sum(et * soft_gap(dx, dy, rho[:, None, None], False), 2)
                blocked = none - INF
            else:
                cross, blocked = guarded_cross(x, y, dx, dy, et, rho, how)
    if how.HARD or (how.DIVERGENCE == NKD):
        s1 = tl.sum(power(dx, c1), 2)
    if how.DIVERGENCE == NKD:
        t1 = tl.sum(power(dy, c1), 2)
    if how.SMOOTH:
        others = col != label[:, None, None]
        if keep is not None:
            others = keep & others
        spread = tl.sum(tl.where(others, x - shift[:, None, None], 0.0), 2)
    if how.TERMS:
        xs = entropy_sum(dx, cs)
        yt = entropy_sum(dy, ct)
        ix = first_column(x, ms, col)
        iy = first_column(y, mt, col)
        nans = tl.sum(((x != x) | (y != y)).to(tl.int32), 2)
    return Sums(ss, st, cross, blocked, s1, t1, spread, xs, yt, ix, iy, nans)


@triton.jit
def over_lanes(sums):
    """Row sums of lane sums that are relative to one maximum per row."""
    ss, st, cross, blocked = tl.sum(sums.ss, 1), tl.sum(sums.st, 1), tl.sum(sums.cross, 1), tl.max(sums.blocked, 1)
    s1, t1, spread = tl.sum(sums.s1, 1), tl.sum(sums.t1, 1), tl.sum(sums.spread, 1)
    xs, yt, nans = tl.sum(sums.xs, 1), tl.sum(sums.yt, 1), tl.sum(sums.nans, 1)
    return Sums(ss, st, cross, blocked, s1, t1, spread, xs, yt, tl.min(sums.ix, 1), tl.min(sums.iy, 1), nans)


@triton.jit
def hold_rows(x, y, col, keep, s, t, label, shift, how):
    """max x, max y and Sums per row of a tile that holds whole rows."""
    x, y = but_label(x, col, label, how), but_label(y, col, label, how)
    ms, mt = tl.max(tl.max(x, 2), 1), tl.max(tl.max(y, 2), 1)
    rho = divide(t.T, s.T)
    sums = tile_sums(x, y, col, keep, ms[:, None, None], mt[:, None, None], s, t, rho, label, shift, False, how)
    return ms, mt, over_lanes(sums)


@triton.jit
def add_sums(a, b, ms, mt, to_ms, to_mt, s, t, rho, how):
    """a, relative to ms, mt, and b, relative to to_ms, to_mt; the result is relative to the latter."""
    WITHOUT_P: tl.constexpr = (how.DIVERGENCE == NKD) or (how.DIVERGENCE == CROSS_ENTROPY)
    ss, st, cross, blocked, s1, t1, xs, yt = a.ss, a.st, a.cross, a.blocked, a.s1, a.t1, a.xs, a.yt
    ix, iy = a.ix, a.iy
    cs, ct = s.c[:, None], t.c[:, None]
    c1 = tl.full([1, 1], LOG2E, cs.dtype)
    if how.DIVERGENCE != NONE:
        if how.DIVERGENCE <= NKD:
            shift = soft_gap(moved(ms, to_ms), moved(mt, to_mt), rho[:, None], WITHOUT_P)
            cross = rescale_moment(cross, st, shift, mt, to_mt, ct) + b.cross
            blocked = tl.maximum(blocked, b.blocked)
        if how.TERMS:
            xs = rescale_moment(xs, ss, moved(ms, to_ms), ms, to_ms, cs) + b.xs
            yt = rescale_moment(yt, st, moved(mt, to_mt), mt, to_mt, ct) + b.yt
            ix = tl.where(to_ms > ms, b.ix, tl.minimum(ix, b.ix))
            iy = tl.where(to_mt > mt, b.iy, tl.minimum(iy, b.iy))
        ss = rescale(ss, ms, to_ms, cs) + b.ss
        st = rescale(st, mt, to_mt, ct) + b.st
    if how.HARD or (how.DIVERGENCE == NKD):
        s1 = rescale(s1, ms, to_ms, c1) + b.s1
    if how.DIVERGENCE == NKD:
        t1 = rescale(t1, mt, to_mt, c1) + b.t1
    return Sums(ss, st, cross, blocked, s1, t1, a.spread + b.spread, xs, yt, ix, iy, a.nans + b.nans)


@triton.jit
def no_sums(SHAPE: tl.constexpr, DTYPE: tl.constexpr):
    """Sums of nothing."""
    none = tl.zeros(SHAPE, DTYPE)
    first = tl.full(SHAPE, LAST, tl.int32)
    nans = tl.zeros(SHAPE, tl.int32)
    return Sums(none, none, none, none - INF, none, none, none, none, none, first, first, nans)


@triton.jit
def add_tiles(sums, ms, mt, first, last, s, t, rho, at, col, shift, WHOLE: tl.constexpr, PLAIN: tl.constexpr, how):
    """sums, ms and mt with the columns from ``first`` to ``last`` added; WHOLE: no tile of them needs a mask."""
    for start in range(first, last, how.LANES * how.VEC):
        here = col + start
        keep = None
        if not WHOLE:
            keep = at.counted[:, None, None] & (here < at.classes)
        x = but_label(read(s, here, keep, "evict_last"), here, at.label, how)
        new_ms = tl.maximum(ms, tl.max(x, 2))
        y = x
        new_mt = new_ms
        if how.DIVERGENCE != NONE:
            y = but_label(read(t, here, keep, "evict_last"), here, at.label, how)
            new_mt = tl.maximum(mt, tl.max(y, 2))
        tops = (new_ms[:, :, None], new_mt[:, :, None])
        more = tile_sums(x, y, here, keep, *tops, s, t, rho, at.label, shift, PLAIN, how)
        sums = add_sums(sums, more, ms, mt, new_ms, new_mt, s, t, rho, how)
        ms, mt = new_ms, new_mt
    return sums, ms, mt


@triton.jit
def cross_again(sums, ms, mt, s, t, rho, at, col, how):
    """sums of rows with their cross and blocked worked out with care where -inf has spoilt them."""
    spoilt = sums.cross - sums.cross != 0.0
    last = tl.max(tl.where(spoilt, at.classes, 0), 0)
    cross = tl.zeros([how.ROWS, how.LANES], s.T.dtype)
    blocked = cross - INF
    for first in range(0, last, how.LANES * how.VEC):
        here = col + first
        keep = at.counted[:, None, None] & (here < at.classes)
        x, y = read(s, here, keep, "evict_last"), read(t, here, keep, "evict_last")
        dx, dy = x - finite_max(ms)[:, None, None], y - finite_max(mt)[:, None, None]
        more, cut = guarded_cross(x, y, dx, dy, power(dy, t.c[:, None, None]), rho, how)
        cross += more
        blocked = tl.maximum(blocked, cut)
    return tl.where(spoilt, tl.sum(cross, 1), sums.cross), tl.where(spoilt, tl.max(blocked, 1), sums.blocked)


@triton.jit
def stream_rows(s, t, at, col, shift, how):
    """The same of rows longer than a tile; every lane keeps its own maximum until the end.

    A program of one row reads whole tiles without masks, and FORWARD looks out for -inf only once it has shown.
    """
    ONE: tl.constexpr = (how.ROWS == 1) and (t.parts is None)
    PLAIN: tl.constexpr = ONE and (how.DIVERGENCE == FORWARD)
    none = no_sums([how.ROWS, how.LANES], s.T.dtype)
    sums = none
    ms = tl.full([how.ROWS, how.LANES], -INF, s.T.dtype)
    mt = ms
    rho = divide(t.T, s.T)
    whole = 0
    if ONE:
        BLOCK: tl.constexpr = how.LANES * how.VEC
        whole = tl.max(tl.where(at.counted, at.classes, 0), 0) // BLOCK * BLOCK
        sums, ms, mt = add_tiles(sums, ms, mt, 0, whole, s, t, rho, at, col, shift, True, PLAIN, how)
    sums, ms, mt = add_tiles(sums, ms, mt, whole, at.classes, s, t, rho, at, col, shift, False, False, how)

    row_ms, row_mt = tl.max(ms, 1), tl.max(mt, 1)
    to_ms, to_mt = row_ms[:, None] + tl.zeros_like(ms), row_mt[:, None] + tl.zeros_like(mt)
    sums = over_lanes(add_sums(sums, none, ms, mt, to_ms, to_mt, s, t, rho, how))
    cross, blocked = sums.cross, sums.blocked
    if PLAIN:
        cross, blocked = cross_again(sums, row_ms, row_mt, s, t, rho, at, col, how)
    others = (sums.s1, sums.t1, sums.spread, sums.xs, sums.yt, sums.ix, sums.iy, sums.nans)
    return row_ms, row_mt, Sums(sums.ss, sums.st, cross, blocked, *others)


@triton.jit
def with_label(m, total, moment, column, x, label, c):
    """Maximum, sum of exponentials, its first moment and first column of the maximum, the label's logit x included."""
    to = tl.maximum(m, x)
    top = finite_max(to)
    mine = power(x - top, c)
    moment = rescale_moment(moment, total, moved(m, to), m, to, c) + tl.where(mine > 0.0, mine * (x - top), 0.0)
    column = tl.where(x > m, label.to(tl.int32), tl.where(x == m, tl.minimum(column, label.to(tl.int32)), column))
    return to, rescale(total, m, to, c) + mine, moment, column
