"""distill_loss of rows as they mostly are: one teacher, logits without a transform, float32 arithmetic, all finite.

Nothing in the loops looks out for -inf or NaN, for the label or for a mask but in the last tile. What is not finite
shows in the sums of its row, and a program with such a row does all of its rows again on the road of `scalar`, with a
tile that needs few registers. Logits below `LOW`, which fills up the last tile, go the same way.

16-bit logits (without EXACT) are compared as powers of two, u = x*cs - max; float32 logits by their differences from
the maximum and exponentials whose argument is exact.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..rows.arithmetic import (
    INF,
    LN2,
    LOG2E,
    columns,
    divide,
    fast_exp2,
    fast_log2,
    fused,
    log_ratio,
)
from ..rows.sides import place, row_start, row_temperature
from ..rows.structs import NUMBERS, LossNumbers, Numbers
from .divergences import FORWARD, REVERSE
from .gradients import split_ratio
from .points import Point, centred_slope, point_slope, point_sums, point_value, slope_unit
from .scalar import general_rows, row_losses

# What stands for the columns beyond the last one: exponentials of it are 0, differences from it finite.
LOW = tl.constexpr(-1e30)
# Tiles that share a look at the maxima.
PARTS = tl.constexpr(2)


class Pair(NamedTuple):
    """Both sides of the rows of a program: addresses, first elements and temperatures [ROWS], and log2(e)/T as a
    float32 and what that leaves out (0 without EXACT). rho = Tt/Ts.
    """

    x_ptr: tl.tensor
    x_start: tl.tensor
    y_ptr: tl.tensor
    y_start: tl.tensor
    Ts: tl.tensor
    Tt: tl.tensor
    cs: tl.tensor
    cs_low: tl.tensor
    ct: tl.tensor
    ct_low: tl.tensor
    rho: tl.tensor


class Lanes(NamedTuple):
    """Maxima and sums relative to them, per lane or per row: ss, st of es, et; cross: of et*gap, with REVERSE of
    es*gap; s1: of exp(x - max x); spread: of x - shift.
    """

    ms: tl.tensor
    mt: tl.tensor
    ss: tl.tensor
    st: tl.tensor
    cross: tl.tensor
    s1: tl.tensor
    spread: tl.tensor


class PlainTerms(NamedTuple):
    """What `row_losses` takes."""

    soft: tl.tensor
    at_one: tl.tensor
    hard: tl.tensor
    p1: tl.tensor


class PlainSlopes(NamedTuple):
    """The gradient is (es - et*ratio - et*rest)*soft + exp(x - max x)*hard - even, and at the label less `label`."""

    ratio: tl.tensor
    rest: tl.tensor
    soft: tl.tensor
    hard: tl.tensor
    even: tl.tensor
    label: tl.tensor


@triton.jit
def per_temperature_pair(T, EXACT: tl.constexpr):
    """log2(e)/T as the sum of two float32; without EXACT the second is 0."""
    if EXACT:
        c = tl.full(T.shape, LOG2E, tl.float64) / T.to(tl.float64)
        high = c.to(tl.float32)
        return high, (c - high.to(tl.float64)).to(tl.float32)
    else:
        return divide(tl.full(T.shape, LOG2E, T.dtype), T), tl.zeros_like(T)


@triton.jit
def pair_of(p, s_numbers, t_numbers, at, how):
    """`Pair` of the rows at ``at``."""
    x_start = row_start(at.row, s_numbers.inner, s_numbers.outer, s_numbers.row, p.student.FLAT, p.student.UNIT)
    y_start = row_start(at.row, t_numbers.inner, t_numbers.outer, t_numbers.row, p.teacher.FLAT, p.teacher.UNIT)
    Ts = row_temperature(p.student, s_numbers, at, how)
    Tt = row_temperature(p.teacher, t_numbers, at, how)
    cs, cs_low = per_temperature_pair(Ts, how.EXACT)
    ct, ct_low = per_temperature_pair(Tt, how.EXACT)
    return Pair(p.student.ptr, x_start, p.teacher.ptr, y_start, Ts, Tt, cs, cs_low, ct, ct_low, divide(Tt, Ts))


@triton.jit
def read_plain(ptr, start, col, keep, EVICT: tl.constexpr):
    """Logits of a tile, `LOW` where keep is false; keep None: all."""
    at = ptr + start[:, None, None] + col
    if keep is None:
        return tl.load(at, eviction_policy=EVICT).to(tl.float32)
    else:
        x = tl.load(at, mask=keep, other=0.0, eviction_policy=EVICT).to(tl.float32)
        return tl.where(keep, x, LOW)


@triton.jit
def plain_power(x, m, c, c_low, EXACT: tl.constexpr):
    """2**((x - m)*(c + c_low)) for x <= m. With EXACT the rounding of the product is put right."""
    if EXACT:
        d = x - m
        a = d * c
        e = fast_exp2(a)
        return fused(e, fused(d, c_low, fused(d, c, -a)) * LN2, e)
    else:
        return fast_exp2(fused(x, c, -(m * c)))


@triton.jit
def plain_gap(x, ms, y, mt, k, how):
    """log p - log q, but for what a row has in common: times Tt with EXACT, else as a binary logarithm."""
    if how.EXACT:
        return (y - mt) - (x - ms) * wide(k.rho)
    else:
        ct, cs = wide(k.ct), wide(k.cs)
        return fused(y, ct, -(mt * ct)) - fused(x, cs, -(ms * cs))


@triton.jit
def wide(row_values):
    """[ROWS] as [ROWS, 1, 1]."""
    return row_values[:, None, None]


@triton.jit
def exponentials(x, y, ms, mt, k, how):
    """es and et of a tile."""
    es = plain_power(x, ms, wide(k.cs), wide(k.cs_low), how.EXACT)
    return es, plain_power(y, mt, wide(k.ct), wide(k.ct_low), how.EXACT)


@triton.jit
def at_one(x, m, how):
    """exp(x - m)."""
    one = tl.full([1, 1, 1], LOG2E, tl.float32)
    low = tl.full([1, 1, 1], 1.9259629911266175e-08, tl.float32)  # log2(e) - float32(log2(e))
    return plain_power(x, m, one, low, how.EXACT)


@triton.jit
def move(v, to_ms, to_mt, k, how):
    """Lanes relative to other maxima."""
    ms, mt, x_to, y_to = v.ms[:, :, None], v.mt[:, :, None], to_ms[:, :, None], to_mt[:, :, None]
    es, et = exponentials(ms, mt, x_to, y_to, k, how)
    gap = plain_gap(ms, x_to, mt, y_to, k, how)
    s1 = v.s1
    if how.HARD:
        s1 = s1 * tl.sum(at_one(ms, x_to, how), 2)
    ws, wt, shift, cross = tl.sum(es, 2), tl.sum(et, 2), tl.sum(gap, 2), v.cross
    if how.DIVERGENCE == FORWARD:
        cross = wt * (cross + v.st * shift)
    elif how.DIVERGENCE == REVERSE:
        cross = ws * (cross + v.ss * shift)
    return Lanes(to_ms, to_mt, v.ss * ws, v.st * wt, cross, s1, v.spread)


@triton.jit
def add_tile(v, x, y, es, et, keep, shift, k, how):
    """Lanes with a tile added, whose exponentials are relative to the maxima of ``v``."""
    cross, s1, spread = v.cross, v.s1, v.spread
    if how.DIVERGENCE == FORWARD:
        cross = cross + tl.sum(et * plain_gap(x, v.ms[:, :, None], y, v.mt[:, :, None], k, how), 2)
    elif how.DIVERGENCE == REVERSE:
        cross = cross + tl.sum(es * plain_gap(x, v.ms[:, :, None], y, v.mt[:, :, None], k, how), 2)
    if how.HARD:
        s1 = s1 + tl.sum(at_one(x, v.ms[:, :, None], how), 2)
    if how.SMOOTH:
        off = x - wide(shift)
        if keep is not None:
            off = tl.where(keep, off, 0.0)
        spread = spread + tl.sum(off, 2)
    return Lanes(v.ms, v.mt, v.ss + tl.sum(es, 2), v.st + tl.sum(et, 2), cross, s1, spread)


@triton.jit
def no_lanes(SHAPE: tl.constexpr):
    """Sums of nothing."""
    none = tl.zeros(SHAPE, tl.float32)
    return Lanes(none + LOW, none + LOW, none, none, none, none, none)


@triton.jit
def over_lanes(v, k, how):
    """Lanes of whole rows, [ROWS]."""
    ms, mt = tl.max(v.ms, 1), tl.max(v.mt, 1)
    none = tl.zeros_like(v.ms)
    v = move(v, ms[:, None] + none, mt[:, None] + none, k, how)
    sums = (tl.sum(v.ss, 1), tl.sum(v.st, 1), tl.sum(v.cross, 1), tl.sum(v.s1, 1), tl.sum(v.spread, 1))
    return Lanes(ms, mt, *sums)


@triton.jit
def held_rows(x, y, ms, mt, es, et, keep, shift, k, how):
    """Lanes of rows that a tile holds, [ROWS]."""
    none = tl.zeros([how.ROWS, how.LANES], tl.float32)
    v = Lanes(none + ms[:, None], none + mt[:, None], none, none, none, none, none)
    v = add_tile(v, x, y, es, et, keep, shift, k, how)
    sums = (tl.sum(v.ss, 1), tl.sum(v.st, 1), tl.sum(v.cross, 1), tl.sum(v.s1, 1), tl.sum(v.spread, 1))
    return Lanes(ms, mt, *sums)


@triton.jit
def stream_tiles(v, first, last, k, at, col, shift, PARTS: tl.constexpr, how):
    """Lanes with the columns from ``first`` to ``last`` added, PARTS tiles at a time; 0: one with a mask."""
    BLOCK: tl.constexpr = how.LANES * how.VEC
    WHOLE: tl.constexpr = PARTS > 0
    for start in range(first, last, BLOCK * PARTS if WHOLE else BLOCK):
        to_ms, to_mt, xs, ys = v.ms, v.mt, (), ()
        keep = None
        if not WHOLE:
            keep = at.counted[:, None, None] & (col + start < at.classes)
        for part in tl.static_range(PARTS if WHOLE else 1):
            x = read_plain(k.x_ptr, k.x_start, col + start + part * BLOCK, keep, "evict_last")
            y = read_plain(k.y_ptr, k.y_start, col + start + part * BLOCK, keep, "evict_last")
            to_ms, to_mt = tl.maximum(to_ms, tl.max(x, 2)), tl.maximum(to_mt, tl.max(y, 2))
            xs, ys = xs + (x,), ys + (y,)
        v = move(v, to_ms, to_mt, k, how)
        for part in tl.static_range(PARTS if WHOLE else 1):
            es, et = exponentials(xs[part], ys[part], v.ms[:, :, None], v.mt[:, :, None], k, how)
            v = add_tile(v, xs[part], ys[part], es, et, keep, shift, k, how)
    return v


@triton.jit
def stream_rows(k, at, col, shift, how):
    """Lanes of rows longer than a tile, [ROWS]; a program has one row."""
    BLOCK: tl.constexpr = how.LANES * how.VEC
    there = tl.max(tl.where(at.counted, at.classes, 0), 0)
    several, whole = there // (BLOCK * PARTS) * (BLOCK * PARTS), there // BLOCK * BLOCK
    v = no_lanes([how.ROWS, how.LANES])
    v = stream_tiles(v, 0, several, k, at, col, shift, PARTS, how)
    v = stream_tiles(v, several, whole, k, at, col, shift, 1, how)
    v = stream_tiles(v, whole, at.classes, k, at, col, shift, 0, how)
    return over_lanes(v, k, how)


@triton.jit
def read_label(ptr, start, at):
    """Logit of the label, [ROWS]; 0 where the row is not counted."""
    return tl.load(ptr + start + at.label, mask=at.counted, other=0.0).to(tl.float32)


@triton.jit
def log_quotient(x, y, v, n, k, how):
    """r of a tile, log2 p - log2 q."""
    return plain_gap(x, wide(v.ms), y, wide(v.mt), k, how) - wide(n.log_ratio)


@triton.jit
def stream_points(slopes, shifted, values, first, last, v, n, k, at, col, WHOLE: tl.constexpr, how):
    """The sums of `point_sums` with columns from ``first`` to ``last`` added; WHOLE: no tile of them needs a mask."""
    for start in range(first, last, how.LANES * how.VEC):
        here = col + start
        keep = None
        if not WHOLE:
            keep = at.counted[:, None, None] & (here < at.classes)
        x = read_plain(k.x_ptr, k.x_start, here, keep, "evict_last")
        y = read_plain(k.y_ptr, k.y_start, here, keep, "evict_last")
        es, et = exponentials(x, y, wide(v.ms), wide(v.mt), k, how)
        _g, slope, shift, value = point_sums(es, et, log_quotient(x, y, v, n, k, how), n, how)
        slopes, shifted, values = slopes + slope, shifted + shift, values + value
    return slopes, shifted, values


@triton.jit
def look_again(x, y, es, et, v, n, k, at, col, how):
    """D, mean and shift of `Point` by one more look at the rows, and without LOOP the tile of g."""
    if how.DIVERGENCE == REVERSE:  # E_q[-r] is known
        g = es
        if not how.LOOP:
            g = -log_quotient(x, y, v, n, k, how)
        mean = n.log_ratio - divide(v.cross, v.ss)
        return mean * LN2, mean, n.shift, g
    else:
        none = tl.zeros([how.ROWS, how.LANES], tl.float32)
        g, slopes, shifted, values = es, none, none, none
        if how.LOOP:
            BLOCK: tl.constexpr = how.LANES * how.VEC
            whole = tl.max(tl.where(at.counted, at.classes, 0), 0) // BLOCK * BLOCK
            slopes, shifted, values = stream_points(none, none, none, 0, whole, v, n, k, at, col, True, how)
            slopes, shifted, values = stream_points(
                slopes, shifted, values, whole, at.classes, v, n, k, at, col, False, how
            )
        else:
            g, slopes, shifted, values = point_sums(es, et, log_quotient(x, y, v, n, k, how), n, how)
        value, mean, shift = point_value(tl.sum(slopes, 1), tl.sum(shifted, 1), tl.sum(values, 1), v.ss, v.st, n, how)
        return value, mean, shift, g


@triton.jit
def online_value(v, k, how):
    """KL(p||q) = E_p[v-u] - log st + log ss."""
    soft = divide(v.cross, v.st)
    if how.EXACT:
        return divide(soft, k.Tt) + log_ratio(v.ss, v.st, divide(v.ss, v.st))
    else:
        return (soft + fast_log2(divide(v.ss, v.st))) * LN2


@triton.jit
def is_plain(v, soft, at):
    """Whether all of a program's rows are as this road wants them."""
    fine = (v.ms > LOW * 0.1) & (v.mt > LOW * 0.1) & (soft - soft == 0.0) & (at.bad == 0)
    return tl.min(tl.where(at.counted & (fine == 0), 0, 1), 0) > 0


@triton.jit
def terms(v, soft, at, x_label, smoothing, how):
    """`Terms` of the rows: D, at least 0, and the cross-entropy of the labels."""
    none = tl.zeros_like(v.ms)
    hard = none
    if how.HARD:
        log_s1 = tl.log(v.s1) if how.EXACT else fast_log2(v.s1) * LN2
        hard = log_s1 - (x_label - v.ms)
        if how.SMOOTH:
            hard = hard - (none + smoothing).to(tl.float32) * divide(v.spread, none + at.classes)
    return PlainTerms(tl.where(soft < 0.0, 0.0, soft), none, hard, none)


@triton.jit
def slopes_of(v, n, slope, hard_share, smoothing, classes, how):
    """`PlainSlopes` of the rows."""
    if how.DIVERGENCE >= REVERSE:
        slope = slope * slope_unit(n, how)
    ratio, rest = divide(v.ss, v.st), tl.zeros_like(v.ss)
    if how.EXACT:
        ratio, rest = split_ratio(v.ss, v.st)
    hard, even, label = rest, rest, rest
    if how.HARD:
        n_classes = tl.zeros_like(rest) + classes
        eps = (tl.zeros_like(rest) + smoothing).to(tl.float32)
        hard, even = divide(hard_share, v.s1), divide(hard_share * eps, n_classes)
        label = hard_share * (1.0 - eps * divide(n_classes - 1.0, n_classes)) - even
    return PlainSlopes(ratio, rest, divide(slope, v.ss), hard, even, label)


@triton.jit
def gradient(x, es, other, ms, of, n, how):
    """That of a tile, but for the label; ``other``: et or, of the pointwise divergences, g."""
    if how.DIVERGENCE >= REVERSE:
        grad = es * centred_slope(other, n, how)
    else:
        grad = fused(-other, wide(of.ratio), es)
        if how.EXACT:
            grad = fused(-other, wide(of.rest), grad)
    grad = grad * wide(of.soft)
    if how.HARD:
        grad = fused(at_one(x, wide(ms), how), wide(of.hard), grad)
        if how.SMOOTH:
            grad = grad - wide(of.even)
    return grad


@triton.jit
def gradient_at(x, y, v, of, n, k, how):
    """That of a tile of logits."""
    es, et = exponentials(x, y, wide(v.ms), wide(v.mt), k, how)
    other = et
    if how.DIVERGENCE >= REVERSE:
        other = point_slope(es, et, log_quotient(x, y, v, n, k, how), n, how)
    return gradient(x, es, other, v.ms, of, n, how)


@triton.jit
def stream_gradient(to, first, n_tiles, v, of, n, k, at, col, width, WHOLE: tl.constexpr, how):
    """``n_tiles`` tiles from column ``first`` on, from the last to the first; WHOLE: none of them needs a mask."""
    for tile in range(n_tiles):
        here = col + first + (n_tiles - 1 - tile) * (how.LANES * how.VEC)
        keep = None
        if not WHOLE:
            keep = at.counted[:, None, None] & (here < at.classes)
        x = read_plain(k.x_ptr, k.x_start, here, keep, "evict_first")
        y = read_plain(k.y_ptr, k.y_start, here, keep, "evict_first")
        grad = gradient_at(x, y, v, of, n, k, how)
        if WHOLE:
            tl.store(to + here, grad)
        else:
            tl.store(to + here, tl.where(keep, grad, 0.0), mask=wide(at.exists) & (here < width))


@triton.jit
def write_rows(grad_ptr, x, es, other, v, of, n, k, at, col, width, how):
    """The student's gradient [N, width]; without LOOP x, es, other are tiles of whole rows."""
    BLOCK: tl.constexpr = how.LANES * how.VEC
    to = grad_ptr + wide(at.row * width)
    if how.LOOP:
        whole = tl.max(tl.where(at.counted, at.classes, 0), 0) // BLOCK
        n_rest = (width - whole * BLOCK + BLOCK - 1) // BLOCK
        stream_gradient(to, whole * BLOCK, n_rest, v, of, n, k, at, col, width, False, how)
        stream_gradient(to, 0, whole, v, of, n, k, at, col, width, True, how)
    else:
        keep = wide(at.counted) & (col < at.classes)
        grad = tl.where(keep, gradient(x, es, other, v.ms, of, n, how), 0.0)
        tl.store(to + col, grad, mask=wide(at.exists) & (col < width))
    if how.HARD:
        tl.debug_barrier()  # whole vectors first, then the labels among them
        x, y = wide(read_label(k.x_ptr, k.x_start, at)), wide(read_label(k.y_ptr, k.y_start, at))
        grad = gradient_at(x, y, v, of, n, k, how) - wide(of.label)
        tl.store(to + wide(at.label), grad, mask=wide(at.counted))


@triton.jit(do_not_specialize=NUMBERS)
def plain_scalar(
    p,
    loss,
    how,
    careful,
    temperature: tl.float64,
    teacher_temperature: tl.float64,
    soft_weight: tl.float64,
    hard_weight: tl.float64,
    normalizer: tl.float64,
    smoothing: tl.float64,
    a: tl.float64,
    b: tl.float64,
    n_rows: tl.int64,
    n_counts: tl.int64,
    ignore_index: tl.int64,
    classes: tl.int32,
    width: tl.int32,
    s_inner: tl.int64,
    s_outer: tl.int64,
    s_row: tl.int64,
    t_inner: tl.int64,
    t_outer: tl.int64,
    t_row: tl.int64,
):
    """What `distill_scalar` does; ``careful``: its tile."""
    pid = tl.program_id(0).to(tl.int64)
    classes, width = classes * p.student.UNIT, width * p.student.UNIT
    at = place(p, pid * how.ROWS + tl.arange(0, how.ROWS), n_rows, ignore_index, classes, how)
    s_numbers = Numbers(temperature, 1.0, 1.0, s_inner, s_outer, s_row)
    t_numbers = Numbers(teacher_temperature, 1.0, 1.0, t_inner, t_outer, t_row)
    numbers = LossNumbers(soft_weight, hard_weight, normalizer, n_counts)
    k = pair_of(p, s_numbers, t_numbers, at, how)
    col = columns(how)
    x_label = tl.zeros_like(k.Ts)
    if how.HARD:
        x_label = read_label(k.x_ptr, k.x_start, at)
    shift = tl.where(tl.abs(x_label) < INF, x_label, 0.0)
    x, y, es, et = wide(x_label), wide(x_label), wide(x_label), wide(x_label)
    if how.LOOP:
        v = stream_rows(k, at, col, shift, how)
    else:
        keep = wide(at.counted) & (col < classes)
        x = read_plain(k.x_ptr, k.x_start, col, keep, "evict_first")
        y = read_plain(k.y_ptr, k.y_start, col, keep, "evict_first")
        ms, mt = tl.max(tl.max(x, 2), 1), tl.max(tl.max(y, 2), 1)
        es, et = exponentials(x, y, wide(ms), wide(mt), k, how)
        v = held_rows(x, y, ms, mt, es, et, keep, shift, k, how)
    ratio = divide(v.ss, v.st)
    shares = (tl.full([1], a, tl.float32), tl.full([1], b, tl.float32))
    n = Point(ratio, ratio, *shares, ratio, ratio)
    other = et
    if how.DIVERGENCE >= REVERSE:
        n = Point(ratio, fast_log2(divide(v.st, v.ss)), *shares, ratio, ratio)
        soft, mean, off, other = look_again(x, y, es, et, v, n, k, at, col, how)
        n = Point(ratio, n.log_ratio, *shares, mean, off)
    else:
        soft = online_value(v, k, how)
    if is_plain(v, soft, at):
        t = terms(v, soft, at, x_label, smoothing, how)
        total, slope, hard_share, _at_one = row_losses(t, k.Ts, loss, numbers, at, how)
        tl.store(loss.partial_ptr + pid, tl.sum(total, 0))
        if loss.grad_ptr is not None:
            of = slopes_of(v, n, slope, hard_share, smoothing, classes, how)
            write_rows(loss.grad_ptr, x, es, other, v, of, n, k, at, col, width, how)
    else:
        general_rows(
            p, loss, s_numbers, t_numbers, numbers, smoothing, a, b, pid, n_rows, ignore_index, classes, width, careful
        )
