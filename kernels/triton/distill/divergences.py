"""Row mathematics of the divergences between p (teacher) and q (student): value, g = df/dq and h = df/dp per class.

A pointwise divergence is D = sum_j f(q_j, p_j); its gradients with respect to the softened logits u = log q and
v = log p (up to a constant) are q (g - E_q[g]) and p (h - E_p[h]). Constants in g and h drop out, so g and h are
taken to vanish at p = q: nothing large cancels there. Everything is a function of q, p and r = log p - log q,
which the kernels compute from differences of logits.

FORWARD, CROSS_ENTROPY, DKD and NKD need no second look at a row: their sums are those of the online pass. DKD and NKD
see the classes other than the label through it.
"""

import triton
import triton.language as tl

from ..rows.arithmetic import INF, divide

NONE = tl.constexpr(-1)  # no soft term
FORWARD = tl.constexpr(0)
CROSS_ENTROPY = tl.constexpr(1)
DKD = tl.constexpr(2)
NKD = tl.constexpr(3)
REVERSE = tl.constexpr(4)  # from here on: pointwise
JSD = tl.constexpr(5)
SKEW = tl.constexpr(6)
SKEW_REVERSE = tl.constexpr(7)
TVD = tl.constexpr(8)
ALPHA_BETA = tl.constexpr(9)
FORWARD_POINT = tl.constexpr(10)  # FORWARD and CROSS_ENTROPY where p need not sum to 1
CROSS_ENTROPY_POINT = tl.constexpr(11)

# |r| of a class that one side rules out: exp(-FAR) is 0 in every dtype.
FAR = tl.constexpr(1000.0)
# A number goes with an exponent of its own from here on: far from overflow in every dtype.
WIDE = tl.constexpr(60.0)


@triton.jit
def series_range(dtype: tl.constexpr):
    """Up to where nine terms of the series for exp are exact in the dtype."""
    if dtype == tl.float32:
        return tl.full([1], 0.5, dtype)
    else:
        return tl.full([1], 0.02, dtype)


@triton.jit
def expm1(z):
    """exp(z) - 1, accurate to its own size near 0."""
    near = z * (1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5 * (1 + z / 6 * (1 + z / 7 * (1 + z / 8)))))))
    return tl.where(tl.abs(z) < series_range(z.dtype), near, tl.exp(z) - 1.0)


@triton.jit
def log1p(w):
    """log(1 + w), -1 < w <= 1."""
    return log_of_sum(w, 1.0 + w)


@triton.jit
def log_of_sum(w, whole):
    """log(whole), whole = 1 + w > 0, accurate to its own size near w = 0: 2 artanh(w/(2 + w))."""
    s = divide(w, 2.0 + w)
    t = s * s
    if w.dtype == tl.float32:
        near = 2.0 * s * (1.0 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9)))))
        return tl.where(t < 0.01, near, tl.log(whole))
    else:
        near = 2.0 * s * (1.0 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7))))
        return tl.where(t < 1e-4, near, tl.log(whole))


@triton.jit
def kl_term(a, b, rho):
    """a (rho - 1) + b with rho = log(a/b): a log(a/b) - a + b >= 0, whose sum over distributions is KL(a||b)."""
    z = rho
    series = 1 - z / 3 * (
        1 - z / 4 * (1 - z / 5 * (1 - z / 6 * (1 - z / 7 * (1 - z / 8 * (1 - z / 9 * (1 - z / 10))))))
    )
    e = tl.exp(-tl.abs(rho))
    above = a * ((rho - 1.0) + e)
    below = b * (1.0 + e * (rho - 1.0))
    far = tl.where(rho > 0, above, below)
    return tl.where(tl.abs(rho) < series_range(a.dtype), a * (0.5 * rho * rho) * series, far)


@triton.jit
def mixture_logs(r, share_p, share_q):
    """log(p/m) and log(q/m) for m = share_p*p + share_q*q, share_p + share_q = 1."""
    above = r > 0
    greater, lesser = tl.where(above, share_p, share_q), tl.where(above, share_q, share_p)
    gap = -log_of_sum(lesser * expm1(-tl.abs(r)), greater + lesser * tl.exp(-tl.abs(r)))
    return tl.where(above, gap, gap + r), tl.where(above, gap - r, gap)


@triton.jit
def alpha_beta(qs, ps, log_q, log_p, r, no_q, no_p, a, b):
    """f, q g and p h of -1/(ab) (p^a q^b - a/s p^s - b/s q^s), s = a + b, with its limits; qs = q^s, ps = p^s.

    f is homogeneous of degree s, so that
        s f = q g + p h,  q g = (q^s - p^a q^b)/a,  p h = (p^s - p^a q^b)/b,
    each by the greater of its two powers: of a, b > 0 nothing overflows. Where p^a q^b is greater than the power of
    the greater of p and q, it is the exponential of its whole exponent, as the factor between them may overflow. Near
    p = q
        f = q^s r^2 sum_k r^k H_k/(k+2)!,  H_k = sum_i s^i a^(k-i),
    which has no limits to take.
    """
    s = a + b
    either = no_q | no_p
    r = tl.where(either, 0.0, r)
    above = r > 0
    greater, lesser = tl.where(above, ps, qs), tl.where(above, qs, ps)
    fall_a, fall_b = expm1(-tl.abs(a * r)), expm1(-tl.abs(b * r))
    change = tl.where(above, -b * r, a * r)
    exponent = tl.where(either, 0.0, a * log_p + b * log_q)
    e = tl.exp(tl.where(change < 1.0, tl.maximum(change, 0.0), exponent))
    risen = tl.where(change < 1.0, greater * e, e)
    mixed = tl.where(change > 0, risen, greater + greater * tl.where(above, fall_b, fall_a))  # p^a q^b
    of_q = divide(tl.where(above, fall_a, -fall_a), tl.where(a == 0, 1.0, tl.abs(a)))
    of_p = divide(tl.where(above, -fall_b, fall_b), tl.where(b == 0, 1.0, tl.abs(b)))
    qg = tl.maximum(qs, mixed) * tl.where(a == 0, -r, of_q)
    ph = tl.maximum(ps, mixed) * tl.where(b == 0, r, of_p)
    coefficient = tl.full([1], 1.0, r.dtype)
    s_power = coefficient
    term = tl.zeros_like(r) + 0.5
    series = term
    for k in tl.static_range(1, 9):
        s_power = s_power * s
        coefficient = s_power + a * coefficient
        term = term * (r * (1 / (k + 2)))
        series += term * coefficient
    near = tl.maximum(tl.abs(s), tl.abs(a)) * tl.abs(r) < series_range(r.dtype)
    apart = divide(tl.where(s == 0, ph - r, qg + ph), tl.where(s == 0, tl.where(a == 0, 1.0, a), s))
    f = tl.where(near, qs * (r * r) * series, apart)
    # Exponents of opposite signs, or a negative sum of them.
    f = tl.where((mixed == INF) | (greater == INF) | (lesser == INF), INF, f)
    f = tl.where(r == 0, 0.0, f)
    # One of the two is 0: the other, to the power s, over s and over the exponent of the one that is 0.
    alone = tl.where(no_q, ps, qs)
    gone = tl.where(no_q, b, a)
    finite = (gone > 0) & (s > 0)
    f = tl.where(either, tl.where(finite, divide(alone, tl.where(finite, gone * s, 1.0)), INF), f)
    share = divide(alone, tl.where(gone > 0, gone, 1.0))
    qg = tl.where(no_q, 0.0, tl.where(no_p, share, qg))
    ph = tl.where(no_p, 0.0, tl.where(no_q, share, ph))
    return tl.where(no_q & no_p, 0.0, f), qg, ph


@triton.jit
def pointwise(q, p, qs, ps, log_q, log_p, r, no_q, no_p, a, b, DIVERGENCE: tl.constexpr):
    """f, q g, p h and p q/m of every class; the last is 0 but for SKEW and SKEW_REVERSE, see `centred`. Of ALPHA_BETA
    alone: q and p to the power a + b, qs and ps, and the logarithms, of which CROSS_ENTROPY_POINT has log_q.

    a, b: beta and 1-beta of JSD, lambda and 1-lambda of SKEW, 1-lambda and lambda of SKEW_REVERSE (the shares of p
    and q in the mixture m), the exponents of ALPHA_BETA. no_q, no_p: where the logit is -inf.
    """
    overlap = tl.zeros_like(q)
    if DIVERGENCE == ALPHA_BETA:
        f, qg, ph = alpha_beta(qs, ps, log_q, log_p, r, no_q, no_p, a, b)
    else:
        r = tl.where(no_q, FAR, tl.where(no_p, -FAR, r))
        r = tl.where(no_q & no_p, 0.0, r)
        if DIVERGENCE == REVERSE:
            f = tl.where(no_p & (q > 0), INF, kl_term(q, p, -r))
            qg = -q * r
            ph = tl.where(r > 0, -p, q) * expm1(-tl.abs(r))
        elif DIVERGENCE == FORWARD_POINT:
            f = tl.where(no_q & (p > 0), INF, kl_term(p, q, r))
            qg = tl.where(r > 0, p, -q) * expm1(-tl.abs(r))
            ph = p * r
        elif DIVERGENCE == CROSS_ENTROPY_POINT:
            f = tl.where(p > 0, -p * log_q, p)
            qg = tl.where(r > 0, p, -q) * expm1(-tl.abs(r))
            ph = f
        elif DIVERGENCE == TVD:
            sign = tl.where(r > 0, 0.5, tl.where(r < 0, -0.5, r))
            f = -0.5 * tl.maximum(q, p) * expm1(-tl.abs(r))
            qg = -q * sign
            ph = p * sign
        else:
            m = a * p + b * q
            overlap = divide(p, tl.where(m == 0.0, 1.0, m)) * q
            over_p, over_q = mixture_logs(r, a, b)
            if DIVERGENCE == JSD:
                f = a * kl_term(p, m, over_p) + b * kl_term(q, m, over_q)
                qg = q * (b * over_q)
                ph = p * (a * over_p)
            elif DIVERGENCE == SKEW:
                w = expm1(over_p)
                f = kl_term(p, m, over_p)
                qg = -q * (b * w)
                ph = p * (over_p - a * w)
            else:
                w = expm1(over_q)
                f = kl_term(q, m, over_q)
                qg = q * (over_q - b * w)
                ph = -p * (a * w)
    return f, qg, ph, overlap


@triton.jit
def slope_of_p(r, a, b, DIVERGENCE: tl.constexpr):
    """h of `pointwise` for several teachers, also where p has no representation; REVERSE and ALPHA_BETA, whose h
    overflows there, have `far_slope_of_p`.
    """
    if DIVERGENCE == FORWARD_POINT:
        h = r
    elif DIVERGENCE == TVD:
        h = tl.where(r > 0, 0.5, tl.where(r < 0, -0.5, r))
    else:
        over_p, over_q = mixture_logs(r, a, b)
        if DIVERGENCE == JSD:
            h = a * over_p
        elif DIVERGENCE == SKEW:
            h = over_p - a * expm1(over_p)
        else:
            h = -a * expm1(over_q)
    return h


@triton.jit
def far_slope_of_p(r, log_p, no_q, a, b, DIVERGENCE: tl.constexpr):
    """h of REVERSE and ALPHA_BETA as (factor, exponent), h = factor*exp(exponent), from logarithms alone; the exponent
    is 0 where h has a representation.
    """
    if DIVERGENCE == REVERSE:
        a, b = tl.zeros_like(a), tl.zeros_like(b) + 1.0
    # p^(a+b-1) (1 - exp(z))/b; q = 0 leaves 1/b.
    z = tl.where(no_q, 0.0, -b * r)
    large = z > 1.0
    over_b = divide(tl.full([1], 1.0, r.dtype), tl.where(b == 0, 1.0, b))
    factor = over_b * tl.where(large, expm1(-tl.abs(z)), -expm1(tl.where(large, 0.0, z)))
    factor = tl.where(no_q, over_b, tl.where(b == 0, r, factor))
    exponent = (a + b - 1.0) * log_p + tl.where(large, z, 0.0)
    beyond = exponent > WIDE
    return tl.where(beyond, factor, factor * tl.exp(tl.where(beyond, 0.0, exponent))), tl.where(beyond, exponent, 0.0)


@triton.jit
def centred(shifted, overlap, probability, share, mean, whole):
    """A slope of the skew divergences that goes with -share*p q/m: what is ``shifted`` by share*probability to vanish
    at p = q, minus its ``mean``; where p q/m sums to a small ``whole``, from that, which the shift would round away.
    """
    return tl.where(whole < 0.5, share * (probability * whole - overlap), shifted - probability * mean)
