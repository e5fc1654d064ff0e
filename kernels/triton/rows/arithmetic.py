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
def root(a):
    """Correctly rounded square root."""
    if a.dtype == tl.float32:
        return tl.sqrt_rn(a)
    else:
        return tl.sqrt(a)


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
        return tl.where((e > 0.0) & (e < INF), e + e * ((lost + d * low) * LN2), e)
    else:
        return tl.exp2(d * c)


@triton.jit
def fused(a, b, c):
    """a*b + c in float32, rounded once."""
    if INTERPRETED:  # whose fma rounds twice
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def fast_exp2(x):
    """2**x in float32 as the hardware has it, relative error below 2**-22; 0 below the normal numbers."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def fast_log2(x):
    """log2(x) in float32 as the hardware has it, absolute error below 2**-22 near 1, else relative."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def fast_reciprocal(x):
    """1/x in float32 as the hardware has it, relative error below 2**-22; exact for 1."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def columns(how):
    """Column of each element of a tile, [1, LANES, VEC]: a lane holds VEC neighbours, or every LANES-th column."""
    lane = tl.arange(0, how.LANES)[None, :, None]
    vec = tl.arange(0, how.VEC)[None, None, :]
    if how.CONTIGUOUS:
        return lane * how.VEC + vec
    else:
        return lane + vec * how.LANES


@triton.jit
def row_scalar(value, ptr, row, exists, STEP: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """[ROWS]: a number, a 0-d tensor (STEP 0) or one value per row (STEP 1)."""
    if ptr is None:
        return tl.full([ROWS], value, DTYPE)
    else:
        return tl.load(ptr + row * STEP, mask=exists, other=1.0).to(DTYPE)


@triton.jit
def row_labels(
    labels_ptr, mask_ptr, row, n_rows, classes, ignore_index, KEEPS_IGNORED: tl.constexpr, ROWS: tl.constexpr
):
    """label (0 where there is none to read), counted, labelled, bad (labelled, but the label is out of range).

    A row whose label is ignored is not counted, or with KEEPS_IGNORED not labelled.
    """
    exists = row < n_rows
    counted = exists
    if mask_ptr is not None:
        counted = counted & (tl.load(mask_ptr + row, mask=exists, other=0) != 0)
    label = tl.zeros([ROWS], tl.int64)
    bad = label != 0
    labelled = counted
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row, mask=exists, other=0)
        labelled = counted & (label != ignore_index)
        if not KEEPS_IGNORED:
            counted = labelled
        bad = labelled & ((label < 0) | (label >= classes))
        label = tl.where(labelled & (bad == 0), label, 0)
    return label, counted, labelled, bad


@triton.jit
def finite_max(m):
    """A maximum to subtract: 0 in place of -inf, so that -inf - m is -inf and not NaN."""
    return tl.where(m == -INF, 0.0, m)


@triton.jit
def soft_gap(dx, dy, rho, CROSS_ENTROPY: tl.constexpr):
    """Tt * (v - u) up to what is the same for all classes; of a cross-entropy Tt * (-u)."""
    if CROSS_ENTROPY:
        return -(dx * rho)
    else:
        return dy - dx * rho


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
