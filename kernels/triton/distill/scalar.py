"""distill_loss over rows of logits: the scalar loss and its gradient. Formulas in `mfd_fast.ops.distill_loss`.

Rows that are not counted (mask, ignore_index) are not read and give 0. A counted row with a label out of range
gives NaN. Offsets of rows are int64; there is one grid dimension. Numbers arrive as float64 and are rounded to
DTYPE, the dtype of the arithmetic (float32, or float64 for float64 logits). Strides and column counts arrive
divided by UNIT, a power of two: so the compiler sees the alignment of every row. a, b: the parameters of the divergence
(`divergences`).

With LOOP a row is longer than a tile: one pass for the statistics, one more for the sums of a pointwise divergence,
and one in reverse order for the gradient, so that it starts on the columns that are still in cache. Without LOOP
the tile holds whole rows and is read once.
"""

import triton
import triton.language as tl

from ..rows.arithmetic import columns, divide, row_scalar
from ..rows.reduce import PARTS, divisor
from ..rows.sides import mixture, place, read, side, through_transform
from ..rows.structs import NUMBERS, LossNumbers, Numbers, Side
from .divergences import NKD, NONE
from .gradients import Targets, student_gradient
from .values import entropies, row_values


@triton.jit
def row_losses(v, T, loss, numbers, at, how):
    """weight*(soft_weight*soft + hard_weight*hard) per row in float64, and what its gradient over the divisor takes:
    the slope of dD/du and the shares of the labels and of NKD's target.
    """
    DTYPE: tl.constexpr = T.dtype
    one = tl.full([how.ROWS], 1.0, DTYPE)
    w = one
    if loss.weight_ptr is not None:
        w = tl.load(loss.weight_ptr + at.row, mask=at.counted, other=0.0)
    share = divide(w, one * divisor(loss, numbers.normalizer, numbers.n_counts, False, DTYPE))
    total = tl.zeros([how.ROWS], tl.float64)
    slope = divide(one, T)
    at_one = tl.zeros([how.ROWS], DTYPE)
    hard_share = at_one
    if how.DIVERGENCE != NONE:
        soft = v.soft.to(tl.float64)
        if how.SQUARED:
            soft = soft * T * T
            slope = T
        soft_w = row_scalar(numbers.soft_weight, loss.soft_weight_ptr, at.row, at.exists, 0, how.ROWS, tl.float64)
        total += soft_w * (soft + v.at_one)
        slope = slope * (soft_w.to(DTYPE) * share)
        if how.DIVERGENCE == NKD:
            at_one = soft_w.to(DTYPE) * share * v.p1
    if how.HARD:
        hard_w = row_scalar(numbers.hard_weight, loss.hard_weight_ptr, at.row, at.exists, 0, how.ROWS, tl.float64)
        if loss.APART:  # the sum over all rows is divided by the other terms' count
            by = divisor(loss, numbers.normalizer, numbers.n_counts, True, tl.float64)
            hard_w = hard_w * (divisor(loss, numbers.normalizer, numbers.n_counts, False, tl.float64) / by)
        total += hard_w * v.hard
        hard_share = tl.where(at.labelled, hard_w.to(DTYPE) * share, 0.0)
    return tl.where(at.counted, w * total, 0.0), slope, hard_share, at_one


@triton.jit
def store_parts(parts_ptr, v, both, T, weight_ptr, at, pid, how):
    """parts[:, program] = sums over its rows of weight times soft, hard and ``both`` entropies, in float64."""
    w = tl.full([how.ROWS], 1.0, tl.float64)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + at.row, mask=at.counted, other=0.0).to(tl.float64)
    soft = v.soft.to(tl.float64)
    if how.SQUARED:
        soft = soft * T * T
    each = (soft + v.at_one, v.hard, both[0], both[1])
    for part in tl.static_range(PARTS):
        values = each[part].to(tl.float64)
        if how.DIVERGENCE == NONE and part != 1:
            values = tl.zeros_like(values)
        total = tl.sum(tl.where(at.counted, w * values, 0.0), 0)
        tl.store(parts_ptr + part * tl.num_programs(0).to(tl.int64) + pid, total)


@triton.jit
def label_targets(v, hard_share, at_one, smoothing, classes, how):
    """`Targets` of the labels, and of NKD's first part with them."""
    n_classes = tl.full([how.ROWS], classes, hard_share.dtype)
    eps = tl.full([how.ROWS], smoothing, hard_share.dtype)
    kept = hard_share * (1.0 - eps * divide(n_classes - 1.0, n_classes)) + at_one
    return Targets(v.s_top, divide(hard_share + at_one, v.s1), kept, divide(hard_share * eps, n_classes))


@triton.jit
def standard_sums(s, t, v, at, col, slope, targets, how):
    """Mean of the gradient over the row and its drift, for the chain rule of standardisation."""
    total = tl.zeros([how.ROWS, how.LANES], s.T.dtype)
    moment = total
    for first in range(0, at.classes, how.LANES * how.VEC):
        here = col + first
        keep = at.counted[:, None, None] & (here < at.classes)
        x = read(s, here, keep, "evict_last")
        y = x
        if how.DIVERGENCE != NONE:
            y = read(t, here, keep, "evict_last")
        grad = student_gradient(x, y, here, at.label, s, t, v.known, v.means, slope, targets, how)
        total += tl.sum(tl.where(keep, grad, 0.0), 2)
        moment += tl.sum(tl.where(keep, grad * x, 0.0), 2)
    n_classes = tl.full([how.ROWS], at.classes, s.T.dtype)
    return divide(tl.sum(total, 1), n_classes), tl.sum(moment, 1) * s.back


@triton.jit
def store_gradient(grad_ptr, grad, x, s, middle, drift, here, keep, at, width):
    """A tile of the student's gradient [N, width], 0 where keep is false; keep None: the whole tile."""
    grad = through_transform(grad, x, s, s, middle, drift, at.classes)
    to = grad_ptr + (at.row * width)[:, None, None] + here
    if keep is None:
        tl.store(to, grad)
    else:
        tl.store(to, tl.where(keep, grad, 0.0), mask=at.exists[:, None, None] & (here < width))


@triton.jit
def stream_gradient(
    grad_ptr, s, t, v, at, col, first, n_tiles, width, slope, middle, drift, targets, WHOLE: tl.constexpr, how
):
    """``n_tiles`` tiles from column ``first`` on, from the last to the first; WHOLE: none of them needs a mask."""
    for k in range(n_tiles):
        here = col + first + (n_tiles - 1 - k) * (how.LANES * how.VEC)
        keep = None
        if not WHOLE:
            keep = at.counted[:, None, None] & (here < at.classes)
        x = read(s, here, keep, "evict_first")
        y = x
        if how.DIVERGENCE != NONE:
            y = read(t, here, keep, "evict_first")
        grad = student_gradient(x, y, here, at.label, s, t, v.known, v.means, slope, targets, how)
        store_gradient(grad_ptr, grad, x, s, middle, drift, here, keep, at, width)


@triton.jit
def write_gradient(grad_ptr, x, y, s, t, v, at, col, width, slope, targets, how):
    """The student's gradient [N, width]; without LOOP x, y hold whole rows."""
    middle, drift = slope, slope
    if s.of.STANDARD:
        middle, drift = standard_sums(s, t, v, at, col, slope, targets, how)
    if how.LOOP:
        BLOCK: tl.constexpr = how.LANES * how.VEC
        whole = 0
        if (t.parts is None) and (how.ROWS == 1):
            whole = tl.max(tl.where(at.counted, at.classes, 0), 0) // BLOCK
        n_rest = (width - whole * BLOCK + BLOCK - 1) // BLOCK
        stream_gradient(
            grad_ptr, s, t, v, at, col, whole * BLOCK, n_rest, width, slope, middle, drift, targets, False, how
        )
        if (t.parts is None) and (how.ROWS == 1):
            stream_gradient(grad_ptr, s, t, v, at, col, 0, whole, width, slope, middle, drift, targets, True, how)
    else:
        keep = at.counted[:, None, None] & (col < at.classes)
        grad = student_gradient(x, y, col, at.label, s, t, v.known, v.means, slope, targets, how)
        store_gradient(grad_ptr, grad, x, s, middle, drift, col, keep, at, width)


@triton.jit
def general_rows(
    p, loss, s_numbers, t_numbers, numbers, smoothing, a, b, pid, n_rows, ignore_index, classes, width, how
):
    """Partial loss and gradient of the rows of program ``pid``."""
    at = place(p, pid * how.ROWS + tl.arange(0, how.ROWS), n_rows, ignore_index, classes, how)
    col = columns(how)
    s = Side(p.student, *side(p.student, s_numbers, at, col, how), None)
    first = side(p.teacher, t_numbers, at, col, how)
    t = Side(p.teacher, *first, None)
    if p.more_ptrs is not None:
        t = Side(p.teacher, *first, mixture(t, p, at, col, how.DIVERGENCE == NKD, how))
    a = tl.full([1], a, s.T.dtype)
    b = tl.full([1], b, s.T.dtype)

    keep = at.counted[:, None, None] & (col < classes)
    x = read(s, col, keep, "evict_last" if how.LOOP else "evict_first")
    y = x
    if how.DIVERGENCE != NONE:
        y = read(t, col, keep, "evict_last" if how.LOOP else "evict_first")
    v = row_values(x, y, s, t, at, col, smoothing, a, b, how)
    total, slope, hard_share, at_one = row_losses(v, s.T, loss, numbers, at, how)
    tl.store(loss.partial_ptr + pid, tl.sum(total, 0))
    if loss.parts_ptr is not None:
        both = (v.hard, v.hard)
        if how.DIVERGENCE != NONE:
            both = entropies(v, s, t, at, how)
        store_parts(loss.parts_ptr, v, both, s.T, loss.weight_ptr, at, pid, how)
    if loss.grad_ptr is not None:
        targets = label_targets(v, hard_share, at_one, smoothing, classes, how)
        write_gradient(loss.grad_ptr, x, y, s, t, v, at, col, width, slope, targets, how)


@triton.jit(do_not_specialize=NUMBERS)
def distill_scalar(
    p,
    loss,
    how,
    temperature: tl.float64,
    teacher_temperature: tl.float64,
    soft_weight: tl.float64,
    hard_weight: tl.float64,
    normalizer: tl.float64,
    smoothing: tl.float64,
    s_scale: tl.float64,
    s_softcap: tl.float64,
    t_scale: tl.float64,
    t_softcap: tl.float64,
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
    """partial[program] = sum over its rows of weight*(soft_weight*soft + hard_weight*hard); grad of sum/divisor."""
    pid = tl.program_id(0).to(tl.int64)
    classes, width = classes * p.student.UNIT, width * p.student.UNIT
    s_numbers = Numbers(temperature, s_scale, s_softcap, s_inner, s_outer, s_row)
    t_numbers = Numbers(teacher_temperature, t_scale, t_softcap, t_inner, t_outer, t_row)
    numbers = LossNumbers(soft_weight, hard_weight, normalizer, n_counts)
    general_rows(
        p, loss, s_numbers, t_numbers, numbers, smoothing, a, b, pid, n_rows, ignore_index, classes, width, how
    )
