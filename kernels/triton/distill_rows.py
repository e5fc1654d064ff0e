"""Per-row terms of distill_loss, their statistics and by-products; tiles as in `distill_loss`."""

import triton
import triton.language as tl

from .row_statistics import hold_rows, stream_rows
from .rows import (
    STATISTICS,
    columns,
    divide,
    hard_value,
    kl_value,
    label_logit,
    per_temperature,
    power,
    read,
    row_labels,
    row_scalar,
    row_start,
    valid_sum,
)


@triton.jit(
    do_not_specialize=[
        "n_rows",
        "ignore_index",
        "classes",
        "s_inner",
        "s_outer",
        "s_row",
        "t_inner",
        "t_outer",
        "t_row",
    ]
)
def distill_rows(
    student_ptr,
    teacher_ptr,
    soft_ptr,
    hard_ptr,
    stats_ptr,
    student_entropy_ptr,
    teacher_entropy_ptr,
    student_prob_ptr,
    teacher_prob_ptr,
    agreement_ptr,
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
    classes: tl.int32,
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
    TERMS: tl.constexpr,
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
    """soft, hard and stats = (max x, log ss, max y, log st, log s1, K, 0, 0) per row; the by-products with TERMS."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid * ROWS + tl.arange(0, ROWS)
    exists = row < n_rows
    classes = classes * UNIT
    label, counted, bad = row_labels(labels_ptr, mask_ptr, row, n_rows, classes, ignore_index, ROWS)
    student_start = row_start(row, s_inner, s_outer, s_row, S_FLAT, UNIT)
    teacher_start = row_start(row, t_inner, t_outer, t_row, T_FLAT, UNIT)
    s_scale = tl.full([1], s_scale, DTYPE)
    s_softcap = tl.full([1], s_softcap, DTYPE)
    t_scale = tl.full([1], t_scale, DTYPE)
    t_softcap = tl.full([1], t_softcap, DTYPE)
    one = tl.full([ROWS], 1.0, DTYPE)
    Ts = row_scalar(temperature, temperature_ptr, row, exists, T_STEP, ROWS, DTYPE)
    Tt = row_scalar(teacher_temperature, teacher_temperature_ptr, row, exists, TT_STEP, ROWS, DTYPE)
    cs = per_temperature(Ts, EXACT)
    ct = per_temperature(Tt, EXACT)
    rho = divide(Tt, Ts)
    of_label = tl.zeros([ROWS], DTYPE)
    if HARD:
        of_label = label_logit(
            student_ptr, student_start, label, counted, s_scale, s_softcap, S_SCALED, S_CAPPED, DTYPE
        )
    shift = tl.where(tl.abs(of_label) < float("inf"), of_label, 0.0)

    col = columns(LANES, VEC, CONTIGUOUS)
    if LOOP:
        ms, mt, ss, st, cross, blocked, s1, spread, xs, yt, ix, iy, nans = stream_rows(
            student_ptr,
            student_start,
            teacher_ptr,
            teacher_start,
            col,
            counted,
            classes,
            cs,
            ct,
            rho,
            shift,
            s_scale,
            s_softcap,
            t_scale,
            t_softcap,
            True,
            HARD,
            SMOOTH,
            TERMS,
            S_SCALED,
            S_CAPPED,
            T_SCALED,
            T_CAPPED,
            ROWS,
            LANES,
            VEC,
            DTYPE,
        )
    else:
        keep = counted[:, None, None] & (col < classes)
        x = read(student_ptr, student_start, col, keep, s_scale, s_softcap, S_SCALED, S_CAPPED, DTYPE, "evict_first")
        y = read(teacher_ptr, teacher_start, col, keep, t_scale, t_softcap, T_SCALED, T_CAPPED, DTYPE, "evict_first")
        ms, mt, ss, st, cross, blocked, s1, spread, xs, yt, ix, iy, nans = hold_rows(
            x, y, col, keep, cs, ct, rho, shift, True, HARD, SMOOTH, TERMS
        )

    ss = tl.where(bad, float("nan"), valid_sum(ss))
    st = valid_sum(st)
    kl = kl_value(ss, st, cross, blocked, mt, ct, Tt)
    soft = kl
    if SQUARED:
        soft = soft * (Ts * Ts)
    hard = tl.zeros([ROWS], DTYPE)
    lse1 = hard
    if HARD:
        s1 = tl.where(bad, float("nan"), valid_sum(s1))
        lse1 = tl.log(s1)
        hard = hard_value(s1, ms, of_label, spread, one * smoothing, one * classes, SMOOTH)
    ls = tl.log(ss)
    lt = tl.log(st)
    tl.store(soft_ptr + row, tl.where(counted, soft, 0.0), mask=exists)
    tl.store(hard_ptr + row, tl.where(counted, hard, 0.0), mask=exists)
    out = stats_ptr + row * STATISTICS
    tl.store(out, tl.where(counted, ms, 0.0), mask=exists)
    tl.store(out + 1, tl.where(counted, ls, 0.0), mask=exists)
    tl.store(out + 2, tl.where(counted, mt, 0.0), mask=exists)
    tl.store(out + 3, tl.where(counted, lt, 0.0), mask=exists)
    tl.store(out + 4, tl.where(counted, lse1, 0.0), mask=exists)
    tl.store(out + 5, tl.where(counted, kl, 0.0), mask=exists)
    for unused in tl.static_range(6, STATISTICS):
        tl.store(out + unused, tl.zeros([ROWS], DTYPE), mask=exists)
    if TERMS:
        student_entropy = ls - divide(divide(xs, ss), Ts)
        teacher_entropy = lt - divide(divide(yt, st), Tt)
        tl.store(student_entropy_ptr + row, tl.where(counted, student_entropy, 0.0), mask=exists)
        tl.store(teacher_entropy_ptr + row, tl.where(counted, teacher_entropy, 0.0), mask=exists)
        agree = counted & (bad == 0) & (ix == iy) & (nans == 0)
        tl.store(agreement_ptr + row, agree, mask=exists)
        if HARD:
            of_teacher = label_logit(
                teacher_ptr, teacher_start, label, counted, t_scale, t_softcap, T_SCALED, T_CAPPED, DTYPE
            )
            q_label = divide(power(of_label - ms, cs), ss)
            p_label = divide(power(of_teacher - mt, ct), st)
            p_label = tl.where(bad, float("nan"), p_label)
            tl.store(student_prob_ptr + row, tl.where(counted, q_label, 0.0), mask=exists)
            tl.store(teacher_prob_ptr + row, tl.where(counted, p_label, 0.0), mask=exists)
