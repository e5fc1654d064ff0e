"""Gradients of sum_i grad_soft_i*soft_i + grad_hard_i*hard_i from the statistics that `distill_rows` left: one pass.

A standardised side takes a pass more, for the sum that its chain rule needs.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..rows.arithmetic import STATISTICS, columns, divide, finite_max
from ..rows.sides import label_logit, mixture, place, read, side, through_transform
from ..rows.structs import NUMBERS, Numbers, Side
from .divergences import DKD, NKD, REVERSE
from .gradients import (
    Known,
    Means,
    Targets,
    know,
    moment,
    student_gradient,
    student_soft,
    teacher_gradient,
    teacher_over_p,
    teacher_soft,
)
from .values import prob_at_one, surprise_at_one


class RowGradients(NamedTuple):
    """Upstream gradients [N] and statistics [N, STATISTICS], and where the gradients go; None of what is not wanted:
    d_student, d_teacher [N, width] and d_temperature, d_teacher_temperature [N].

    With several teachers d_teacher, d_exponent [N, width] and, of NKD, at_one [N] are what `mixture_backward` needs:
    the gradients of the logits T log p, over p, and of the label's p at temperature 1.
    """

    stats_ptr: tl.tensor
    grad_soft_ptr: tl.tensor
    grad_hard_ptr: tl.tensor
    d_student_ptr: tl.tensor
    d_teacher_ptr: tl.tensor
    d_exponent_ptr: tl.tensor
    d_temperature_ptr: tl.tensor
    d_teacher_temperature_ptr: tl.tensor
    at_one_ptr: tl.tensor


class Saved(NamedTuple):
    """What the forward pass left of a row. s1, t1: sums at temperature 1 relative to s_top, t_top; soft: D."""

    known: Known
    means: Means
    soft: tl.tensor
    s1: tl.tensor
    t1: tl.tensor
    s_top: tl.tensor
    t_top: tl.tensor
    x_label: tl.tensor
    y_label: tl.tensor


class Slopes(NamedTuple):
    """Per row: the upstream gradient of soft, of D with respect to u and to v, and the targets of both sides."""

    soft: tl.tensor
    student: tl.tensor
    teacher: tl.tensor
    s_targets: Targets
    t_targets: Targets


@triton.jit
def load_saved(stats_ptr, s, t, at, a, b, how):
    """`Saved` from the statistics."""
    none = tl.zeros_like(s.T)
    saved = stats_ptr + at.row * STATISTICS
    ms = tl.load(saved, mask=at.counted, other=0.0)
    ss = tl.load(saved + 1, mask=at.counted, other=1.0)
    mt = tl.load(saved + 2, mask=at.counted, other=0.0)
    st = tl.load(saved + 3, mask=at.counted, other=1.0)
    s1 = tl.load(saved + 4, mask=at.counted, other=1.0)
    soft = tl.load(saved + 5, mask=at.counted, other=0.0)
    first_mean = tl.load(saved + 6, mask=at.counted, other=0.0)
    h = tl.load(saved + 7, mask=at.counted, other=0.0)
    x_label, y_label = none, none
    s_top, t_top = ms, mt
    if (how.DIVERGENCE == DKD) or (how.DIVERGENCE == NKD):
        x_label, y_label = label_logit(s, at.label, at.counted), label_logit(t, at.label, at.counted)
        s_top, t_top = tl.maximum(ms, x_label), tl.maximum(mt, y_label)
    known, _pair = know(ms, ss, mt, st, s, t, x_label, y_label, a, b, how)
    means = Means(none, h, first_mean)
    if how.DIVERGENCE >= REVERSE:
        means = Means(first_mean, h, tl.load(saved + 8, mask=at.counted, other=0.0))
    if how.DIVERGENCE == NKD:
        means = Means(none, h, none)
    return Saved(known, means, soft, s1, first_mean, s_top, t_top, x_label, y_label)


@triton.jit
def load_slopes(of, v, s, t, at, smoothing, grad_soft_stride, grad_hard_stride, how):
    """`Slopes` from the upstream gradients; of NKD with several teachers also stores at_one."""
    none = tl.zeros_like(s.T)
    upstream = of.grad_soft_ptr + at.row * grad_soft_stride
    g_soft = tl.load(upstream, mask=at.counted, other=0.0).to(none.dtype)
    slope = divide(g_soft, s.T)
    t_slope = divide(g_soft, t.T)
    if how.SQUARED:
        slope = g_soft * s.T
        t_slope = t_slope * (s.T * s.T)
    hard_share, at_one = none, none
    if how.HARD:
        upstream = of.grad_hard_ptr + at.row * grad_hard_stride
        hard_share = tl.load(upstream, mask=at.labelled, other=0.0).to(none.dtype)
    t_targets = Targets(v.t_top, none, none, none)
    if how.DIVERGENCE == NKD:
        p1 = prob_at_one(t, at.label, at.counted, v.y_label, v.t_top, v.t1)
        at_one = g_soft * p1
        surprise = surprise_at_one(v.x_label, v.s_top, v.s1)
        up = tl.where(p1 == 0.0, 0.0, -at_one * surprise)
        if t.parts is None:
            t_targets = Targets(v.t_top, divide(up, v.t1), up, none)
        elif of.at_one_ptr is not None:  # the mixture at temperature 1 is another than the one that is softened
            tl.store(of.at_one_ptr + at.row, tl.where(at.counted, g_soft * surprise, 0.0), mask=at.exists)
    n_classes = tl.full([how.ROWS], at.classes, none.dtype)
    eps = tl.full([how.ROWS], smoothing, none.dtype)
    kept = hard_share * (1.0 - eps * divide(n_classes - 1.0, n_classes)) + at_one
    targets = Targets(v.s_top, divide(hard_share + at_one, v.s1), kept, divide(hard_share * eps, n_classes))
    return Slopes(g_soft, slope, t_slope, targets, t_targets)


@triton.jit
def standard_sums(s, t, v, slopes, at, col, how):
    """Of both sides the mean of the gradient over the row and its drift, for the chain rule of standardisation."""
    none = tl.zeros_like(s.T)
    s_sum = tl.zeros([how.ROWS, how.LANES], none.dtype)
    t_sum, s_total, t_total = s_sum, s_sum, s_sum
    for first in range(0, at.classes, how.LANES * how.VEC):
        here = col + first
        keep = at.counted[:, None, None] & (here < at.classes)
        x = read(s, here, keep, "evict_last")
        y = read(t, here, keep, "evict_last")
        if s.of.STANDARD:
            grad = student_gradient(x, y, here, at.label, s, t, v.known, v.means, slopes.student, slopes.s_targets, how)
            grad = tl.where(keep, grad, 0.0)
            s_total += tl.sum(grad, 2)
            s_sum += moment(grad, x, none)
        if t.of.STANDARD:
            grad = teacher_gradient(x, y, here, at.label, s, t, v.known, v.means, slopes.teacher, slopes.t_targets, how)
            grad = tl.where(keep, grad, 0.0)
            t_total += tl.sum(grad, 2)
            t_sum += moment(grad, y, none)
    n_classes = tl.full([how.ROWS], at.classes, none.dtype)
    s_middle, s_drift = divide(tl.sum(s_total, 1), n_classes), tl.sum(s_sum, 1) * s.back
    return s_middle, s_drift, divide(tl.sum(t_total, 1), n_classes), tl.sum(t_sum, 1) * t.back


@triton.jit
def store_tile(ptr, tile, keep, at, here, width):
    """A tile of a matrix [N, width], 0 where keep is false."""
    to = ptr + (at.row * width)[:, None, None] + here
    tl.store(to, tl.where(keep, tile, 0.0), mask=at.exists[:, None, None] & (here < width))


@triton.jit
def store_temperatures(of, s, t, v, slopes, s_moment, t_moment, at, how):
    """Gradients of the temperatures from the moments of the soft slopes."""
    if of.d_temperature_ptr is not None:
        total = tl.sum(s_moment, 1)
        if how.SQUARED:
            total = 2.0 * (s.T * v.soft) - total
        else:
            total = -divide(total, s.T * s.T)
        tl.store(of.d_temperature_ptr + at.row, tl.where(at.counted, slopes.soft * total, 0.0), mask=at.exists)
    if of.d_teacher_temperature_ptr is not None:
        total = -divide(tl.sum(t_moment, 1), t.T)
        grad = tl.where(at.counted, slopes.teacher * total, 0.0)
        tl.store(of.d_teacher_temperature_ptr + at.row, grad, mask=at.exists)


@triton.jit
def write_gradients(of, s, t, v, slopes, at, col, s_width, t_width, how):
    """Every gradient that is wanted, from one more read of the rows."""
    none = tl.zeros_like(s.T)
    s_middle, s_drift, t_middle, t_drift = none, none, none, none
    if s.of.STANDARD or t.of.STANDARD:
        s_middle, s_drift, t_middle, t_drift = standard_sums(s, t, v, slopes, at, col, how)
    s_moment = tl.zeros([how.ROWS, how.LANES], none.dtype)
    t_moment = s_moment
    label, known, means = at.label, v.known, v.means
    last = tl.maximum(s_width, t_width) if how.LOOP else 1
    for first in range(0, last, how.LANES * how.VEC):
        here = col + first
        keep = at.counted[:, None, None] & (here < at.classes)
        x = read(s, here, keep, "evict_first")
        y = read(t, here, keep, "evict_first")
        if of.d_student_ptr is not None:
            grad = student_gradient(x, y, here, label, s, t, known, means, slopes.student, slopes.s_targets, how)
            grad = through_transform(grad, x, s, s, s_middle, s_drift, at.classes)
            store_tile(of.d_student_ptr, grad, keep, at, here, s_width)
        if of.d_temperature_ptr is not None:
            grad = student_soft(x, y, here, label, s, t, known, means, how)
            s_moment += moment(tl.where(keep, grad, 0.0), x, finite_max(known.ms))
        if of.d_teacher_ptr is not None:
            if t.parts is None:
                grad = teacher_gradient(x, y, here, label, s, t, known, means, slopes.teacher, slopes.t_targets, how)
                grad = through_transform(grad, y, t, t, t_middle, t_drift, at.classes)
            else:
                grad, exponent = teacher_over_p(x, y, here, label, s, t, known, v.x_label, v.y_label, means, how)
                grad = grad * slopes.teacher[:, None, None]
                if of.d_exponent_ptr is not None:
                    store_tile(of.d_exponent_ptr, exponent, keep, at, here, t_width)
            store_tile(of.d_teacher_ptr, grad, keep, at, here, t_width)
        if of.d_teacher_temperature_ptr is not None:
            grad = teacher_soft(x, y, here, label, s, t, known, means, how)
            t_moment += moment(tl.where(keep, grad, 0.0), y, finite_max(known.mt))
    store_temperatures(of, s, t, v, slopes, s_moment, t_moment, at, how)


@triton.jit(do_not_specialize=NUMBERS)
def distill_rows_backward(
    p,
    of,
    how,
    temperature: tl.float64,
    teacher_temperature: tl.float64,
    smoothing: tl.float64,
    s_scale: tl.float64,
    s_softcap: tl.float64,
    t_scale: tl.float64,
    t_softcap: tl.float64,
    a: tl.float64,
    b: tl.float64,
    n_rows: tl.int64,
    ignore_index: tl.int64,
    grad_soft_stride: tl.int64,
    grad_hard_stride: tl.int64,
    classes: tl.int32,
    s_width: tl.int32,
    t_width: tl.int32,
    s_inner: tl.int64,
    s_outer: tl.int64,
    s_row: tl.int64,
    t_inner: tl.int64,
    t_outer: tl.int64,
    t_row: tl.int64,
):
    """Any of the gradients of `RowGradients`."""
    row = tl.program_id(0).to(tl.int64) * how.ROWS + tl.arange(0, how.ROWS)
    UNIT: tl.constexpr = p.student.UNIT
    at = place(p, row, n_rows, ignore_index, classes * UNIT, how)
    col = columns(how)
    s_numbers = Numbers(temperature, s_scale, s_softcap, s_inner, s_outer, s_row)
    t_numbers = Numbers(teacher_temperature, t_scale, t_softcap, t_inner, t_outer, t_row)
    s = Side(p.student, *side(p.student, s_numbers, at, col, how), None)
    first = side(p.teacher, t_numbers, at, col, how)
    t = Side(p.teacher, *first, None)
    if p.more_ptrs is not None:
        t = Side(p.teacher, *first, mixture(t, p, at, col, how.DIVERGENCE == NKD, how))
    a = tl.full([1], a, s.T.dtype)
    b = tl.full([1], b, s.T.dtype)
    v = load_saved(of.stats_ptr, s, t, at, a, b, how)
    slopes = load_slopes(of, v, s, t, at, smoothing, grad_soft_stride, grad_hard_stride, how)
    write_gradients(of, s, t, v, slopes, at, col, s_width * UNIT, t_width * UNIT, how)
