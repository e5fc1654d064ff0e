"""Gradients of sum_i grad_soft_i*soft_i + grad_hard_i*hard_i from the statistics that `distill_rows` left: one pass.

A standardised side takes a pass more, for the sum that its chain rule needs.
"""

import triton
import triton.language as tl

from .divergences import DKD, NKD, REVERSE
from .row_gradients import (
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
from .row_values import prob_at_one, surprise_at_one
from .rows import STATISTICS, columns, divide, finite_max, row_labels
from .sides import label_logit, read, side, standardized, teacher_side, through_transform


@triton.jit(
    do_not_specialize=[
        "n_rows",
        "ignore_index",
        "grad_soft_stride",
        "grad_hard_stride",
        "classes",
        "s_width",
        "t_width",
        "s_inner",
        "s_outer",
        "s_row",
        "t_inner",
        "t_outer",
        "t_row",
    ]
)
def distill_rows_backward(
    student_ptr,
    teacher_ptr,
    d_student_ptr,
    d_teacher_ptr,
    d_exponent_ptr,
    d_temperature_ptr,
    d_teacher_temperature_ptr,
    stats_ptr,
    grad_soft_ptr,
    grad_hard_ptr,
    at_one_ptr,
    more_ptrs,
    more_inner,
    more_outer,
    more_row,
    weights_ptr,
    labels_ptr,
    mask_ptr,
    temperature_ptr,
    teacher_temperature_ptr,
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
    UNIT: tl.constexpr,
    S_FLAT: tl.constexpr,
    T_FLAT: tl.constexpr,
    T_STEP: tl.constexpr,
    TT_STEP: tl.constexpr,
    KIND: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
    SQUARED: tl.constexpr,
    S_SCALED: tl.constexpr,
    S_CAPPED: tl.constexpr,
    S_STANDARD: tl.constexpr,
    T_SCALED: tl.constexpr,
    T_CAPPED: tl.constexpr,
    T_STANDARD: tl.constexpr,
    DTYPE: tl.constexpr,
    EXACT: tl.constexpr,
    WEIGHTS_PER_ROW: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    LOOP: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """Any of d_student, d_teacher [N, width] and d_temperature, d_teacher_temperature [N]; None: not wanted.

    With several teachers d_teacher, d_exponent [N, width] and, of NKD, at_one [N] are what `mixture_backward` needs:
    the gradients of the logits T log p, over p, and of the label's p at temperature 1.
    """
    pid = tl.program_id(0).to(tl.int64)
    row = pid * ROWS + tl.arange(0, ROWS)
    exists = row < n_rows
    classes = classes * UNIT
    s_width = s_width * UNIT
    t_width = t_width * UNIT
    label, counted, _bad = row_labels(labels_ptr, mask_ptr, row, n_rows, classes, ignore_index, ROWS)
    s = side(
        student_ptr,
        row,
        exists,
        s_inner,
        s_outer,
        s_row,
        temperature,
        temperature_ptr,
        s_scale,
        s_softcap,
        UNIT,
        S_FLAT,
        T_STEP,
        S_SCALED,
        S_CAPPED,
        S_STANDARD,
        EXACT,
        ROWS,
        DTYPE,
    )
    t = side(
        teacher_ptr,
        row,
        exists,
        t_inner,
        t_outer,
        t_row,
        teacher_temperature,
        teacher_temperature_ptr,
        t_scale,
        t_softcap,
        UNIT,
        T_FLAT,
        TT_STEP,
        T_SCALED,
        T_CAPPED,
        T_STANDARD,
        EXACT,
        ROWS,
        DTYPE,
    )
    a = tl.full([1], a, DTYPE)
    b = tl.full([1], b, DTYPE)
    none = tl.zeros([ROWS], DTYPE)
    col = columns(LANES, VEC, CONTIGUOUS)
    s, s_back = standardized(s, col, counted, classes, ROWS, LANES, VEC)
    t, t_back = teacher_side(
        t,
        more_ptrs,
        more_inner,
        more_outer,
        more_row,
        weights_ptr,
        row,
        exists,
        col,
        counted,
        classes,
        UNIT,
        WEIGHTS_PER_ROW,
        KIND == NKD,
        ROWS,
        LANES,
        VEC,
    )

    saved = stats_ptr + row * STATISTICS
    ms = tl.load(saved, mask=counted, other=0.0)
    ss = tl.load(saved + 1, mask=counted, other=1.0)
    mt = tl.load(saved + 2, mask=counted, other=0.0)
    st = tl.load(saved + 3, mask=counted, other=1.0)
    s1 = tl.load(saved + 4, mask=counted, other=1.0)
    soft = tl.load(saved + 5, mask=counted, other=0.0)
    first_mean = tl.load(saved + 6, mask=counted, other=0.0)
    h = tl.load(saved + 7, mask=counted, other=0.0)
    x_label, y_label = none, none
    s_top, t_top = ms, mt
    if (KIND == DKD) or (KIND == NKD):
        x_label, y_label = label_logit(s, label, counted), label_logit(t, label, counted)
        s_top, t_top = tl.maximum(ms, x_label), tl.maximum(mt, y_label)
    k, _pair = know(ms, ss, mt, st, s, t, x_label, y_label, a, b, KIND)
    means = Means(none, h, first_mean)
    if KIND >= REVERSE:
        means = Means(first_mean, h, tl.load(saved + 8, mask=counted, other=0.0))
    if KIND == NKD:
        means = Means(none, h, none)

    g_soft = tl.load(grad_soft_ptr + row * grad_soft_stride, mask=counted, other=0.0).to(DTYPE)
    slope = divide(g_soft, s.T)
    t_slope = divide(g_soft, t.T)
    if SQUARED:
        slope = g_soft * s.T
        t_slope = t_slope * (s.T * s.T)
    hard_share, at_one = none, none
    if HARD:
        hard_share = tl.load(grad_hard_ptr + row * grad_hard_stride, mask=counted, other=0.0).to(DTYPE)
    t_targets = Targets(t_top, none, none, none)
    if KIND == NKD:
        t1 = first_mean
        p1 = prob_at_one(t, label, counted, y_label, t_top, t1)
        at_one = g_soft * p1
        surprise = surprise_at_one(x_label, s_top, s1)
        up = tl.where(p1 == 0.0, 0.0, -at_one * surprise)
        if more_ptrs is None:
            t_targets = Targets(t_top, divide(up, t1), up, none)
        elif at_one_ptr is not None:  # the mixture at temperature 1 is another than the one that is softened
            tl.store(at_one_ptr + row, tl.where(counted, g_soft * surprise, 0.0), mask=exists)
    n_classes = tl.full([ROWS], classes, DTYPE)
    eps = tl.full([ROWS], smoothing, DTYPE)
    kept = hard_share * (1.0 - eps * divide(n_classes - 1.0, n_classes)) + at_one
    targets = Targets(s_top, divide(hard_share + at_one, s1), kept, divide(hard_share * eps, n_classes))

    BLOCK: tl.constexpr = LANES * VEC
    s_sum = tl.zeros([ROWS, LANES], DTYPE)
    t_sum = s_sum
    s_total, t_total = s_sum, s_sum
    s_middle, t_middle, s_drift, t_drift = none, none, none, none
    if S_STANDARD or T_STANDARD:
        for first in range(0, classes, BLOCK):
            here = col + first
            keep = counted[:, None, None] & (here < classes)
            x = read(s, here, keep, "evict_last")
            y = read(t, here, keep, "evict_last")
            if S_STANDARD:
                grad = student_gradient(x, y, here, label, s, t, k, means, slope, targets, KIND, HARD, SMOOTH)
                grad = tl.where(keep, grad, 0.0)
                s_total += tl.sum(grad, 2)
                s_sum += moment(grad, x, none)
            if T_STANDARD:
                grad = teacher_gradient(x, y, here, label, s, t, k, means, t_slope, t_targets, KIND)
                grad = tl.where(keep, grad, 0.0)
                t_total += tl.sum(grad, 2)
                t_sum += moment(grad, y, none)
        s_middle, s_drift = divide(tl.sum(s_total, 1), n_classes), tl.sum(s_sum, 1) * s_back
        t_middle, t_drift = divide(tl.sum(t_total, 1), n_classes), tl.sum(t_sum, 1) * t_back

    s_moment = tl.zeros([ROWS, LANES], DTYPE)
    t_moment = s_moment
    last = tl.maximum(s_width, t_width) if LOOP else 1
    for first in range(0, last, BLOCK):
        here = col + first
        keep = counted[:, None, None] & (here < classes)
        x = read(s, here, keep, "evict_first")
        y = read(t, here, keep, "evict_first")
        if d_student_ptr is not None:
            grad = student_gradient(x, y, here, label, s, t, k, means, slope, targets, KIND, HARD, SMOOTH)
            grad = through_transform(grad, x, s, s_middle, s_drift, classes)
            to = d_student_ptr + (row * s_width)[:, None, None] + here
            tl.store(to, tl.where(keep, grad, 0.0), mask=exists[:, None, None] & (here < s_width))
        if d_temperature_ptr is not None:
            grad = student_soft(x, y, here, label, s, t, k, means, KIND)
            s_moment += moment(tl.where(keep, grad, 0.0), x, finite_max(ms))
        if d_teacher_ptr is not None:
            if more_ptrs is None:
                grad = teacher_gradient(x, y, here, label, s, t, k, means, t_slope, t_targets, KIND)
                grad = through_transform(grad, y, t, t_middle, t_drift, classes)
            else:
                grad, exponent = teacher_over_p(x, y, here, label, s, t, k, x_label, y_label, means, KIND)
                grad = grad * t_slope[:, None, None]
                if d_exponent_ptr is not None:
                    to = d_exponent_ptr + (row * t_width)[:, None, None] + here
                    tl.store(to, tl.where(keep, exponent, 0.0), mask=exists[:, None, None] & (here < t_width))
            to = d_teacher_ptr + (row * t_width)[:, None, None] + here
            tl.store(to, tl.where(keep, grad, 0.0), mask=exists[:, None, None] & (here < t_width))
        if d_teacher_temperature_ptr is not None:
            grad = teacher_soft(x, y, here, label, s, t, k, means, KIND)
            t_moment += moment(tl.where(keep, grad, 0.0), y, finite_max(mt))

    if d_temperature_ptr is not None:
        total = tl.sum(s_moment, 1)
        if SQUARED:
            total = 2.0 * (s.T * soft) - total
        else:
            total = -divide(total, s.T * s.T)
        tl.store(d_temperature_ptr + row, tl.where(counted, g_soft * total, 0.0), mask=exists)
    if d_teacher_temperature_ptr is not None:
        total = -divide(tl.sum(t_moment, 1), t.T)
        tl.store(d_teacher_temperature_ptr + row, tl.where(counted, t_slope * total, 0.0), mask=exists)
