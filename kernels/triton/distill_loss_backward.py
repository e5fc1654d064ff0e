"""Gradients of sum_i grad_soft_i*soft_i + grad_hard_i*hard_i.

A tile that holds whole rows takes the row statistics from the logits again, free of the rounding of saved
logarithms. With LOOP they are those that `distill_rows`, or another backend, left.
"""

import triton
import triton.language as tl

from .row_gradients import (
    centred_gap,
    split_ratio,
    student_gradient,
    teacher_gradient,
    temperature_moment,
)
from .row_statistics import hold_rows
from .rows import (
    INF,
    STATISTICS,
    columns,
    divide,
    exp_negative,
    finite_max,
    kl_value,
    per_temperature,
    read,
    row_labels,
    row_scalar,
    row_start,
    through_transform,
    valid_sum,
)


@triton.jit
def write_tile(
    x,
    y,
    here,
    keep,
    row,
    exists,
    ms,
    mt,
    cs,
    ct,
    rho,
    Tt,
    inv_t,
    ratio,
    ratio_rest,
    mean_gap,
    gap_rest,
    q_factor,
    t_slope,
    q1_factor,
    label,
    label_share,
    even_share,
    s_scale,
    s_softcap,
    t_scale,
    t_softcap,
    d_student_ptr,
    d_teacher_ptr,
    s_width,
    t_width,
    STUDENT_MOMENT: tl.constexpr,
    TEACHER_MOMENT: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
    S_SCALED: tl.constexpr,
    S_CAPPED: tl.constexpr,
    T_SCALED: tl.constexpr,
    T_CAPPED: tl.constexpr,
):
    """Writes the wanted gradients of one tile; returns its lane sums for the gradients of the temperatures."""
    s_moment = tl.zeros([x.shape[0], x.shape[1]], x.dtype)
    t_moment = s_moment
    if d_student_ptr is not None:
        grad = student_gradient(
            x,
            y,
            here,
            ms,
            mt,
            cs,
            ct,
            q_factor,
            ratio,
            ratio_rest,
            q1_factor,
            label,
            label_share,
            even_share,
            s_scale,
            s_softcap,
            True,
            HARD,
            SMOOTH,
            S_SCALED,
            S_CAPPED,
        )
        to = d_student_ptr + (row * s_width)[:, None, None] + here
        tl.store(to, tl.where(keep, grad, 0.0), mask=exists[:, None, None] & (here < s_width))
    if (d_teacher_ptr is not None) or TEACHER_MOMENT:
        term = teacher_gradient(x, y, ms, mt, ct, rho, inv_t, mean_gap, gap_rest, Tt)
        if TEACHER_MOMENT:
            dy = y - finite_max(mt)[:, None, None]
            t_moment = tl.sum(tl.where(term == 0.0, 0.0, term * dy), 2)
        if d_teacher_ptr is not None:
            grad = through_transform(term * t_slope[:, None, None], y, t_scale, t_softcap, T_SCALED, T_CAPPED)
            to = d_teacher_ptr + (row * t_width)[:, None, None] + here
            tl.store(to, tl.where(keep, grad, 0.0), mask=exists[:, None, None] & (here < t_width))
    if STUDENT_MOMENT:
        s_moment = temperature_moment(x, y, ms, mt, cs, ct, ratio, ratio_rest)
    return s_moment, t_moment


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
    d_temperature_ptr,
    d_teacher_temperature_ptr,
    stats_ptr,
    grad_soft_ptr,
    grad_hard_ptr,
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
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
    SQUARED: tl.constexpr,
    S_SCALED: tl.constexpr,
    S_CAPPED: tl.constexpr,
    T_SCALED: tl.constexpr,
    T_CAPPED: tl.constexpr,
    DTYPE: tl.constexpr,
    EXACT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    LOOP: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """Any of d_student, d_teacher [N, width] and d_temperature, d_teacher_temperature [N]; None: not wanted."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid * ROWS + tl.arange(0, ROWS)
    exists = row < n_rows
    classes = classes * UNIT
    s_width = s_width * UNIT
    t_width = t_width * UNIT
    label, counted, bad = row_labels(labels_ptr, mask_ptr, row, n_rows, classes, ignore_index, ROWS)
    student_start = row_start(row, s_inner, s_outer, s_row, S_FLAT, UNIT)
    teacher_start = row_start(row, t_inner, t_outer, t_row, T_FLAT, UNIT)
    s_scale = tl.full([1], s_scale, DTYPE)
    s_softcap = tl.full([1], s_softcap, DTYPE)
    t_scale = tl.full([1], t_scale, DTYPE)
    t_softcap = tl.full([1], t_softcap, DTYPE)
    eps = tl.full([ROWS], smoothing, DTYPE)
    one = tl.full([ROWS], 1.0, DTYPE)
    Ts = row_scalar(temperature, temperature_ptr, row, exists, T_STEP, ROWS, DTYPE)
    Tt = row_scalar(teacher_temperature, teacher_temperature_ptr, row, exists, TT_STEP, ROWS, DTYPE)
    cs = per_temperature(Ts, EXACT)
    ct = per_temperature(Tt, EXACT)
    rho = divide(Tt, Ts)

    col = columns(LANES, VEC, CONTIGUOUS)
    BLOCK: tl.constexpr = LANES * VEC
    hard_share = tl.zeros([ROWS], DTYPE)
    inv_1 = hard_share
    if LOOP:
        saved = stats_ptr + row * STATISTICS
        ms = tl.load(saved, mask=counted, other=0.0)
        ls = tl.load(saved + 1, mask=counted, other=0.0)
        mt = tl.load(saved + 2, mask=counted, other=0.0)
        lt = tl.load(saved + 3, mask=counted, other=0.0)
        kl = tl.load(saved + 5, mask=counted, other=0.0)
        inv_s = exp_negative(ls)
        inv_t = exp_negative(lt)
        # exp(ls - lt) - 1 by its series where it is small.
        log_quotient = ls - lt
        near = tl.abs(log_quotient) < 0.03
        rest = log_quotient * (1.0 + log_quotient * (1 / 2 + log_quotient * (1 / 6 + log_quotient * (1 / 24))))
        near = near & (tl.float32 == DTYPE)
        ratio = tl.where(near, 1.0, exp_negative(-log_quotient))
        ratio_rest = tl.where(near, rest, 0.0)
        gap_rest = hard_share
        mean_gap = Tt * (kl + (lt - ls))
        if HARD:
            inv_1 = exp_negative(tl.load(saved + 4, mask=counted, other=0.0))
    else:
        keep = counted[:, None, None] & (col < classes)
        x = read(student_ptr, student_start, col, keep, s_scale, s_softcap, S_SCALED, S_CAPPED, DTYPE, "evict_first")
        y = read(teacher_ptr, teacher_start, col, keep, t_scale, t_softcap, T_SCALED, T_CAPPED, DTYPE, "evict_first")
        ms, mt, ss, st, cross, blocked, s1, _spread, _xs, _yt, _ix, _iy, _nans = hold_rows(
            x, y, col, keep, cs, ct, rho, hard_share, True, HARD, False, False
        )
        ss = valid_sum(ss)
        st = valid_sum(st)
        kl = kl_value(ss, st, cross, blocked, mt, ct, Tt)
        inv_s = divide(one, ss)
        inv_t = divide(one, st)
        mean_gap = divide(cross, st)
        gap_rest = centred_gap(x, y, ms, mt, ct, rho, st, mean_gap)
        mean_gap = tl.where(kl < INF, mean_gap, kl)
        ratio, ratio_rest = split_ratio(ss, st)
        if HARD:
            inv_1 = divide(one, valid_sum(s1))
    inv_s = tl.where(bad, float("nan"), inv_s)
    kl = tl.where(bad, float("nan"), kl)
    mean_gap = tl.where(bad, float("nan"), mean_gap)

    g_soft = tl.load(grad_soft_ptr + row * grad_soft_stride, mask=counted, other=0.0).to(DTYPE)
    slope = divide(g_soft, Ts)
    t_slope = divide(g_soft, Tt)
    if SQUARED:
        slope = g_soft * Ts
        t_slope = t_slope * (Ts * Ts)
    if HARD:
        hard_share = tl.load(grad_hard_ptr + row * grad_hard_stride, mask=counted, other=0.0).to(DTYPE)
    q_factor = slope * inv_s
    q1_factor = hard_share * inv_1
    n_classes = one * classes
    label_share = hard_share * (1.0 - eps * divide(n_classes - 1.0, n_classes))
    even_share = divide(hard_share * eps, n_classes)

    s_moment = tl.zeros([ROWS, LANES], DTYPE)
    t_moment = s_moment
    STUDENT_MOMENT: tl.constexpr = d_temperature_ptr is not None
    TEACHER_MOMENT: tl.constexpr = d_teacher_temperature_ptr is not None
    if LOOP:
        for first in range(0, tl.maximum(s_width, t_width), BLOCK):
            here = col + first
            keep = counted[:, None, None] & (here < classes)
            x = read(
                student_ptr, student_start, here, keep, s_scale, s_softcap, S_SCALED, S_CAPPED, DTYPE, "evict_first"
            )
            y = read(
                teacher_ptr, teacher_start, here, keep, t_scale, t_softcap, T_SCALED, T_CAPPED, DTYPE, "evict_first"
            )
            s_part, t_part = write_tile(
                x,
                y,
                here,
                keep,
                row,
                exists,
                ms,
                mt,
                cs,
                ct,
                rho,
                Tt,
                inv_t,
                ratio,
                ratio_rest,
                mean_gap,
                gap_rest,
                q_factor,
                t_slope,
                q1_factor,
                label,
                label_share,
                even_share,
                s_scale,
                s_softcap,
                t_scale,
                t_softcap,
                d_student_ptr,
                d_teacher_ptr,
                s_width,
                t_width,
                STUDENT_MOMENT,
                TEACHER_MOMENT,
                HARD,
                SMOOTH,
                S_SCALED,
                S_CAPPED,
                T_SCALED,
                T_CAPPED,
            )
            s_moment += s_part
            t_moment += t_part
    else:
        s_moment, t_moment = write_tile(
            x,
            y,
            col,
            keep,
            row,
            exists,
            ms,
            mt,
            cs,
            ct,
            rho,
            Tt,
            inv_t,
            ratio,
            ratio_rest,
            mean_gap,
            gap_rest,
            q_factor,
            t_slope,
            q1_factor,
            label,
            label_share,
            even_share,
            s_scale,
            s_softcap,
            t_scale,
            t_softcap,
            d_student_ptr,
            d_teacher_ptr,
            s_width,
            t_width,
            STUDENT_MOMENT,
            TEACHER_MOMENT,
            HARD,
            SMOOTH,
            S_SCALED,
            S_CAPPED,
            T_SCALED,
            T_CAPPED,
        )

    if d_temperature_ptr is not None:
        total = tl.sum(s_moment, 1) * inv_s
        if SQUARED:
            slope = 2.0 * (Ts * kl) - total
        else:
            slope = -divide(total, Ts * Ts)
        tl.store(d_temperature_ptr + row, tl.where(counted, g_soft * slope, 0.0), mask=exists)
    if d_teacher_temperature_ptr is not None:
        total = -divide(tl.sum(t_moment, 1), Tt)
        tl.store(d_teacher_temperature_ptr + row, tl.where(counted, t_slope * total, 0.0), mask=exists)
