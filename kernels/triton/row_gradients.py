"""Gradients of the row losses with respect to the logits, one tile [ROWS, LANES, VEC] at a time."""

import triton
import triton.language as tl

from .rows import LOG2E, divide, finite_max, power, through_transform


@triton.jit
def student_gradient(
    x,
    y,
    here,
    ms,
    mt,
    cs,
    ct,
    q_factor,
    ratio,
    ratio_rest,
    q1_factor,
    label,
    label_share,
    even_share,
    scale,
    softcap,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """(es - et*ratio)*q_factor + e1*q1_factor - (label_share at the label, else even_share), through the transform.

    The factors are [ROWS] and hold the upstream gradient, 1/Ts and the reciprocals of the sums of exponentials;
    ratio + ratio_rest = sum es / sum et.
    """
    dx = x - finite_max(ms)[:, None, None]
    grad = dx * 0.0
    if SOFT:
        dy = y - finite_max(mt)[:, None, None]
        es = power(dx, cs[:, None, None])
        et = power(dy, ct[:, None, None])
        grad = ((es - et * ratio[:, None, None]) - et * ratio_rest[:, None, None]) * q_factor[:, None, None]
    if HARD:
        hard = power(dx, tl.full([1, 1, 1], LOG2E, cs.dtype)) * q1_factor[:, None, None]
        target = tl.where(here == label[:, None, None], label_share[:, None, None], 0.0)
        if SMOOTH:
            target = tl.where(here == label[:, None, None], target, even_share[:, None, None])
        hard = hard - target
        if SOFT:
            grad = grad + hard
        else:
            grad = hard
    return through_transform(grad, x, scale, softcap, SCALED, CAPPED)


@triton.jit
def temperature_moment(x, y, ms, mt, cs, ct, ratio, ratio_rest):
    """Sum over VEC of (q - p)*(x - ms)*sum es; terms with x = -inf are 0."""
    dx = x - finite_max(ms)[:, None, None]
    dy = y - finite_max(mt)[:, None, None]
    es = power(dx, cs[:, None, None])
    et = power(dy, ct[:, None, None])
    difference = (es - et * ratio[:, None, None]) - et * ratio_rest[:, None, None]
    return tl.sum(tl.where(x == float("-inf"), 0.0, difference * dx), 2)


@triton.jit
def split_ratio(a, b):
    """(ratio, rest) with ratio + rest = a/b; ratio is 1 near 1, where rest keeps the digits that p - q is made of."""
    quotient = divide(a, b)
    near = (quotient > 0.5) & (quotient < 2.0)
    return tl.where(near, 1.0, quotient), tl.where(near, divide(a - b, b), 0.0)


@triton.jit
def centred_gap(x, y, ms, mt, ct, rho, st, mean_gap):
    """E_p[gap - mean_gap] for a tile of whole rows: what rounding left in mean_gap = E_p[gap]."""
    dx = x - finite_max(ms)[:, None, None]
    dy = y - finite_max(mt)[:, None, None]
    et = power(dy, ct[:, None, None])
    rest = et * (dy - dx * rho[:, None, None] - mean_gap[:, None, None])
    rest = tl.where((et > 0.0) & (x != float("-inf")), rest, 0.0)
    return divide(tl.sum(tl.sum(rest, 2), 1), st)


@triton.jit
def teacher_gradient(x, y, ms, mt, ct, rho, inv_t, mean_gap, gap_rest, Tt):
    """p*(r - K), r = log p - log q; 0 where p is 0.

    In r - K the sums of exponentials cancel: it is (gap - E_p[gap])/Tt with gap = (y-mt) - rho*(x-ms) and
    E_p[gap] = mean_gap + gap_rest.
    """
    dx = x - finite_max(ms)[:, None, None]
    dy = y - finite_max(mt)[:, None, None]
    p = power(dy, ct[:, None, None]) * inv_t[:, None, None]
    gap = (dy - dx * rho[:, None, None] - mean_gap[:, None, None]) - gap_rest[:, None, None]
    return tl.where(p == 0.0, 0.0, p * divide(gap, Tt[:, None, None]))
