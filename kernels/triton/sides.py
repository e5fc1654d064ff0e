"""One side of a row pair: its layout, temperature and transform, reading it, and the way back to its raw logits."""

from typing import NamedTuple

import triton
import triton.language as tl

from .rows import INF, LOG2E, divide, root, row_scalar


class Side(NamedTuple):
    """One side's logits. Per row [ROWS]: start (first element), T, c = log2(e)/T, mean, spread.

    Standardisation takes off the mean and divides by spread = standard deviation + 1e-7.
    """

    ptr: tl.tensor
    start: tl.tensor
    T: tl.tensor
    c: tl.tensor
    scale: tl.tensor
    softcap: tl.tensor
    mean: tl.tensor
    spread: tl.tensor
    SCALED: tl.constexpr
    CAPPED: tl.constexpr
    STANDARD: tl.constexpr


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
        return LOG2E / T.to(tl.float64)
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
    return Side(ptr, start, T, c, scale, softcap, zero, zero + 1.0, SCALED, CAPPED, STANDARD)


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
def read(of, col, keep, EVICT: tl.constexpr):
    """Transformed logits of a tile; -inf where keep is false."""
    x = read_raw(of, col, keep, EVICT)
    if of.STANDARD:
        x = divide(x - of.mean[:, None, None], of.spread[:, None, None])
    return tl.where(keep, x, -INF)


@triton.jit
def label_logit(of, label, wanted):
    """Transformed logit of the label, [ROWS]; meaningless where not wanted (nothing is read there)."""
    x = scale_and_cap(tl.load(of.ptr + of.start + label, mask=wanted, other=0.0).to(of.T.dtype), of)
    if of.STANDARD:
        x = divide(x - of.mean, of.spread)
    return x


@triton.jit
def standardized(of, col, counted, classes, ROWS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """The side with its mean and spread known, and spread/((C-1)*deviation) of `through_transform`."""
    if of.STANDARD:
        total = tl.zeros([ROWS, LANES], of.T.dtype)
        for first in range(0, classes, LANES * VEC):
            keep = counted[:, None, None] & (col + first < classes)
            total += tl.sum(tl.where(keep, read_raw(of, col + first, keep, "evict_last"), 0.0), 2)
        n = tl.full([ROWS], classes, of.T.dtype)
        degrees = tl.maximum(n - 1.0, 1.0)
        mean = divide(tl.sum(total, 1), n)
        square = tl.zeros([ROWS, LANES], of.T.dtype)
        for first in range(0, classes, LANES * VEC):
            keep = counted[:, None, None] & (col + first < classes)
            centred = read_raw(of, col + first, keep, "evict_last") - mean[:, None, None]
            square += tl.sum(tl.where(keep, centred * centred, 0.0), 2)
        deviation = root(divide(tl.sum(square, 1), degrees))
        spread = deviation + 1e-7
        back = tl.where(deviation == 0.0, 0.0, divide(spread, degrees * deviation))
        side = Side(
            of.ptr,
            of.start,
            of.T,
            of.c,
            of.scale,
            of.softcap,
            mean,
            spread,
            of.SCALED,
            of.CAPPED,
            of.STANDARD,
        )
        return side, back
    else:
        return of, of.T


@triton.jit
def through_transform(grad, x, of, middle, drift):
    """Chain rule of the transform from its output x: scale * (1 - (x/softcap)^2), before it that of standardisation.

    middle, drift [ROWS]: the mean of grad over the row, and sum of grad*x times spread/((C-1)*deviation).
    """
    if of.STANDARD:
        grad = (grad - middle[:, None, None]) - x * drift[:, None, None]
        grad = divide(grad, of.spread[:, None, None])
        x = x * of.spread[:, None, None] + of.mean[:, None, None]
    if of.CAPPED:
        z = divide(x, of.softcap)
        grad = grad * (1.0 - z * z)
    if of.SCALED:
        grad = grad * of.scale
    return grad
