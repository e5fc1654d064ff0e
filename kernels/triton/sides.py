"""One side of a row pair: its layout, temperature and transform, reading it, and the way back to its raw logits."""

from typing import NamedTuple

import triton
import triton.language as tl

from .rows import INF, LOG2E, divide, finite_max, power, rescale, root, row_scalar, valid_sum

STANDARD_EPS = tl.constexpr(1e-7)  # beside the standard deviation


class Side(NamedTuple):
    """One side's logits. Per row [ROWS]: start (first element), T, c = log2(e)/T, mean, spread, off.

    Standardisation takes off the mean and divides by spread = standard deviation + 1e-7; off is the mean of what comes
    of it, not 0 as the mean that is taken off is rounded. parts: None, or the teachers whose mixture this side is.
    """

    ptr: tl.tensor
    start: tl.tensor
    T: tl.tensor
    c: tl.tensor
    scale: tl.tensor
    softcap: tl.tensor
    mean: tl.tensor
    spread: tl.tensor
    off: tl.tensor
    SCALED: tl.constexpr
    CAPPED: tl.constexpr
    STANDARD: tl.constexpr
    parts: tl.tuple


class Part(NamedTuple):
    """One of several teachers. Per row: the maximum, log sum exp((y - max)/T), the same at T = 1 if asked for, the
    logarithm of its weight, and what `standardized` says of its drift.
    """

    side: Side
    top: tl.tensor
    log_sum: tl.tensor
    log_sum_at_one: tl.tensor
    log_weight: tl.tensor
    back: tl.tensor


@triton.jit
def tanh(z):
    """tanh by Lambert's continued fraction (9 terms, exact to float64 for |z| < 0.6), else by the exponential."""
    w = z * z
    over = 34459425.0 + w * (4729725.0 + w * (135135.0 + w * (990.0 + w)))
    under = 34459425.0 + w * (16216200.0 + w * (945945.0 + w * (13860.0 + w * 45.0)))
    e = tl.exp2(tl.abs(z) * (-2.0 * LOG2E))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(w < 0.36, z * (over / under), tl.where(z < 0, -large, large))


@triton.jit
def per_temperature(T, EXACT: tl.constexpr):
    """log2(e)/T, the c of `power`: float64 where the exponentials are to be exact."""
    if EXACT:
        return tl.full(T.shape, LOG2E, tl.float64) / T.to(tl.float64)
    else:
        return divide(tl.full(T.shape, LOG2E, T.dtype), T)


@triton.jit
def row_start(row, inner, outer_stride, row_stride, FLAT: tl.constexpr, UNIT: tl.constexpr):
    """First element of each row, int64. Strides come divided by UNIT, so that the compiler sees the alignment."""
    if FLAT:
        return row * row_stride * UNIT
    else:
        return ((row // inner) * outer_stride + (row % inner) * row_stride) * UNIT


@triton.jit
def side(
    ptr,
    row,
    exists,
    inner,
    outer_stride,
    row_stride,
    value,
    value_ptr,
    scale,
    softcap,
    UNIT: tl.constexpr,
    FLAT: tl.constexpr,
    STEP: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    STANDARD: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The side whose temperature is ``value`` or in ``value_ptr``; not standardised yet."""
    start = row_start(row, inner, outer_stride, row_stride, FLAT, UNIT)
    T = row_scalar(value, value_ptr, row, exists, STEP, ROWS, DTYPE)
    scale = tl.full([1], scale, DTYPE)
    softcap = tl.full([1], softcap, DTYPE)
    zero = tl.zeros([ROWS], DTYPE)
    c = per_temperature(T, EXACT)
    return Side(ptr, start, T, c, scale, softcap, zero, zero + 1.0, zero, SCALED, CAPPED, STANDARD, None)


@triton.jit
def scale_and_cap(x, of):
    if of.SCALED:
        x = x * of.scale
    if of.CAPPED:
        x = of.softcap * tanh(divide(x, of.softcap))
    return x


@triton.jit
def read_raw(of, col, keep, EVICT: tl.constexpr):
    """Logits of a tile before standardisation; 0 where keep is false (nothing is read there)."""
    x = tl.load(of.ptr + of.start[:, None, None] + col, mask=keep, other=0.0, eviction_policy=EVICT)
    return scale_and_cap(x.to(of.T.dtype), of)


@triton.jit
def read_one(of, col, keep, EVICT: tl.constexpr):
    """Transformed logits of a tile of a side that is no mixture; -inf where keep is false."""
    x = read_raw(of, col, keep, EVICT)
    if of.STANDARD:
        x = divide(x - of.mean[:, None, None], of.spread[:, None, None])
    return tl.where(keep, x, -INF)


@triton.jit
def part_log_prob(part, col, keep, EVICT: tl.constexpr):
    """log softmax(y/T) of one of several teachers."""
    y = read_one(part.side, col, keep, EVICT)
    of_top = divide(y - finite_max(part.top)[:, None, None], part.side.T[:, None, None])
    return of_top - part.log_sum[:, None, None]


@triton.jit
def log_mixture(of, col, keep, EVICT: tl.constexpr):
    """log sum_k weight_k softmax(y_k/T) of a tile."""
    top = tl.where(keep, -INF, -INF).to(of.T.dtype)
    total = tl.zeros_like(top)
    for k in tl.static_range(len(of.parts)):
        log_p = part_log_prob(of.parts[k], col, keep, EVICT) + of.parts[k].log_weight[:, None, None]
        higher = tl.maximum(top, log_p)
        shift = finite_max(higher)
        total = total * tl.exp(top - shift) + tl.exp(log_p - shift)
        top = higher
    return tl.where(total == 0.0, -INF, top + tl.log(total))


@triton.jit
def read(of, col, keep, EVICT: tl.constexpr):
    """Transformed logits of a tile, -inf where keep is false. A mixture p reads as the logits T log p."""
    if of.parts is None:
        return read_one(of, col, keep, EVICT)
    else:
        return log_mixture(of, col, keep, EVICT) * of.T[:, None, None]


@triton.jit
def label_logit(of, label, wanted):
    """Transformed logit of the label, [ROWS]; meaningless where not wanted (nothing is read there)."""
    x = read(of, label[:, None, None], wanted[:, None, None], "evict_last")
    return tl.sum(tl.sum(x, 2), 1)


@triton.jit
def is_pair(spread, classes):
    """Whether a standardised row is that of two different numbers."""
    return (classes == 2) & (spread > STANDARD_EPS)


@triton.jit
def standardized(of, col, counted, classes, ROWS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """The side with its mean and spread known, and the factor of `through_transform`'s drift."""
    if of.STANDARD:
        total = tl.zeros([ROWS, LANES], of.T.dtype)
        for first in range(0, classes, LANES * VEC):
            keep = counted[:, None, None] & (col + first < classes)
            total += tl.sum(tl.where(keep, read_raw(of, col + first, keep, "evict_last"), 0.0), 2)
        n = tl.full([ROWS], classes, of.T.dtype)
        degrees = tl.maximum(n - 1.0, 1.0)
        mean = divide(tl.sum(total, 1), n)
        square = tl.zeros([ROWS, LANES], of.T.dtype)
        rest = tl.zeros([ROWS, LANES], of.T.dtype)
        for first in range(0, classes, LANES * VEC):
            keep = counted[:, None, None] & (col + first < classes)
            centred = tl.where(keep, read_raw(of, col + first, keep, "evict_last") - mean[:, None, None], 0.0)
            square += tl.sum(centred * centred, 2)
            rest += tl.sum(centred, 2)
        off = divide(tl.sum(rest, 1), n)
        variance = divide(tl.sum(square, 1) - n * off * off, degrees)
        deviation = root(tl.where(variance < 0.0, 0.0, variance))
        spread = deviation + STANDARD_EPS
        of_two = -divide(spread * STANDARD_EPS, deviation * deviation)
        back = tl.where(is_pair(spread, classes), of_two, divide(spread, degrees * deviation))
        back = tl.where(deviation == 0.0, 0.0, back)
        side = Side(
            of.ptr,
            of.start,
            of.T,
            of.c,
            of.scale,
            of.softcap,
            mean,
            spread,
            divide(off, spread),
            of.SCALED,
            of.CAPPED,
            of.STANDARD,
            of.parts,
        )
        return side, back
    else:
        return of, of.T


@triton.jit
def through_transform(grad, x, of, middle, drift, classes):
    """Chain rule of the transform from its output x: scale * (1 - (x/softcap)^2), before it that of standardisation.

    middle, drift [ROWS]: the mean of grad over the row, and sum of grad*x times spread/((C-1)*deviation). Two classes
    standardise to the same two numbers but for the 1e-7 in spread = deviation + 1e-7: all that is left of
    (grad - middle) - x*drift is x * sum of grad*x * 1e-7*spread/deviation^2.
    """
    if of.STANDARD:
        centred = grad - middle[:, None, None]
        centred = tl.where(is_pair(of.spread, classes)[:, None, None], 0.0, centred)
        grad = divide(centred - (x - of.off[:, None, None]) * drift[:, None, None], of.spread[:, None, None])
        x = x * of.spread[:, None, None] + of.mean[:, None, None]
    if of.CAPPED:
        z = divide(x, of.softcap)
        grad = grad * (1.0 - z * z)
    if of.SCALED:
        grad = grad * of.scale
    return grad


@triton.jit
def part(
    of,
    weight,
    col,
    counted,
    classes,
    AT_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """The teacher ``of`` with its softmax sums, from one read of the row beside those that standardise it."""
    of, back = standardized(of, col, counted, classes, ROWS, LANES, VEC)
    top = tl.full([ROWS, LANES], -INF, of.T.dtype)
    total = tl.zeros([ROWS, LANES], of.T.dtype)
    at_one = total
    c1 = tl.full([1, 1], LOG2E, of.c.dtype)
    for first in range(0, classes, LANES * VEC):
        keep = counted[:, None, None] & (col + first < classes)
        y = read_one(of, col + first, keep, "evict_last")
        higher = tl.maximum(top, tl.max(y, 2))
        from_top = y - finite_max(higher)[:, :, None]
        total = rescale(total, top, higher, of.c[:, None]) + tl.sum(power(from_top, of.c[:, None, None]), 2)
        if AT_ONE:
            at_one = rescale(at_one, top, higher, c1) + tl.sum(power(from_top, c1[:, :, None]), 2)
        top = higher
    row_top = tl.max(top, 1)
    total = tl.sum(rescale(total, top, row_top[:, None], of.c[:, None]), 1)
    at_one = tl.sum(rescale(at_one, top, row_top[:, None], c1), 1)
    return Part(of, row_top, tl.log(valid_sum(total)), tl.log(valid_sum(at_one)), tl.log(weight), back)


@triton.jit
def teacher_side(
    first,
    ptrs,
    inner,
    outer_stride,
    row_stride,
    weights_ptr,
    row,
    exists,
    col,
    counted,
    classes,
    UNIT: tl.constexpr,
    WEIGHTS_PER_ROW: tl.constexpr,
    AT_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """`standardized` of the side ``first``; or, with further teachers in ``ptrs``, the mixture of all of them."""
    if ptrs is None:
        return standardized(first, col, counted, classes, ROWS, LANES, VEC)
    else:
        N: tl.constexpr = len(ptrs) + 1
        dtype: tl.constexpr = first.T.dtype
        parts = ()
        for k in tl.static_range(N):
            one = first
            if k > 0:
                start = row_start(row, inner[k - 1], outer_stride[k - 1], row_stride[k - 1], False, UNIT)
                one = Side(
                    ptrs[k - 1],
                    start,
                    first.T,
                    first.c,
                    first.scale,
                    first.softcap,
                    first.mean,
                    first.spread,
                    first.off,
                    first.SCALED,
                    first.CAPPED,
                    first.STANDARD,
                    None,
                )
            weight = tl.full([ROWS], 1.0 / N, dtype)
            if weights_ptr is not None:
                at = row * N + k if WEIGHTS_PER_ROW else row * 0 + k
                weight = tl.load(weights_ptr + at, mask=exists, other=1.0).to(dtype)
            parts = parts + (part(one, weight, col, counted, classes, AT_ONE, ROWS, LANES, VEC),)
        mixture = Side(
            first.ptr,
            first.start,
            first.T,
            first.c,
            first.scale,
            first.softcap,
            first.mean,
            first.spread,
            first.off,
            first.SCALED,
            first.CAPPED,
            first.STANDARD,
            parts,
        )
        return mixture, first.T


@triton.jit
def part_prob_at_one(part, y):
    """softmax(y) of one of several teachers at temperature 1."""
    return tl.exp((y - finite_max(part.top)[:, None, None]) - part.log_sum_at_one[:, None, None])


@triton.jit
def label_prob_at_one(of, label, counted):
    """sum_k weight_k softmax(y_k) of the label, [ROWS]."""
    total = tl.zeros_like(of.T)
    for k in tl.static_range(len(of.parts)):
        y = label_logit(of.parts[k].side, label, counted)
        p = tl.exp((y - finite_max(of.parts[k].top)) - of.parts[k].log_sum_at_one)
        total += tl.where(counted, tl.exp(of.parts[k].log_weight) * p, 0.0)
    return total
