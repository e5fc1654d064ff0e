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

from .reduce import divisor
from .row_gradients import split_ratio, student_gradient
from .row_statistics import hold_rows, stream_rows
from .rows import (
    columns,
    divide,
    hard_value,
    kl_value,
    label_logit,
    per_temperature,
    read,
    row_labels,
    row_scalar,
    row_start,
    valid_sum,
)


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
    none = tl.zeros([ROWS], DTYPE)
    q_factor, ratio, ratio_rest, q1_factor, hard_share = none, none, none, none, none
    loss = tl.zeros([ROWS], tl.float64)
    if SOFT:
        ss = tl.where(bad, float("nan"), valid_sum(ss))
        st = valid_sum(st)
        soft = kl_value(ss, st, cross, blocked, mt, ct, Tt).to(tl.float64)
        slope = divide(one, Ts)
        if SQUARED:
            soft = soft * Ts * Ts
            slope = Ts
        soft_w = row_scalar(soft_weight, soft_weight_ptr, row, exists, 0, ROWS, tl.float64)
        loss += soft_w * soft
        q_factor = divide(slope * (soft_w.to(DTYPE) * share), ss)
        ratio, ratio_rest = split_ratio(ss, st)
    if HARD:
        s1 = tl.where(bad, float("nan"), valid_sum(s1))
        hard_w = row_scalar(hard_weight, hard_weight_ptr, row, exists, 0, ROWS, tl.float64)
        loss += hard_w * hard_value(s1, ms, of_label, spread, eps, n_classes, SMOOTH)
        hard_share = hard_w.to(DTYPE) * share
        q1_factor = divide(hard_share, s1)
    loss = tl.where(counted, w * loss, 0.0)
    tl.store(partial_ptr + pid, tl.sum(loss, 0))

    if grad_ptr is not None:
        label_share = hard_share * (1.0 - eps * divide(n_classes - 1.0, n_classes))
        even_share = divide(hard_share * eps, n_classes)
        grad_row = grad_ptr + (row * width)[:, None, None]
        BLOCK: tl.constexpr = LANES * VEC
        if LOOP:
            n_tiles = (width + BLOCK - 1) // BLOCK
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
