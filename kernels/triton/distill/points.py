"""Pointwise divergences of 16-bit logits for `plain`: D = sum_j f(q_j, p_j), gradient q (g - E_q[g]) with g = df/dq.

Of a tile: es, et the exponentials, r = log2 p - log2 q, finite. The mixture m = a p + b q, a + b = 1, is taken relative
to the greater of p and q: so log m is 0 and p/m is 1 where p = q, exactly, and nothing underflows.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..rows.arithmetic import LN2, LOG2E, divide, fast_exp2, fast_log2, fast_reciprocal, fused
from .divergences import JSD, REVERSE, SKEW, SKEW_REVERSE, TVD


class Point(NamedTuple):
    """Per row: ss/st, log2(st/ss), the shares a and b [1], E_q[g] over `slope_unit`. shift: what SKEW takes off p/m
    before its mean: 1, or 0 where that would round it away.
    """

    ratio: tl.tensor
    log_ratio: tl.tensor
    a: tl.tensor
    b: tl.tensor
    mean: tl.tensor
    shift: tl.tensor


@triton.jit
def over_greater(r, n):
    """m and the lesser of p and q, both over the greater."""
    z = fast_exp2(-tl.abs(r))
    lesser = tl.where(r > 0.0, n.b[:, None, None], n.a[:, None, None])
    return fused(lesser, z - 1.0, tl.full([1, 1, 1], 1.0, tl.float32)), z


@triton.jit
def point_slope(es, et, r, n, how):
    """g of a tile, over `slope_unit`."""
    if how.DIVERGENCE == REVERSE:
        return -r
    elif how.DIVERGENCE == TVD:
        d = fused(-et, n.ratio[:, None, None], es)
        return tl.where(d > 0.0, 0.5, tl.where(d < 0.0, -0.5, 0.0))
    else:
        m, z = over_greater(r, n)
        if how.DIVERGENCE == JSD:
            return tl.minimum(-r, 0.0) - fast_log2(m)  # log2 of q/m
        elif how.DIVERGENCE == SKEW:
            return tl.where(r > 0.0, 1.0, z) * fast_reciprocal(m)  # p/m
        else:
            of_q = tl.where(r > 0.0, z, 1.0) * fast_reciprocal(m) - 1.0
            return fused(of_q, -(n.b * LOG2E)[:, None, None], tl.minimum(-r, 0.0) - fast_log2(m))


@triton.jit
def slope_unit(n, how):
    """What `point_slope` leaves out, [1]."""
    if how.DIVERGENCE == TVD:
        return n.b * 0.0 + 1.0
    elif how.DIVERGENCE == JSD:
        return n.b * LN2
    elif how.DIVERGENCE == SKEW:
        return -n.b
    else:
        return n.b * 0.0 + LN2


@triton.jit
def centred_slope(g, n, how):
    """g - E_q[g] of a tile, over `slope_unit`."""
    if how.DIVERGENCE == SKEW:
        g = g - n.shift[:, None, None]
    return g - n.mean[:, None, None]


@triton.jit
def point_sums(es, et, r, n, how):
    """g of a tile, and lane sums: of es*g, of SKEW's es*(g - 1), of what D is made of."""
    g = point_slope(es, et, r, n, how)
    slopes = tl.sum(es * g, 2)
    shifted = slopes
    if how.DIVERGENCE == TVD:
        values = tl.sum(tl.abs(fused(-et, n.ratio[:, None, None], es)), 2)
    else:
        m, _z = over_greater(r, n)
        of_p = tl.minimum(r, 0.0) - fast_log2(m)  # log2 of p/m
        if how.DIVERGENCE == SKEW_REVERSE:
            values = tl.sum(es * (of_p - r), 2)
        else:
            values = tl.sum(et * of_p, 2)
        if how.DIVERGENCE == SKEW:
            shifted = tl.sum(es * (g - 1.0), 2)
    return g, slopes, shifted, values


@triton.jit
def point_value(slopes, shifted, values, ss, st, n, how):
    """D, and mean and shift of `Point`, from the sums of rows."""
    mean, shift = divide(slopes, ss), n.shift
    if how.DIVERGENCE == TVD:
        value = 0.5 * divide(values, ss)
    elif how.DIVERGENCE == JSD:
        value = (n.a * divide(values, st) + n.b * mean) * LN2
    elif how.DIVERGENCE == SKEW:
        value = divide(values, st) * LN2
        shift = tl.where(mean < 0.5, 0.0, 1.0)
        mean = tl.where(mean < 0.5, mean, divide(shifted, ss))
    else:
        value = divide(values, ss) * LN2
    return value, mean, shift
