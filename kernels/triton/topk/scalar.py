"""distill_loss with a sparse teacher: the scalar loss and its gradient.

One program per row: the K listed classes are a tile of their own (`values`), the student's row streams past once
for the sums over the other classes and once for their gradient. Numbers and strides arrive as in `distill_loss`.
"""

import triton
import triton.language as tl

from ..distill.scalar import row_losses, store_parts
from ..rows.arithmetic import columns, divide
from ..rows.sides import place, read, side, through_transform
from ..rows.structs import NUMBERS, LossNumbers, Numbers, Side
from .rest import is_listed, over_tile, row_bits
from .values import entropy, listed_gradient, softened_sums, topk_row, topk_slopes, unlisted_gradient


@triton.jit
def write_student(grad_ptr, v, s, slopes, p, bits, at, col, width, how):
    """The student's gradient."""
    BLOCK: tl.constexpr = how.LANES * how.VEC
    grad_row = grad_ptr + (at.row * width)[:, None, None]
    of_listed = listed_gradient(v, s, slopes, at.label, how)
    x_listed = v.x + v.shift[:, None, None]
    middle, drift = s.back, s.back
    if s.of.STANDARD:
        total = over_tile(tl.where(v.listed, of_listed, 0.0))
        moment = over_tile(tl.where(v.listed, of_listed * x_listed, 0.0))
        for first in range(0, at.classes, BLOCK):
            here = col + first
            keep = at.counted[:, None, None] & (here < at.classes)
            others = keep & (is_listed(bits, here, keep) == 0)
            x = read(s, here, keep, "evict_last")
            grad = unlisted_gradient(x, here, v, s, slopes, at.label, p, how)
            total += over_tile(tl.where(others, grad, 0.0))
            moment += over_tile(tl.where(others, grad * x, 0.0))
        middle, drift = divide(total, tl.zeros_like(total) + at.classes), moment * s.back
    n_tiles = (width + BLOCK - 1) // BLOCK
    for k in range(n_tiles):
        here = col + (n_tiles - 1 - k) * BLOCK
        keep = at.counted[:, None, None] & (here < at.classes)
        x = read(s, here, keep, "evict_first")
        grad = unlisted_gradient(x, here, v, s, slopes, at.label, p, how)
        grad = through_transform(grad, x, s, s, middle, drift, at.classes)
        tl.store(grad_row + here, tl.where(keep, grad, 0.0), mask=at.exists[:, None, None] & (here < width))
    tl.debug_barrier()  # whole vectors first, then the listed classes among them
    of_listed = through_transform(of_listed, x_listed, s, s, middle, drift, at.classes)
    tl.store(grad_row + v.column, of_listed, mask=v.listed)


@triton.jit(do_not_specialize=NUMBERS)
def topk_scalar(
    p,
    listed,
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
    a: tl.float64,
    b: tl.float64,
    n_rows: tl.int64,
    n_counts: tl.int64,
    ignore_index: tl.int64,
    classes: tl.int32,
    width: tl.int32,
    n_listed: tl.int32,
    s_inner: tl.int64,
    s_outer: tl.int64,
    s_row: tl.int64,
    t_inner: tl.int64,
    t_outer: tl.int64,
    t_row: tl.int64,
):
    """partial[row] = weight*(soft_weight*soft + hard_weight*hard); grad of sum/divisor."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    at = place(p, row, n_rows, ignore_index, classes * p.student.UNIT, how)
    col = columns(how)
    s_numbers = Numbers(temperature, s_scale, s_softcap, s_inner, s_outer, s_row)
    t_numbers = Numbers(teacher_temperature, 1.0, 1.0, t_inner, t_outer, t_row)
    s = Side(p.student, *side(p.student, s_numbers, at, col, how), None)
    t = Side(p.teacher, *side(p.teacher, t_numbers, at, col, how), None)
    a = tl.full([1], a, s.T.dtype)
    b = tl.full([1], b, s.T.dtype)
    bits = row_bits(listed, at)
    v = topk_row(s, t, listed, bits, at, col, n_listed, smoothing, a, b, how)

    numbers = LossNumbers(soft_weight, hard_weight, normalizer, n_counts)
    total, slope, hard_share, at_one = row_losses(v, s.T, loss, numbers, at, how)
    tl.store(loss.partial_ptr + row, total, mask=at.exists)
    if loss.parts_ptr is not None:
        _top, x_total, x_weighted, _y_top, y_total, y_weighted = softened_sums(v, s, t)
        both = (entropy(x_total, x_weighted, s.T), entropy(y_total, y_weighted, t.T))
        store_parts(loss.parts_ptr, v, both, s.T, loss.weight_ptr, at, tl.program_id(0), how)
    if loss.grad_ptr is not None:
        slopes = topk_slopes(v, s, t, slope, hard_share, at_one, smoothing, at.classes, how)
        write_student(loss.grad_ptr, v, s, slopes, listed, bits, at, col, width * p.student.UNIT, how)
