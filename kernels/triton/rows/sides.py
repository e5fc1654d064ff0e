"""One side of a row pair: its layout, temperature and transform, reading it, and the way back to its raw logits."""

import triton
import triton.language as tl

from .arithmetic import INF, LOG2E, divide, finite_max, power, rescale, root, row_labels, row_scalar, valid_sum
from .structs import Part, Place

STANDARD_EPS = tl.constexpr(1e-7)  # beside the standard deviation


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
def place(p, row, n_rows, ignore_index, classes, how):
    """`Place` of the rows ``row``."""
    label, counted, labelled, bad = row_labels(
        p.labels_ptr, p.mask_ptr, row, n_rows, classes, ignore_index, p.KEEPS_IGNORED, how.ROWS
    )
    return Place(row, row < n_rows, label.to(tl.int32), counted, labelled, bad, classes)


@triton.jit
def row_temperature(of, numbers, at, how):
    """The temperature of each row."""
    DTYPE: tl.constexpr = tl.float64 if how.FLOAT64 else tl.float32
    return row_scalar(numbers.temperature, of.temperature_ptr, at.row, at.exists, of.STEP, how.ROWS, DTYPE)


@triton.jit
def side(of, numbers, at, col, how):
    """The fields of `Side` between ``of`` and ``parts``."""
    DTYPE: tl.constexpr = tl.float64 if how.FLOAT64 else tl.float32
    start = row_start(at.row, numbers.inner, numbers.outer, numbers.row, of.FLAT, of.UNIT)
    T = row_temperature(of, numbers, at, how)
    scale = tl.full([1], numbers.scale, DTYPE)
    softcap = tl.full([1], numbers.softcap, DTYPE)
    zero = tl.zeros([how.ROWS], DTYPE)
    c = per_temperature(T, how.EXACT)
    mean, spread, off, back = zero, zero + 1.0, zero, T
    if of.STANDARD:
        mean, spread, off, back = standard(of, of.ptr, start, scale, softcap, at, col, how)
    return of.ptr, start, mean, spread, off, back, T, c, scale, softcap


@triton.jit
def read_raw(of, ptr, start, scale, softcap, col, keep, EVICT: tl.constexpr):
    """Logits of a tile before standardisation; 0 where keep is false (nothing is read there). keep None: all."""
    if keep is None:
        x = tl.load(ptr + start[:, None, None] + col, eviction_policy=EVICT).to(scale.dtype)
    else:
        x = tl.load(ptr + start[:, None, None] + col, mask=keep, other=0.0, eviction_policy=EVICT).to(scale.dtype)
    if of.SCALED:
        x = x * scale
    if of.CAPPED:
        x = softcap * tanh(divide(x, softcap))
    return x


@triton.jit
def read_one(s, rows, col, keep, EVICT: tl.constexpr):
    """Transformed logits of a tile of ``rows``, the side ``s`` itself or one of its parts; -inf where keep is false."""
    x = read_raw(s.of, rows.ptr, rows.start, s.scale, s.softcap, col, keep, EVICT)
    if s.of.STANDARD:
        x = divide(x - rows.mean[:, None, None], rows.spread[:, None, None])
    if keep is None:
        return x
    else:
        return tl.where(keep, x, -INF)


@triton.jit
def part_log_prob(t, part, col, keep, EVICT: tl.constexpr):
    """log softmax(y/T) of one of several teachers."""
    y = read_one(t, part, col, keep, EVICT)
    of_top = divide(y - finite_max(part.top)[:, None, None], t.T[:, None, None])
    return of_top - part.log_sum[:, None, None]


@triton.jit
def log_mixture(t, col, keep, EVICT: tl.constexpr):
    """log sum_k weight_k softmax(y_k/T) of a tile."""
    top = tl.where(keep, -INF, -INF).to(t.T.dtype)
    total = tl.zeros_like(top)
    for k in tl.static_range(len(t.parts)):
        part = Part(*t.parts[k])
        log_p = part_log_prob(t, part, col, keep, EVICT) + part.log_weight[:, None, None]
        higher = tl.maximum(top, log_p)
        shift = finite_max(higher)
        total = total * tl.exp(top - shift) + tl.exp(log_p - shift)
        top = higher
    return tl.where(total == 0.0, -INF, top + tl.log(total))


@triton.jit
def read(s, col, keep, EVICT: tl.constexpr):
    """Transformed logits of a tile, -inf where keep is false. A mixture p reads as the logits T log p."""
    if s.parts is None:
        return read_one(s, s, col, keep, EVICT)
    else:
        return log_mixture(s, col, keep, EVICT) * s.T[:, None, None]


@triton.jit
def label_logit(s, label, wanted):
    """Transformed logit of the label, [ROWS]; meaningless where not wanted (nothing is read there)."""
    x = read(s, label[:, None, None], wanted[:, None, None], "evict_last")
    return tl.sum(tl.sum(x, 2), 1)


@triton.jit
def part_label_logit(t, part, label, wanted):
    """The same of one of several teachers."""
    y = read_one(t, part, label[:, None, None], wanted[:, None, None], "evict_last")
    return tl.sum(tl.sum(y, 2), 1)


@triton.jit
def is_pair(spread, classes):
    """Whether a standardised row is that of two different numbers."""
    return (classes == 2) & (spread > STANDARD_EPS)


@triton.jit
def standard(of, ptr, start, scale, softcap, at, col, how):
    """mean, spread, off and back of `Side`."""
    total = tl.zeros([how.ROWS, how.LANES], scale.dtype)
    for first in range(0, at.classes, how.LANES * how.VEC):
        keep = at.counted[:, None, None] & (col + first < at.classes)
        x = read_raw(of, ptr, start, scale, softcap, col + first, keep, "evict_last")
        total += tl.sum(tl.where(keep, x, 0.0), 2)
    n = tl.full([how.ROWS], at.classes, scale.dtype)
    degrees = tl.maximum(n - 1.0, 1.0)
    mean = divide(tl.sum(total, 1), n)
    square = tl.zeros([how.ROWS, how.LANES], scale.dtype)
    rest = tl.zeros([how.ROWS, how.LANES], scale.dtype)
    for first in range(0, at.classes, how.LANES * how.VEC):
        keep = at.counted[:, None, None] & (col + first < at.classes)
        x = read_raw(of, ptr, start, scale, softcap, col + first, keep, "evict_last")
        centred = tl.where(keep, x - mean[:, None, None], 0.0)
        square += tl.sum(centred * centred, 2)
        rest += tl.sum(centred, 2)
    off = divide(tl.sum(rest, 1), n)
    variance = divide(tl.sum(square, 1) - n * off * off, degrees)
    deviation = root(tl.where(variance < 0.0, 0.0, variance))
    spread = deviation + STANDARD_EPS
    of_two = -divide(spread * STANDARD_EPS, deviation * deviation)
    back = tl.where(is_pair(spread, at.classes), of_two, divide(spread, degrees * deviation))
    return mean, spread, divide(off, spread), tl.where(deviation == 0.0, 0.0, back)


@triton.jit
def through_transform(grad, x, s, rows, middle, drift, classes):
    """Chain rule of the transform from its output x: scale * (1 - (x/softcap)^2), before it that of standardisation.

    ``rows`` as in `read_one`. middle, drift [ROWS]: the mean of grad over the row, and sum of grad*x times
    spread/((C-1)*deviation). Two classes standardise to the same two numbers but for the 1e-7 in spread = deviation +
    1e-7: all that is left of (grad - middle) - x*drift is x * sum of grad*x * 1e-7*spread/deviation^2.
    """
    if s.of.STANDARD:
        centred = grad - middle[:, None, None]
        centred = tl.where(is_pair(rows.spread, classes)[:, None, None], 0.0, centred)
        grad = divide(centred - (x - rows.off[:, None, None]) * drift[:, None, None], rows.spread[:, None, None])
        x = x * rows.spread[:, None, None] + rows.mean[:, None, None]
    if s.of.CAPPED:
        z = divide(x, s.softcap)
        grad = grad * (1.0 - z * z)
    if s.of.SCALED:
        grad = grad * s.scale
    return grad


@triton.jit
def part_sums(t, rows, at, col, AT_ONE: tl.constexpr, how):
    """Maximum, log sum exp((y - max)/T) and, with AT_ONE, the same at T = 1 of one of several teachers."""
    top = tl.full([how.ROWS, how.LANES], -INF, t.T.dtype)
    total = tl.zeros([how.ROWS, how.LANES], t.T.dtype)
    at_one = total
    c1 = tl.full([1, 1], LOG2E, t.c.dtype)
    for first in range(0, at.classes, how.LANES * how.VEC):
        keep = at.counted[:, None, None] & (col + first < at.classes)
        y = read_one(t, rows, col + first, keep, "evict_last")
        higher = tl.maximum(top, tl.max(y, 2))
        from_top = y - finite_max(higher)[:, :, None]
        total = rescale(total, top, higher, t.c[:, None]) + tl.sum(power(from_top, t.c[:, None, None]), 2)
        if AT_ONE:
            at_one = rescale(at_one, top, higher, c1) + tl.sum(power(from_top, c1[:, :, None]), 2)
        top = higher
    row_top = tl.max(top, 1)
    total = tl.sum(rescale(total, top, row_top[:, None], t.c[:, None]), 1)
    at_one = tl.sum(rescale(at_one, top, row_top[:, None], c1), 1)
    return row_top, tl.log(valid_sum(total)), tl.log(valid_sum(at_one))


@triton.jit
def mixture(t, p, at, col, AT_ONE: tl.constexpr, how):
    """`Part` of every teacher of ``p``; ``t`` is the first one as a side of its own."""
    N: tl.constexpr = len(p.more_ptrs) + 1
    none = tl.zeros_like(t.T)
    parts = ()
    for k in tl.static_range(N):
        ptr, start, mean, spread, off, back = t.ptr, t.start, t.mean, t.spread, t.off, t.back
        if k > 0:
            ptr = p.more_ptrs[k - 1]
            start = row_start(at.row, p.more_inner[k - 1], p.more_outer[k - 1], p.more_row[k - 1], False, t.of.UNIT)
            if t.of.STANDARD:
                mean, spread, off, back = standard(t.of, ptr, start, t.scale, t.softcap, at, col, how)
        weight = tl.full([how.ROWS], 1.0 / N, t.T.dtype)
        if p.weights_ptr is not None:
            slot = at.row * N + k if p.WEIGHTS_PER_ROW else at.row * 0 + k
            weight = tl.load(p.weights_ptr + slot, mask=at.exists, other=1.0).to(t.T.dtype)
        rows = Part(ptr, start, mean, spread, off, back, none, none, none, tl.log(weight))
        top, log_sum, log_sum_at_one = part_sums(t, rows, at, col, AT_ONE, how)
        part = Part(ptr, start, mean, spread, off, back, top, log_sum, log_sum_at_one, tl.log(weight))
        parts = parts + (part,)
    return parts


@triton.jit
def part_prob_at_one(part, y):
    """softmax(y) of one of several teachers at temperature 1."""
    return tl.exp((y - finite_max(part.top)[:, None, None]) - part.log_sum_at_one[:, None, None])


@triton.jit
def label_prob_at_one(t, label, counted):
    """sum_k weight_k softmax(y_k) of the label, [ROWS]."""
    total = tl.zeros_like(t.T)
    for k in tl.static_range(len(t.parts)):
        part = Part(*t.parts[k])
        y = part_label_logit(t, part, label, counted)
        p = tl.exp((y - finite_max(part.top)) - part.log_sum_at_one)
        total += tl.where(counted, tl.exp(part.log_weight) * p, 0.0)
    return total
