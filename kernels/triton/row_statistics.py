"""Statistics of row pairs in one read: maxima, sums of exponentials, the KL sum, optional by-products."""

import triton
import triton.language as tl

from .rows import (
    INF,
    LAST,
    LOG2E,
    entropy_sum,
    finite_max,
    first_column,
    moved,
    power,
    read,
    rescale,
    rescale_moment,
    soft_sums,
)


@triton.jit
def tile_sums(
    x,
    y,
    col,
    keep,
    ms,
    mt,
    cs,
    ct,
    rho,
    shift,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Lane sums [ROWS, LANES] of one tile relative to the maxima ms, mt [ROWS, LANES or 1, 1]; 0 if not asked for."""
    none = tl.zeros([x.shape[0], x.shape[1]], x.dtype)
    ss, st, cross, blocked, s1, spread, xs, yt = none, none, none, none, none, none, none, none
    ix = tl.zeros([x.shape[0], x.shape[1]], tl.int32)
    iy, nans = ix, ix
    if SOFT:
        ss, st, cross, blocked = soft_sums(x, y, ms, mt, cs, ct, rho)
    if HARD:
        s1 = tl.sum(power(x - finite_max(ms), tl.full([1, 1, 1], LOG2E, cs.dtype)), 2)
    if SMOOTH:
        spread = tl.sum(tl.where(keep, x - shift, 0.0), 2)
    if TERMS:
        xs = entropy_sum(x - finite_max(ms), cs)
        yt = entropy_sum(y - finite_max(mt), ct)
        ix = first_column(x, ms, col)
        iy = first_column(y, mt, col)
        nans = tl.sum(((x != x) | (y != y)).to(tl.int32), 2)
    return ss, st, cross, blocked, s1, spread, xs, yt, ix, iy, nans


@triton.jit
def hold_rows(
    x,
    y,
    col,
    keep,
    cs,
    ct,
    rho,
    shift,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Row statistics [ROWS] of a tile that holds whole rows."""
    ms = tl.max(tl.max(x, 2), 1)
    mt = tl.max(tl.max(y, 2), 1)
    ss, st, cross, blocked, s1, spread, xs, yt, ix, iy, nans = tile_sums(
        x,
        y,
        col,
        keep,
        ms[:, None, None],
        mt[:, None, None],
        cs[:, None, None],
        ct[:, None, None],
        rho[:, None, None],
        shift[:, None, None],
        SOFT,
        HARD,
        SMOOTH,
        TERMS,
    )
    return (
        ms,
        mt,
        tl.sum(ss, 1),
        tl.sum(st, 1),
        tl.sum(cross, 1),
        tl.max(blocked, 1),
        tl.sum(s1, 1),
        tl.sum(spread, 1),
        tl.sum(xs, 1),
        tl.sum(yt, 1),
        tl.min(ix, 1),
        tl.min(iy, 1),
        tl.sum(nans, 1),
    )


@triton.jit
def stream_rows(
    student_ptr,
    student_start,
    teacher_ptr,
    teacher_start,
    col,
    counted,
    classes,
    cs,
    ct,
    rho,
    shift,
    s_scale,
    s_softcap,
    t_scale,
    t_softcap,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
    TERMS: tl.constexpr,
    S_SCALED: tl.constexpr,
    S_CAPPED: tl.constexpr,
    T_SCALED: tl.constexpr,
    T_CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Row statistics [ROWS] of rows longer than a tile; every lane keeps its own maximum until the end."""
    none = tl.zeros([ROWS, LANES], DTYPE)
    ss, st, cross, s1, spread, xs, yt = none, none, none, none, none, none, none
    ms, mt, blocked = none - INF, none - INF, none - INF
    ix = tl.full([ROWS, LANES], LAST, tl.int32)
    iy = ix
    nans = tl.zeros([ROWS, LANES], tl.int32)
    cs, ct, rho = cs[:, None], ct[:, None], rho[:, None]
    c1 = tl.full([1, 1], LOG2E, cs.dtype)
    for first in range(0, classes, LANES * VEC):
        here = col + first
        keep = counted[:, None, None] & (here < classes)
        x = read(student_ptr, student_start, here, keep, s_scale, s_softcap, S_SCALED, S_CAPPED, DTYPE, "evict_last")
        new_ms = tl.maximum(ms, tl.max(x, 2))
        y = x
        new_mt = new_ms
        if SOFT:
            y = read(
                teacher_ptr, teacher_start, here, keep, t_scale, t_softcap, T_SCALED, T_CAPPED, DTYPE, "evict_last"
            )
            new_mt = tl.maximum(mt, tl.max(y, 2))
        a_ss, a_st, a_cross, a_blocked, a_s1, a_spread, a_xs, a_yt, a_ix, a_iy, a_nans = tile_sums(
            x,
            y,
            here,
            keep,
            new_ms[:, :, None],
            new_mt[:, :, None],
            cs[:, :, None],
            ct[:, :, None],
            rho[:, :, None],
            shift[:, None, None],
            SOFT,
            HARD,
            SMOOTH,
            TERMS,
        )
        if SOFT:
            gap = moved(mt, new_mt) - rho * moved(ms, new_ms)
            cross = rescale_moment(cross, st, gap, mt, new_mt, ct) + a_cross
            blocked = tl.maximum(blocked, a_blocked)
        if TERMS:
            xs = rescale_moment(xs, ss, moved(ms, new_ms), ms, new_ms, cs) + a_xs
            yt = rescale_moment(yt, st, moved(mt, new_mt), mt, new_mt, ct) + a_yt
            ix = tl.where(new_ms > ms, a_ix, tl.minimum(ix, a_ix))
            iy = tl.where(new_mt > mt, a_iy, tl.minimum(iy, a_iy))
            nans += a_nans
        if SOFT:
            ss = rescale(ss, ms, new_ms, cs) + a_ss
            st = rescale(st, mt, new_mt, ct) + a_st
        if HARD:
            s1 = rescale(s1, ms, new_ms, c1) + a_s1
        if SMOOTH:
            spread += a_spread
        ms, mt = new_ms, new_mt

    row_ms, row_mt = tl.max(ms, 1), tl.max(mt, 1)
    to_ms, to_mt = row_ms[:, None], row_mt[:, None]
    if SOFT:
        cross = rescale_moment(cross, st, moved(mt, to_mt) - rho * moved(ms, to_ms), mt, to_mt, ct)
    if TERMS:
        xs = rescale_moment(xs, ss, moved(ms, to_ms), ms, to_ms, cs)
        yt = rescale_moment(yt, st, moved(mt, to_mt), mt, to_mt, ct)
        ix = tl.where(ms == to_ms, ix, LAST)
        iy = tl.where(mt == to_mt, iy, LAST)
    if SOFT:
        ss = rescale(ss, ms, to_ms, cs)
        st = rescale(st, mt, to_mt, ct)
    if HARD:
        s1 = rescale(s1, ms, to_ms, c1)
    return (
        row_ms,
        row_mt,
        tl.sum(ss, 1),
        tl.sum(st, 1),
        tl.sum(cross, 1),
        tl.max(blocked, 1),
        tl.sum(s1, 1),
        tl.sum(spread, 1),
        tl.sum(xs, 1),
        tl.sum(yt, 1),
        tl.min(ix, 1),
        tl.min(iy, 1),
        tl.sum(nans, 1),
    )
