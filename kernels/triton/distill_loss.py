"""Forward-KL distillation over rows of logits: statistics, loss, gradients. Formulas in `mfd_fast.ops.distill_loss`.

Rows that are not counted (mask, ignore_index) are not read and give 0. A counted row with a label out of range
gives NaN. Offsets of rows are int64; there is one grid dimension. Numbers arrive as float64 and are rounded to
DTYPE, the dtype of the arithmetic (float32, or float64 for float64 logits). Strides and column counts arrive
divided by UNIT, a power of two: so the compiler sees the alignment of every row.

With LOOP a row is longer than a tile: one pass for the statistics, a second in reverse order for the gradient, so
that it starts on the columns that are still in cache. Without LOOP the tile holds whole rows and is read once.
"""

import triton
import triton.language as tl

from .row_gradients import split_ratio, student_gradient, zero_columns
from .row_statistics import hold_rows, stream_rows
from .rows import (
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


@triton.jit
def divisor(value, ptr, counts_ptr, n_counts, COUNTS: tl.constexpr, DTYPE: tl.constexpr):
    """[1]: what the sum over rows is divided by: the counted rows (at least 1), a 0-d tensor or a number."""
    if counts_ptr is not None:
        k = tl.arange(0, COUNTS)
        counted = tl.sum(tl.load(counts_ptr + k, mask=k < n_counts, other=0), 0)
        return tl.full([1], tl.maximum(counted, 1), DTYPE)
    elif ptr is not None:
        return tl.full([1], tl.load(ptr), DTYPE)
    else:
        return tl.full([1], value, DTYPE)


@triton.jit(do_not_specialize=["n_rows", "ignore_index"])
def count_rows(labels_ptr, mask_ptr, counts_ptr, n_rows: tl.int64, ignore_index: tl.int64, BLOCK: tl.constexpr):
    """counts[program] = counted rows among every num_programs-th block of rows."""
    pid = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.int64)
    for first in range(pid * BLOCK, n_rows, tl.num_programs(0).to(tl.int64) * BLOCK):
        row = first + tl.arange(0, BLOCK)
        exists = row < n_rows
        counted = exists
        if mask_ptr is not None:
            counted = counted & (tl.load(mask_ptr + row, mask=exists, other=0) != 0)
        if labels_ptr is not None:
            counted = counted & (tl.load(labels_ptr + row, mask=exists, other=0) != ignore_index)
        total += counted.to(tl.int64)
    tl.store(counts_ptr + pid, tl.sum(total, 0))


@triton.jit(do_not_specialize=["n_partials", "n_counts"])
def reduce_loss(
    partial_ptr,
    loss_ptr,
    normalizer_ptr,
    counts_ptr,
    normalizer: tl.float64,
    n_partials: tl.int64,
    n_counts: tl.int64,
    COUNTS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """loss = sum of the partial losses, in a fixed order, over the divisor."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n_partials, BLOCK):
        k = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + k, mask=k < n_partials, other=0.0).to(tl.float64)
    by = divisor(normalizer, normalizer_ptr, counts_ptr, n_counts, COUNTS, tl.float64)
    tl.store(loss_ptr + tl.arange(0, 1), (tl.sum(total, 0) / by).to(DTYPE))


@triton.jit(
    do_not_specialize=[
        "n_rows",
        "n_counts",
        "ignore_index",
        "classes",
        "width",
        "s_inner",
        "s_outer",
        "s_row",
        "t_inner",
        "t_outer",
        "t_row",
    ]
)
def distill_scalar(
    student_ptr,
    teacher_ptr,
    grad_ptr,
    partial_ptr,
    labels_ptr,
    mask_ptr,
    weight_ptr,
    counts_ptr,
    temperature_ptr,
    teacher_temperature_ptr,
    soft_weight_ptr,
    hard_weight_ptr,
    normalizer_ptr,
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
    UNIT: tl.constexpr,
    S_FLAT: tl.constexpr,
    T_FLAT: tl.constexpr,
    T_STEP: tl.constexpr,
    TT_STEP: tl.constexpr,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
    SQUARED: tl.constexpr,
    S_SCALED: tl.constexpr,
    S_CAPPED: tl.constexpr,
    T_SCALED: tl.constexpr,
    T_CAPPED: tl.constexpr,
    COUNTS: tl.constexpr,
    DTYPE: tl.constexpr,
    EXACT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    LOOP: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """partial[program] = sum over its rows of weight*(soft_weight*soft + hard_weight*hard); grad of sum/divisor."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid * ROWS + tl.arange(0, ROWS)
    exists = row < n_rows
    classes = classes * UNIT
    width = width * UNIT
    label, counted, bad = row_labels(labels_ptr, mask_ptr, row, n_rows, classes, ignore_index, ROWS)
    student_start = row_start(row, s_inner, s_outer, s_row, S_FLAT, UNIT)
    teacher_start = row_start(row, t_inner, t_outer, t_row, T_FLAT, UNIT)
    s_scale = tl.full([1], s_scale, DTYPE)
    s_softcap = tl.full([1], s_softcap, DTYPE)
    t_scale = tl.full([1], t_scale, DTYPE)
    t_softcap = tl.full([1], t_softcap, DTYPE)
    eps = tl.full([ROWS], smoothing, DTYPE)
    one = tl.full([ROWS], 1.0, DTYPE)
    n_classes = tl.full([ROWS], classes, DTYPE)
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
    keep = counted[:, None, None] & (col < classes)
    if LOOP:
        ms, mt, ss, st, cross, blocked, s1, spread, _xs, _yt, _ix, _iy, _nans = stream_rows(
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
            SOFT,
            HARD,
            SMOOTH,
            False,
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
        x = read(student_ptr, student_start, col, keep, s_scale, s_softcap, S_SCALED, S_CAPPED, DTYPE, "evict_first")
        y = x
        if SOFT:
            y = read(
                teacher_ptr, teacher_start, col, keep, t_scale, t_softcap, T_SCALED, T_CAPPED, DTYPE, "evict_first"
            )
        ms, mt, ss, st, cross, blocked, s1, spread, _xs, _yt, _ix, _iy, _nans = hold_rows(
            x, y, col, keep, cs, ct, rho, shift, SOFT, HARD, SMOOTH, False
        )

    w = one
    if weight_ptr is not None:
        w = tl.load(weight_ptr + row, mask=counted, other=0.0)
    share = divide(w, one * divisor(normalizer, normalizer_ptr, counts_ptr, n_counts, COUNTS, DTYPE))
    loss = tl.zeros([ROWS], DTYPE)
    q_factor = loss
    ratio = loss
    ratio_rest = loss
    q1_factor = loss
    hard_share = loss
    if SOFT:
        ss = tl.where(bad, float("nan"), valid_sum(ss))
        st = valid_sum(st)
        soft = kl_value(ss, st, cross, blocked, mt, ct, Tt)
        slope = divide(one, Ts)
        if SQUARED:
            soft = soft * (Ts * Ts)
            slope = Ts
        soft_w = row_scalar(soft_weight, soft_weight_ptr, row, exists, 0, ROWS, DTYPE)
        loss += soft_w * soft
        q_factor = divide(slope * (soft_w * share), ss)
        ratio, ratio_rest = split_ratio(ss, st)
    if HARD:
        s1 = tl.where(bad, float("nan"), valid_sum(s1))
        hard_w = row_scalar(hard_weight, hard_weight_ptr, row, exists, 0, ROWS, DTYPE)
        loss += hard_w * hard_value(s1, ms, of_label, spread, eps, n_classes, SMOOTH)
        hard_share = hard_w * share
        q1_factor = divide(hard_share, s1)
    loss = tl.where(counted, w * loss, 0.0)
    tl.store(partial_ptr + pid, tl.sum(loss, 0))

    if grad_ptr is not None:
        label_share = hard_share * (1.0 - eps)
        even_share = divide(hard_share * eps, n_classes)
        grad_row = grad_ptr + (row * width)[:, None, None]
        BLOCK: tl.constexpr = LANES * VEC
        n_tiles = (classes + BLOCK - 1) // BLOCK
        if LOOP:
            for k in range(n_tiles):
                here = col + (n_tiles - 1 - k) * BLOCK
                keep = counted[:, None, None] & (here < classes)
                x = read(
                    student_ptr, student_start, here, keep, s_scale, s_softcap, S_SCALED, S_CAPPED, DTYPE, "evict_first"
                )
                y = x
                if SOFT:
                    y = read(
                        teacher_ptr,
                        teacher_start,
                        here,
                        keep,
                        t_scale,
                        t_softcap,
                        T_SCALED,
                        T_CAPPED,
                        DTYPE,
                        "evict_first",
                    )
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
                    SOFT,
                    HARD,
                    SMOOTH,
                    S_SCALED,
                    S_CAPPED,
                )
                tl.store(
                    grad_row + here,
                    tl.where(keep, grad, 0.0),
                    mask=exists[:, None, None] & (here < width),
                    eviction_policy="evict_first",
                )
        else:
            grad = student_gradient(
                x,
                y,
                col,
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
                SOFT,
                HARD,
                SMOOTH,
                S_SCALED,
                S_CAPPED,
            )
            tl.store(grad_row + col, tl.where(keep, grad, 0.0), mask=exists[:, None, None] & (col < width))
        zero_columns(grad_ptr, row, width, n_tiles * BLOCK, exists, ROWS, 256)


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
    out = stats_ptr + row * 8
    tl.store(out, tl.where(counted, ms, 0.0), mask=exists)
    tl.store(out + 1, tl.where(counted, ls, 0.0), mask=exists)
    tl.store(out + 2, tl.where(counted, mt, 0.0), mask=exists)
    tl.store(out + 3, tl.where(counted, lt, 0.0), mask=exists)
    tl.store(out + 4, tl.where(counted, lse1, 0.0), mask=exists)
    tl.store(out + 5, tl.where(counted, kl, 0.0), mask=exists)
    tl.store(out + 6, tl.zeros([ROWS], DTYPE), mask=exists)
    tl.store(out + 7, tl.zeros([ROWS], DTYPE), mask=exists)
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
