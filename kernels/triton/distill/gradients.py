"""Values and gradients of the row losses. Tiles are [ROWS, LANES, VEC]; the rest is per row, [ROWS]."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..rows.arithmetic import INF, LN2, LOG2E, divide, finite_max, log_ratio, power, soft_gap
from ..rows.sides import read
from .divergences import (
    ALPHA_BETA,
    CROSS_ENTROPY,
    CROSS_ENTROPY_POINT,
    DKD,
    FAR,
    FORWARD,
    NKD,
    NONE,
    REVERSE,
    SKEW,
    SKEW_REVERSE,
    WIDE,
    centred,
    far_slope_of_p,
    kl_term,
    log1p,
    mixture_logs,
    pointwise,
    slope_of_p,
)
from .statistics import but_label

# log of a p below which quotients of p are not to be had from p itself.
SMALL_LOG = tl.constexpr(-20.0)


class Known(NamedTuple):
    """What the gradients of the divergence need of a row. Sums and maxima are those of `Sums`.

    ratio + ratio_rest: ss/st. log_ratio: its logarithm. weight: the factor of the part that the other classes make
    (DKD, NKD). s_label, s_other: what DKD's pair (label, rest) adds to dD/du at the label, and per q of the others;
    t_label, t_other: the same for the teacher. a, b: the parameters, [1].
    """

    ms: tl.tensor
    ss: tl.tensor
    inv_s: tl.tensor
    mt: tl.tensor
    st: tl.tensor
    inv_t: tl.tensor
    ratio: tl.tensor
    ratio_rest: tl.tensor
    log_ratio: tl.tensor
    weight: tl.tensor
    s_label: tl.tensor
    s_other: tl.tensor
    t_label: tl.tensor
    t_other: tl.tensor
    a: tl.tensor
    b: tl.tensor


class Means(NamedTuple):
    """E_q[g] and E_p[h]; of the online divergences h + rest is E_p[soft_gap], of the skew ones rest is sum p q/m."""

    g: tl.tensor
    h: tl.tensor
    rest: tl.tensor


class Targets(NamedTuple):
    """A cross-entropy at temperature 1: factor*exp(x - m) - (label at the label, even elsewhere)."""

    m: tl.tensor
    factor: tl.tensor
    label: tl.tensor
    even: tl.tensor


@triton.jit
def split_ratio(a, b):
    """(ratio, rest) with ratio + rest = a/b; ratio is 1 near 1, where rest keeps the digits that p - q is made of."""
    quotient = divide(a, b)
    near = (quotient > 0.5) & (quotient < 2.0)
    return tl.where(near, 1.0, quotient), tl.where(near, divide(a - b, b), 0.0)


@triton.jit
def pair_logit(x_label, m, total, T):
    """log of (label : rest); +inf where the rest has no mass."""
    return tl.where(total == 0.0, INF, divide(x_label - finite_max(m), T) - tl.log(total))


@triton.jit
def log_pair(z):
    """Probabilities of the label and of the rest and their logarithms from the pair's logit."""
    e = tl.exp(-tl.abs(z))
    large, small = divide(tl.full([1], 1.0, z.dtype), 1.0 + e), divide(e, 1.0 + e)
    rest = log1p(e)
    label = tl.where(z > 0, large, small)
    return label, tl.where(z > 0, small, large), tl.minimum(z, 0.0) - rest, -tl.maximum(z, 0.0) - rest


@triton.jit
def pair_term(p, q, log_p, log_q):
    """p log(p/q) - p + q with 0 log 0 = 0."""
    ruled_out = (log_q == -INF) & (p > 0)
    return tl.where(p == 0.0, q, tl.where(ruled_out, INF, kl_term(p, q, log_p - log_q)))


@triton.jit
def know(ms, ss, mt, st, s, t, x_label, y_label, a, b, how):
    """Known, and the pair's part of DKD."""
    none = tl.zeros_like(ss)
    one = none + 1.0
    inv_s, inv_t = divide(one, ss), divide(one, st)
    ratio, ratio_rest = split_ratio(ss, st)
    weight, s_label, s_other, t_label, t_other, pair = one, none, none, none, none, none
    if (how.DIVERGENCE == DKD) or (how.DIVERGENCE == NKD):
        # An empty rest: no teacher mass, no second part; no student mass, q = 0 there.
        inv_s, inv_t = tl.where(ss == 0.0, 0.0, inv_s), tl.where(st == 0.0, 0.0, inv_t)
        ratio = tl.where(st == 0.0, 0.0, ratio)
        ratio_rest = tl.where(st == 0.0, 0.0, ratio_rest)
        if how.DIVERGENCE == DKD:
            weight = tl.where(st == 0.0, 0.0, one * b)
            zq, zp = pair_logit(x_label, ms, ss, s.T), pair_logit(y_label, mt, st, t.T)
            q, q_rest, log_q, log_q_rest = log_pair(zq)
            p, p_rest, log_p, log_p_rest = log_pair(zp)
            pair = pair_term(p, q, log_p, log_q) + pair_term(p_rest, q_rest, log_p_rest, log_q_rest)
            s_label = a * tl.where(zq + zp > 0, p_rest - q_rest, q - p)
            s_other = -s_label
            both = p * p_rest
            t_label = tl.where(both == 0.0, 0.0, a * (both * (zp - zq)))
            t_other = -t_label
            pair = tl.where(a == 0, 0.0, a * tl.where(pair < 0, 0.0, pair))
        else:
            weight = tl.where(st == 0.0, 0.0, one * a)
        # Without a distribution on one of the sides nothing is a number, whatever it weighs.
        bad = (ss - ss) + (st - st)
        weight, pair = weight + bad, pair + bad
        s_label, s_other, t_label, t_other = s_label + bad, s_other + bad, t_label + bad, t_other + bad
    of_ratio = log_ratio(ss, st, divide(ss, st))
    shares = (s_label, s_other, t_label, t_other)
    known = Known(ms, ss, inv_s, mt, st, inv_t, ratio, ratio_rest, of_ratio, weight, *shares, a, b)
    return known, pair


@triton.jit
def pair_slopes(k, s, t, x_label, y_label):
    """t_other over the rest of p and t_label over p_label of `Known`, also where the two underflow."""
    zq, zp = pair_logit(x_label, k.ms, k.ss, s.T), pair_logit(y_label, k.mt, k.st, t.T)
    p, p_rest, _log_p, _log_p_rest = log_pair(zp)
    none = (p == 0.0) | (k.st == 0.0)
    other = tl.where(none, 0.0, -k.a * (p * (zp - zq)))
    return other, tl.where(p_rest == 0.0, 0.0, k.a * (p_rest * (zp - zq)))


@triton.jit
def online_value(k, pair, cross, blocked, t, how):
    """D of the online divergences (of NKD the second part), NaN kept, +inf where q is 0 and p is not.

    KL(p||q) = E_p[v-u] - log st + log ss, at least 0; CE(p, q) = E_p[-u] + log ss.
    """
    WITHOUT_P: tl.constexpr = (how.DIVERGENCE == NKD) or (how.DIVERGENCE == CROSS_ENTROPY)
    value = divide(divide(cross, k.st), t.T)
    if WITHOUT_P:
        value = value + tl.log(k.ss)
    else:
        value = value + k.log_ratio
    # INF + NaN stays NaN.
    value = tl.where(power(blocked - k.mt, t.c) > 0.0, INF + (k.ss - k.ss) + (k.st - k.st), value)
    value = tl.where(value < 0.0, 0.0, value)
    if (how.DIVERGENCE == DKD) or (how.DIVERGENCE == NKD):
        value = tl.where(k.weight == 0.0, k.ss - k.ss, k.weight * tl.where(k.ss == 0.0, INF, value))
    return value + pair


@triton.jit
def raised(d, c, total, degree):
    """(2**(d*c)/total)**degree, by way of the exponents: a logarithm of the probability would round them."""
    return power(d, c * degree.to(c.dtype)) * tl.exp(-degree * tl.log(total))


@triton.jit
def log_probability(d, c, total):
    """Logarithm of 2**(d*c)/total."""
    return d * (c * LN2).to(d.dtype) - tl.log(total)


@triton.jit
def log_quotient(dx, dy, either, s, t, k):
    """log p - log q of logits minus their maxima, meaningless where ``either`` is -inf."""
    gap = tl.where(either, 0.0, dy - dx * divide(t.T, s.T)[:, None, None])
    return divide(gap, t.T[:, None, None]) + k.log_ratio[:, None, None]


@triton.jit
def pointwise_tile(x, y, s, t, k, how):
    """f, q g, p h, p q/m, q and p of a tile."""
    dx = x - finite_max(k.ms)[:, None, None]
    dy = y - finite_max(k.mt)[:, None, None]
    q = power(dx, s.c[:, None, None]) * k.inv_s[:, None, None]
    p = power(dy, t.c[:, None, None]) * k.inv_t[:, None, None]
    no_q, no_p = x == -INF, y == -INF
    r = log_quotient(dx, dy, no_q | no_p, s, t, k)
    qs, ps, log_q, log_p = q, p, q, p
    if how.DIVERGENCE == CROSS_ENTROPY_POINT:
        log_q = log_probability(dx, s.c[:, None, None], k.ss[:, None, None])
    if how.DIVERGENCE == ALPHA_BETA:
        dx, dy = tl.where(no_q, 0.0, dx), tl.where(no_p, 0.0, dy)
        qs = raised(dx, s.c[:, None, None], k.ss[:, None, None], k.a + k.b)
        ps = raised(dy, t.c[:, None, None], k.st[:, None, None], k.a + k.b)
        log_q = log_probability(dx, s.c[:, None, None], k.ss[:, None, None])
        log_p = log_probability(dy, t.c[:, None, None], k.st[:, None, None])
    f, qg, ph, overlap = pointwise(q, p, qs, ps, log_q, log_p, r, no_q, no_p, k.a, k.b, how.DIVERGENCE)
    return f, qg, ph, overlap, q, p


@triton.jit
def pointwise_means(x, y, s, t, k, at, col, how):
    """D (at least 0, NaN kept) and `Means`. With LOOP the rows are read again, else x, y hold them."""
    f_sum = tl.zeros([how.ROWS, how.LANES], s.T.dtype)
    g_sum, h_sum, overlaps = f_sum, f_sum, f_sum
    last = at.classes if how.LOOP else 1
    for first in range(0, last, how.LANES * how.VEC):
        if how.LOOP:
            here = col + first
            keep = at.counted[:, None, None] & (here < at.classes)
            x_here, y_here = read(s, here, keep, "evict_last"), read(t, here, keep, "evict_last")
            f, qg, ph, overlap, _q, _p = pointwise_tile(x_here, y_here, s, t, k, how)
        else:
            f, qg, ph, overlap, _q, _p = pointwise_tile(x, y, s, t, k, how)
        f_sum += tl.sum(f, 2)
        g_sum += tl.sum(qg, 2)
        h_sum += tl.sum(ph, 2)
        overlaps += tl.sum(overlap, 2)
    # A row without any logit is NaN, though no class shows it.
    value = tl.sum(f_sum, 1) + (k.ss - k.ss) + (k.st - k.st)
    return tl.where(value < 0.0, 0.0, value), Means(tl.sum(g_sum, 1), tl.sum(h_sum, 1), tl.sum(overlaps, 1))


@triton.jit
def difference(x, y, s, t, k):
    """q - p of a tile."""
    es = power(x - finite_max(k.ms)[:, None, None], s.c[:, None, None])
    et = power(y - finite_max(k.mt)[:, None, None], t.c[:, None, None])
    return ((es - et * k.ratio[:, None, None]) - et * k.ratio_rest[:, None, None]) * k.inv_s[:, None, None]


@triton.jit
def student_soft(x, y, here, label, s, t, k, means, how):
    """dD/du."""
    if how.DIVERGENCE >= REVERSE:
        _f, qg, _ph, overlap, q, _p = pointwise_tile(x, y, s, t, k, how)
        if how.DIVERGENCE == SKEW:
            return centred(qg, overlap, q, k.b, means.g[:, None, None], means.rest[:, None, None])
        return qg - q * means.g[:, None, None]
    elif (how.DIVERGENCE == FORWARD) or (how.DIVERGENCE == CROSS_ENTROPY):
        return difference(x, y, s, t, k)
    else:
        x, y = but_label(x, here, label, how), but_label(y, here, label, how)
        grad = difference(x, y, s, t, k) * k.weight[:, None, None]
        if how.DIVERGENCE == DKD:
            q = power(x - finite_max(k.ms)[:, None, None], s.c[:, None, None]) * k.inv_s[:, None, None]
            grad = grad + q * k.s_other[:, None, None]
        return tl.where(here == label[:, None, None], k.s_label[:, None, None], grad)


@triton.jit
def gap_from_mean(x, y, s, t, k, mean, how):
    """soft_gap - mean, and exp((y - max y)/Tt)."""
    WITHOUT_P: tl.constexpr = (how.DIVERGENCE == NKD) or (how.DIVERGENCE == CROSS_ENTROPY)
    dx = x - finite_max(k.ms)[:, None, None]
    dy = y - finite_max(k.mt)[:, None, None]
    gap = soft_gap(dx, dy, divide(t.T, s.T)[:, None, None], WITHOUT_P) - mean[:, None, None]
    return gap, power(dy, t.c[:, None, None])


@triton.jit
def teacher_soft(x, y, here, label, s, t, k, means, how):
    """dD/dv, 0 where p is 0. Of the KL p (r - K): in r - K the sums of exponentials cancel."""
    if how.DIVERGENCE >= REVERSE:
        _f, _qg, ph, overlap, _q, p = pointwise_tile(x, y, s, t, k, how)
        slope = ph - p * means.h[:, None, None]
        if how.DIVERGENCE == SKEW_REVERSE:
            slope = centred(ph, overlap, p, k.a, means.h[:, None, None], means.rest[:, None, None])
        return tl.where(y == -INF, p, slope)
    else:
        x, y = but_label(x, here, label, how), but_label(y, here, label, how)
        gap, et = gap_from_mean(x, y, s, t, k, means.h, how)
        p = et * k.inv_t[:, None, None]
        grad = tl.where(p == 0.0, 0.0, p * divide(gap - means.rest[:, None, None], t.T[:, None, None]))
        if (how.DIVERGENCE == DKD) or (how.DIVERGENCE == NKD):
            grad = grad * k.weight[:, None, None]
            grad = tl.where(k.weight[:, None, None] == 0.0, 0.0, grad)
        if how.DIVERGENCE == DKD:
            grad = grad + p * k.t_other[:, None, None]
        if (how.DIVERGENCE == DKD) or (how.DIVERGENCE == NKD):
            grad = tl.where(here == label[:, None, None], k.t_label[:, None, None], grad)
        return grad


@triton.jit
def scaled_mean(mean, exponent):
    """``mean`` over exp(exponent), which is 1 nearly everywhere."""
    return tl.where(exponent == 0.0, mean, mean * tl.exp(-exponent))


@triton.jit
def teacher_over_p(x, y, here, label, s, t, k, x_label, y_label, means, how):
    """dD/dv over p where y = T log p of several teachers, also of a p that underflows; 0 where y is -inf.

    It is over*exp(exponent) of the pair (over, exponent); the exponents of a bounded or logarithmic dD/dp are 0.
    """
    exponent = tl.zeros_like(y)
    if (how.DIVERGENCE == REVERSE) or (how.DIVERGENCE == ALPHA_BETA):
        _f, _qg, ph, _overlap, _q, p = pointwise_tile(x, y, s, t, k, how)
        dx = x - finite_max(k.ms)[:, None, None]
        dy = y - finite_max(k.mt)[:, None, None]
        no_q = x == -INF
        log_p = divide(dy, t.T[:, None, None]) - tl.log(k.st)[:, None, None]
        far = log_p < SMALL_LOG
        r = log_quotient(dx, dy, no_q | (y == -INF), s, t, k)
        over, exponent = far_slope_of_p(r, log_p, no_q, k.a, k.b, how.DIVERGENCE)
        over = tl.where(far, over, divide(ph, tl.where(far, 1.0, p)))
        exponent = tl.where(far & (y > -INF), exponent, 0.0)
        over = over - scaled_mean(means.h[:, None, None], exponent)
    elif how.DIVERGENCE >= REVERSE:
        dx = x - finite_max(k.ms)[:, None, None]
        dy = y - finite_max(k.mt)[:, None, None]
        r = tl.where(x == -INF, FAR, log_quotient(dx, dy, (x == -INF) | (y == -INF), s, t, k))
        over = slope_of_p(r, k.a, k.b, how.DIVERGENCE) - means.h[:, None, None]
        if how.DIVERGENCE == SKEW_REVERSE:
            whole = means.rest[:, None, None]
            _over_p, over_q = mixture_logs(r, k.a, k.b)
            over = tl.where(whole < 0.5, k.a * (whole - tl.exp(over_q)), over)
    else:
        of_label = y
        x, y = but_label(x, here, label, how), but_label(y, here, label, how)
        gap, _et = gap_from_mean(x, y, s, t, k, means.h, how)
        over = divide(gap - means.rest[:, None, None], t.T[:, None, None])
        if (how.DIVERGENCE == DKD) or (how.DIVERGENCE == NKD):
            log_rest = divide(finite_max(k.mt), t.T) + tl.log(k.st)
            up = tl.where(k.weight == 0.0, 0.0, -log_rest)
            beyond = up > WIDE
            factor = tl.where(beyond, k.weight, k.weight * tl.exp(tl.where(beyond, 0.0, up)))
            over = tl.where(k.weight[:, None, None] == 0.0, 0.0, over * factor[:, None, None])
            row_exponent = tl.where(beyond, up, 0.0)
            label_slope = tl.zeros_like(k.weight)
            if how.DIVERGENCE == DKD:
                rest_slope, label_slope = pair_slopes(k, s, t, x_label, y_label)
                over = over + scaled_mean(rest_slope, row_exponent)[:, None, None]
            at_label = here == label[:, None, None]
            over = tl.where(at_label, label_slope[:, None, None], over)
            exponent = tl.where(at_label, 0.0, row_exponent[:, None, None])
            y = of_label
    return tl.where(y == -INF, 0.0, over), exponent


@triton.jit
def centred_gap(x, y, here, label, s, t, k, mean, how):
    """E_p[soft_gap - mean] of a tile of whole rows: what rounding left in mean = E_p[soft_gap]."""
    x, y = but_label(x, here, label, how), but_label(y, here, label, how)
    gap, et = gap_from_mean(x, y, s, t, k, mean, how)
    rest = tl.where((et > 0.0) & (x != -INF), et * gap, 0.0)
    return tl.sum(tl.sum(rest, 2), 1) * k.inv_t


@triton.jit
def targets_gradient(x, here, label, of, like, SMOOTH: tl.constexpr):
    """Gradient of a cross-entropy at temperature 1; ``like`` has the dtype of the exponentials' factor."""
    hard = power(x - finite_max(of.m)[:, None, None], tl.full([1, 1, 1], LOG2E, like.dtype)) * of.factor[:, None, None]
    if SMOOTH:
        return hard - tl.where(here == label[:, None, None], of.label[:, None, None], of.even[:, None, None])
    else:
        return hard - tl.where(here == label[:, None, None], of.label[:, None, None], 0.0)


@triton.jit
def student_gradient(x, y, here, label, s, t, k, means, slope, of, how):
    """slope*dD/du + the gradient of the targets, with respect to the transformed logits."""
    if how.DIVERGENCE == NONE:
        return targets_gradient(x, here, label, of, s.c, how.SMOOTH)
    else:
        grad = student_soft(x, y, here, label, s, t, k, means, how) * slope[:, None, None]
        if how.HARD or (how.DIVERGENCE == NKD):
            grad = grad + targets_gradient(x, here, label, of, s.c, how.SMOOTH)
        return grad


@triton.jit
def teacher_gradient(x, y, here, label, s, t, k, means, slope, of, how):
    """slope*dD/dv + the gradient of NKD's first part, with respect to the transformed logits."""
    grad = teacher_soft(x, y, here, label, s, t, k, means, how) * slope[:, None, None]
    if how.DIVERGENCE == NKD:
        grad = grad + targets_gradient(y, here, label, of, t.c, False)
    return grad


@triton.jit
def moment(grad, x, top):
    """Lane sums of grad*(x - top), 0 where grad is 0."""
    return tl.sum(tl.where(grad == 0.0, 0.0, grad * (x - top[:, None, None])), 2)
