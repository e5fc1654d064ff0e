"""Per-row terms of distill_loss with a sparse teacher, their by-products, and their gradients from the logits."""

import triton
import triton.language as tl

from ..distill.divergences import ALPHA_BETA, NKD
from ..distill.gradients import Targets, moment, student_soft, teacher_gradient, teacher_soft
from ..rows.arithmetic import (
    LAST,
    STATISTICS,
    columns,
    divide,
    finite_max,
    first_column,
    power,
)
from ..rows.sides import label_logit, place, side
from ..rows.structs import NUMBERS, Numbers, Side
from .rest import over_tile, row_bits
from .scalar import write_student
from .values import RENORMALIZE, ZERO, constant_in_h, entropy, pick, softened_sums, topk_row, topk_slopes


@triton.jit
def write_terms(out, v, at, T, how):
    """soft, hard and stats, which are 0: the backward starts again from the logits."""
    soft = v.soft
    if how.SQUARED:
        soft = soft * (T * T)
    tl.store(out.soft_ptr + at.row, tl.where(at.counted, soft + v.at_one, 0.0), mask=at.exists)
    tl.store(out.hard_ptr + at.row, tl.where(at.counted, v.hard, 0.0), mask=at.exists)
    for k in tl.static_range(STATISTICS):
        tl.store(out.stats_ptr + at.row * STATISTICS + k, tl.zeros_like(T), mask=at.exists)


@triton.jit
def agreement(v, x, top, at):
    """Whether both sides put the same class first."""
    best = tl.max(tl.max(tl.where(v.listed, v.y, float("-inf")), 2), 1)
    slot = tl.min(tl.min(tl.where(v.listed & (v.y == best[:, None, None]), v.slot, LAST), 2), 1)
    iy = over_tile(tl.where(v.slot == slot[:, None, None], v.column, 0))
    ix = tl.min(first_column(tl.where(v.listed, x, float("nan")), top[:, None, None], v.column), 1)
    rest_top = v.rest.top - v.shift
    ix = tl.where(rest_top > top, v.rest.column, tl.where(rest_top == top, tl.minimum(ix, v.rest.column), ix))
    nans = v.rest.nans + over_tile((v.listed & ((v.x != v.x) | (v.y != v.y))).to(tl.int32))
    return at.counted & (v.bad == 0) & (slot != LAST) & (ix == iy) & (nans == 0)


@triton.jit
def write_by_products(out, v, s, t, at, how):
    """Entropies, agreement and, with labels, their probabilities."""
    row_top, total, weighted, y_top, y_total, y_weighted = softened_sums(v, s, t)
    x_entropy, y_entropy = entropy(total, weighted, s.T), entropy(y_total, y_weighted, t.T)
    tl.store(out.student_entropy_ptr + at.row, tl.where(at.counted, x_entropy, 0.0), mask=at.exists)
    tl.store(out.teacher_entropy_ptr + at.row, tl.where(at.counted, y_entropy, 0.0), mask=at.exists)
    x = tl.where(v.listed, v.x, float("-inf"))
    tl.store(out.agreement_ptr + at.row, agreement(v, x, tl.max(tl.max(x, 2), 1), at), mask=at.exists)
    if how.HARD:
        x_label = label_logit(s, at.label, at.counted) - v.shift
        q_label = divide(power(x_label - finite_max(row_top), s.c), total)
        at_label = v.listed & (v.slot == v.label[:, None, None])
        weight = power(v.y - finite_max(y_top)[:, None, None], t.c[:, None, None])
        p_label = tl.where(v.bad, float("nan"), divide(pick(weight, at_label), y_total))
        tl.store(out.student_prob_ptr + at.row, tl.where(at.labelled, q_label, 0.0), mask=at.exists)
        tl.store(out.teacher_prob_ptr + at.row, tl.where(at.labelled, p_label, 0.0), mask=at.exists)


@triton.jit
def write_temperature(ptr, v, s, t, p, g_soft, at, how):
    """The gradient of the student's temperature."""
    grad = student_soft(v.x, v.seen, v.slot, v.label, s, t, v.known, v.means, how)
    # The rest moves with the mean of its logits.
    mean = v.rest.top - v.shift + divide(v.rest.moment, tl.where(v.rest.total == 0.0, 1.0, v.rest.total))
    x = tl.where(v.at_rest, mean[:, None, None], v.x)
    compared = v.listed | v.at_rest
    total = tl.sum(moment(tl.where(compared, grad, 0.0), x, finite_max(v.known.ms)), 1)
    if how.DIVERGENCE == ALPHA_BETA and p.TAIL == ZERO:
        below = tl.where(v.rest.total == 0.0, 0.0, v.rest.top - v.shift - finite_max(v.known.ms))
        total += v.power_share * (v.rest.power_moment + v.rest.powers * below)
        total -= v.share * v.means.g * (v.rest.moment + v.rest.total * below)
    if how.SQUARED:
        total = 2.0 * (s.T * v.soft) - total
    else:
        total = -divide(total, s.T * s.T)
    tl.store(ptr + at.row, tl.where(at.counted, g_soft * total, 0.0), mask=at.exists)


@triton.jit
def write_teacher(ptr, v, s, t, p, g_soft, t_slope, of_rest, at, n_listed, how):
    """The gradient of the listed logits or log-probabilities."""
    none = tl.zeros_like(g_soft)
    up = -g_soft * v.at_one
    targets = Targets(v.t_top, none, none, none)
    if how.DIVERGENCE == NKD:
        targets = Targets(v.t_top, divide(up, v.t1), up, none)
    grad = teacher_gradient(v.x, v.seen, v.slot, v.label, s, t, v.known, v.means, t_slope, targets, how)
    if p.TAIL == ZERO:
        grad = tl.where(v.at_rest, (of_rest * t_slope)[:, None, None], grad)
    if p.LOGPROBS and p.TAIL != RENORMALIZE:
        rest_slope = divide(pick(grad, v.at_rest), tl.where(v.left == 0.0, 1.0, v.left))
        grad = grad - tl.exp(v.y) * tl.where(v.left == 0.0, 0.0, rest_slope)[:, None, None]
    to = ptr + (at.row * n_listed)[:, None, None] + v.slot
    tl.store(to, tl.where(v.listed, grad, 0.0), mask=at.exists[:, None, None] & (v.slot < n_listed))


@triton.jit
def write_gradients(
    of, v, s, t, p, bits, at, col, smoothing, a, b, grad_soft_stride, grad_hard_stride, s_width, n_listed, how
):
    """Every gradient that is wanted."""
    none = tl.zeros_like(s.T)
    g_soft = tl.load(of.grad_soft_ptr + at.row * grad_soft_stride, mask=at.counted, other=0.0).to(none.dtype)
    slope = divide(g_soft, s.T)
    t_slope = divide(g_soft, t.T)
    if how.SQUARED:
        slope = g_soft * s.T
        t_slope = t_slope * (s.T * s.T)
    g_hard = none
    if how.HARD:
        g_hard = tl.load(of.grad_hard_ptr + at.row * grad_hard_stride, mask=at.labelled, other=0.0).to(none.dtype)
    if of.d_student_ptr is not None:
        slopes = topk_slopes(v, s, t, slope, g_hard, g_soft * v.p1, smoothing, at.classes, how)
        write_student(of.d_student_ptr, v, s, slopes, p, bits, at, col, s_width, how)
    if of.d_temperature_ptr is not None:
        write_temperature(of.d_temperature_ptr, v, s, t, p, g_soft, at, how)
    p_rest = none
    if p.TAIL == ZERO:
        p_rest = power(pick(v.y, v.at_rest) - finite_max(v.known.mt), t.c) * v.known.inv_t
    of_rest = -p_rest * (constant_in_h(a, b, how) + v.means.h)
    if of.d_teacher_ptr is not None:
        write_teacher(of.d_teacher_ptr, v, s, t, p, g_soft, t_slope, of_rest, at, n_listed, how)
    if of.d_teacher_temperature_ptr is not None:
        grad = teacher_soft(v.x, v.seen, v.slot, v.label, s, t, v.known, v.means, how)
        if p.TAIL == ZERO:
            grad = tl.where(v.at_rest, of_rest[:, None, None], grad)
        compared = v.listed | v.at_rest
        total = tl.sum(moment(tl.where(compared, grad, 0.0), v.y, finite_max(v.known.mt)), 1)
        total = -divide(total, t.T)
        tl.store(of.d_teacher_temperature_ptr + at.row, tl.where(at.counted, t_slope * total, 0.0), mask=at.exists)


@triton.jit(do_not_specialize=NUMBERS)
def topk_rows(
    p,
    listed,
    out,
    of,
    how,
    temperature: tl.float64,
    teacher_temperature: tl.float64,
    smoothing: tl.float64,
    s_scale: tl.float64,
    s_softcap: tl.float64,
    a: tl.float64,
    b: tl.float64,
    n_rows: tl.int64,
    ignore_index: tl.int64,
    grad_soft_stride: tl.int64,
    grad_hard_stride: tl.int64,
    classes: tl.int32,
    s_width: tl.int32,
    n_listed: tl.int32,
    s_inner: tl.int64,
    s_outer: tl.int64,
    s_row: tl.int64,
    t_inner: tl.int64,
    t_outer: tl.int64,
    t_row: tl.int64,
):
    """The terms of ``out`` (`RowTerms`) and, with TERMS, the by-products; or, where ``of`` (`RowGradients`) has
    upstream gradients, any of the gradients, d_teacher [N, listed].
    """
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
    if out.soft_ptr is not None:
        write_terms(out, v, at, s.T, how)
    if how.TERMS:
        write_by_products(out, v, s, t, at, how)
    if of.grad_soft_ptr is not None:
        s_width = s_width * p.student.UNIT
        strides = (grad_soft_stride, grad_hard_stride)
        write_gradients(of, v, s, t, listed, bits, at, col, smoothing, a, b, *strides, s_width, n_listed, how)
