"""Row mathematics shared by the kernels that compare two rows of logits.

A program owns ROWS rows and looks at a tile [ROWS, LANES, VEC] of columns at a time. Sums over VEC stay
inside a thread; a lane is what one thread (or a few) carries across tiles. Notation per row: x, y student and
teacher logits after their transform, Ts, Tt temperatures, cs = log2(e)/Ts, ct = log2(e)/Tt, c1 = log2(e), rho = Tt/Ts,
    es = exp((x - max x)/Ts), et = exp((y - max y)/Tt), e1 = exp(x - max x).
The maximum is subtracted before the division by the temperature. Every sum is relative to a maximum, per lane
while tiles stream past (online softmax, Milakov and Gimelshein, arXiv:1805.02867), per row at the end.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
STATISTICS = tl.constexpr(11)  # columns of a row of saved statistics
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
LAST = tl.constexpr(2147483647)


@triton.jit
def divide(a, b):
    """Correctly rounded a/b; the plain float32 quotient is off by up to 2 ulp on a GPU."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def log_ratio(a, b, quotient):
    """log(a/b), accurate to its own size near a = b: 2 artanh((a-b)/(a+b))."""
    s = divide(a - b, a + b)
    t = s * s
    near = 1.0 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13))))))
    if a.dtype == tl.float32:
        # t <= 0.01: the first dropped term is below 1e-14.
        return tl.where(t < 0.01, 2.0 * s * near, tl.log(quotient))
    else:
        return tl.log(quotient)


@triton.jit
def per_temperature(T, EXACT: tl.constexpr):
    """log2(e)/T, the c of `power`: float64 where the exponentials are to be exact."""
    if EXACT:
        return tl.full(T.shape, LOG2E, tl.float64) / T.to(tl.float64)
    else:
        return divide(tl.full(T.shape, LOG2E, T.dtype), T)


@triton.jit
def power(d, c):
    """2**(d*c). With float32 d and float64 c the rounding of d*c, which grows with its size, is put right."""
    if (d.dtype == tl.float32) & (c.dtype == tl.float64):
        high = c.to(tl.float32)
        low = (c - high.to(tl.float64)).to(tl.float32)
        a = d * high
        if INTERPRETED:  # whose fma rounds twice
            lost = (d.to(tl.float64) * high.to(tl.float64) - a.to(tl.float64)).to(tl.float32)
        else:
            lost = tl.fma(d, tl.broadcast_to(high, d.shape), -a)
        e = tl.exp2(a)
        return tl.where(e > 0.0, e + e * ((lost + d * low) * LN2), e)
    else:
        return tl.exp2(d * c)


@triton.jit
def exp_negative(a):
    """exp(-a) without the rounding of the product with log2(e), which grows with a."""
    t = a.to(tl.float64) * (-1.0 * LOG2E)
    whole = tl.floor(t)
    return tl.exp2((t - whole).to(a.dtype)) * tl.exp2(whole.to(a.dtype))


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
def columns(LANES: tl.constexpr, VEC: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """Column of each element of a tile, [1, LANES, VEC]: a lane holds VEC neighbours, or every LANES-th column."""
    lane = tl.arange(0, LANES)[None, :, None]
    vec = tl.arange(0, VEC)[None, None, :]
    if CONTIGUOUS:
        return lane * VEC + vec
    else:
        return lane + vec * LANES


@triton.jit
def row_start(row, inner, outer_stride, row_stride, FLAT: tl.constexpr, UNIT: tl.constexpr):
    """First element of each row, int64. Strides come divided by UNIT, so that the compiler sees the alignment."""
    if FLAT:
        return row * row_stride * UNIT
    else:
        return ((row // inner) * outer_stride + (row % inner) * row_stride) * UNIT


@triton.jit
def row_scalar(value, ptr, row, exists, STEP: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """[ROWS]: a number, a 0-d tensor (STEP 0) or one value per row (STEP 1)."""
    if ptr is None:
        return tl.full([ROWS], value, DTYPE)
    else:
        return tl.load(ptr + row * STEP, mask=exists, other=1.0).to(DTYPE)


@triton.jit
def row_labels(labels_ptr, mask_ptr, row, n_rows, classes, ignore_index, ROWS: tl.constexpr):
    """label (0 where there is none to read), counted, bad (counted, but the label is out of range)."""
    exists = row < n_rows
    counted = exists
    if mask_ptr is not None:
        counted = counted & (tl.load(mask_ptr + row, mask=exists, other=0) != 0)
    label = tl.zeros([ROWS], tl.int64)
    bad = label != 0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row, mask=exists, other=0)
        counted = counted & (label != ignore_index)
        bad = counted & ((label < 0) | (label >= classes))
        label = tl.where(counted & (bad == 0), label, 0)
    return label, counted, bad


@triton.jit
def transform(x, scale, softcap, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    if SCALED:
        x = x * scale
    if CAPPED:
        x = softcap * tanh(divide(x, softcap))
    return x


@triton.jit
def through_transform(grad, x, scale, softcap, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """Chain rule of `transform` from its output x: scale * (1 - (x/softcap)^2)."""
    if CAPPED:
        z = divide(x, softcap)
        grad = grad * (1.0 - z * z)
    if SCALED:
        grad = grad * scale
    return grad


@triton.jit
def read(
    ptr,
    start,
    col,
    keep,
    scale,
    softcap,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    DTYPE: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Transformed logits of a tile; -inf where keep is false (nothing is read there)."""
    x = tl.load(ptr + start[:, None, None] + col, mask=keep, other=0.0, eviction_policy=EVICT).to(DTYPE)
    return tl.where(keep, transform(x, scale, softcap, SCALED, CAPPED), -INF)


@triton.jit
def finite_max(m):
    """A maximum to subtract: 0 in place of -inf, so that -inf - m is -inf and not NaN."""
    return tl.where(m == -INF, 0.0, m)


@triton.jit
def soft_sums(x, y, ms, mt, cs, ct, rho):
    """Sums over VEC relative to the maxima: sum es, sum et, sum et*((y-mt) - rho*(x-ms)), max y where x is -inf.

    The third is Tt * E_p[v-u] * sum et. Terms with et = 0 are 0; terms with x = -inf are left to the fourth.
    """
    dx = x - finite_max(ms)
    dy = y - finite_max(mt)
    es = power(dx, cs)
    et = power(dy, ct)
    cut = x == -INF
    gap = tl.where((et > 0.0) & (cut == 0), dy - dx * rho, 0.0)
    return tl.sum(es, 2), tl.sum(et, 2), tl.sum(et * gap, 2), tl.max(tl.where(cut, y, -INF), 2)


@triton.jit
def moved(m, new_m):
    """m - new_m, 0 where nothing has been summed yet."""
    return tl.where(m == -INF, 0.0, m - finite_max(new_m))


@triton.jit
def rescale(total, m, new_m, c):
    """A sum of exponentials relative to m, made relative to new_m."""
    return total * power(m - finite_max(new_m), c)


@triton.jit
def rescale_moment(moment, total, shift, m, new_m, c):
    """A sum of exponential*difference: the difference moves by `shift`, the exponential as in `rescale`."""
    factor = power(m - finite_max(new_m), c)
    return tl.where(factor > 0.0, factor * (moment + total * shift), 0.0)


@triton.jit
def first_column(x, m, col):
    """Smallest column over VEC that holds the maximum m [ROWS, LANES, 1]."""
    return tl.min(tl.where(x == m, col, LAST), 2)


@triton.jit
def entropy_sum(d, c):
    """sum of e*d over VEC with e = 2**(d*c) and 0*(-inf) = 0."""
    e = power(d, c)
    return tl.sum(tl.where(e > 0.0, e * d, 0.0), 2)


@triton.jit
def kl_value(ss, st, cross, blocked, mt, ct, Tt):
    """KL(p||q) = E_p[v-u] - log sum et + log sum es, at least 0, NaN kept, +inf where q is 0 and p is not."""
    kl = divide(divide(cross, st), Tt) + log_ratio(ss, st, divide(ss, st))
    kl = kl + tl.where(power(blocked - mt, ct) > 0.0, INF, 0.0)
    return tl.where(kl < 0.0, 0.0, kl)


@triton.jit
def hard_value(s1, ms, label_logit, spread, smoothing, classes, SMOOTH: tl.constexpr):
    """(1-eps)*(lse - x_label) + eps*(lse - mean x); spread = sum(x - shift), shift the finite label logit or 0."""
    hard = tl.log(s1) - (label_logit - ms)
    if SMOOTH:
        hard = hard - smoothing * divide(spread, classes)
    return hard


@triton.jit
def valid_sum(total):
    """A sum of exponentials is at least 1; anything else (no logit, NaN) makes the row NaN."""
    return tl.where(total > 0.0, total, float("nan"))


@triton.jit
def label_logit(
    ptr, start, label, wanted, scale, softcap, SCALED: tl.constexpr, CAPPED: tl.constexpr, DTYPE: tl.constexpr
):
    """Transformed logit of the label, [ROWS]; meaningless where not wanted (nothing is read there)."""
    x = tl.load(ptr + start + label, mask=wanted, other=0.0).to(DTYPE)
    return transform(x, scale, softcap, SCALED, CAPPED)
