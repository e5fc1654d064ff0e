"""distill_loss over rows of logits: the scalar loss and its gradient. Formulas in `mfd_fast.ops.distill_loss`.

Rows that are not counted (mask, ignore_index) are not read and give 0. A counted row with a label out of range
gives NaN. Offsets of rows are int64; there is one grid dimension. Numbers arrive as float64 and are rounded to
DTYPE, the dtype of the arithmetic (float32, or float64 for float64 logits). Strides and column counts arrive
divided by UNIT, a power of two: so the compiler sees the alignment of every row. KIND is the divergence with its
parameters a, b (`divergences`).

With LOOP a row is longer than a tile: one pass for the statistics, one more for the sums of a pointwise divergence,
and one in reverse order for the gradient, so that it starts on the columns that are still in cache. Without LOOP
the tile holds whole rows and is read once.
"""

import triton
import triton.language as tl

from .divergences import NKD, NONE
from .reduce import divisor
from .row_gradients import Targets, student_gradient
from .row_values import row_values
from .rows import columns, divide, row_labels, row_scalar
from .sides import read, side, standardized, teacher_side, through_transform


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
    more_ptrs,
    more_inner,
    more_outer,
    more_row,
    weights_ptr,
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
    COUNTS: tl.constexpr,
    DTYPE: tl.constexpr,
    EXACT: tl.constexpr,
    WEIGHTS_PER_ROW: tl.constexpr,
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
    one = tl.full([ROWS], 1.0, DTYPE)
    col = columns(LANES, VEC, CONTIGUOUS)
    s, s_back = standardized(s, col, counted, classes, ROWS, LANES, VEC)
    t, _t_back = teacher_side(
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
    keep = counted[:, None, None] & (col < classes)
    x = read(s, col, keep, "evict_last" if LOOP else "evict_first")
    y = x
    if KIND != NONE:
        y = read(t, col, keep, "evict_last" if LOOP else "evict_first")
    v = row_values(
        x,
        y,
        s,
        t,
        col,
        keep,
        counted,
        bad,
        label,
        classes,
        smoothing,
        a,
        b,
        KIND,
        HARD,
        SMOOTH,
        False,
        LOOP,
        ROWS,
        LANES,
        VEC,
        DTYPE,
    )

    w = one
    if weight_ptr is not None:
        w = tl.load(weight_ptr + row, mask=counted, other=0.0)
    share = divide(w, one * divisor(normalizer, normalizer_ptr, counts_ptr, n_counts, COUNTS, DTYPE))
    loss = tl.zeros([ROWS], tl.float64)
    slope = divide(one, s.T)
    at_one = tl.zeros([ROWS], DTYPE)
    hard_share = at_one
    if KIND != NONE:
        soft = v.soft.to(tl.float64)
        if SQUARED:
            soft = soft * s.T * s.T
            slope = s.T
        soft_w = row_scalar(soft_weight, soft_weight_ptr, row, exists, 0, ROWS, tl.float64)
        loss += soft_w * (soft + v.at_one)
        slope = slope * (soft_w.to(DTYPE) * share)
        if KIND == NKD:
            at_one = soft_w.to(DTYPE) * share * v.p1
    if HARD:
        hard_w = row_scalar(hard_weight, hard_weight_ptr, row, exists, 0, ROWS, tl.float64)
        loss += hard_w * v.hard
        hard_share = hard_w.to(DTYPE) * share
    loss = tl.where(counted, w * loss, 0.0)
    tl.store(partial_ptr + pid, tl.sum(loss, 0))

    if grad_ptr is not None:
        n_classes = tl.full([ROWS], classes, DTYPE)
        eps = tl.full([ROWS], smoothing, DTYPE)
        kept = hard_share * (1.0 - eps * divide(n_classes - 1.0, n_classes)) + at_one
        targets = Targets(v.s_top, divide(hard_share + at_one, v.s1), kept, divide(hard_share * eps, n_classes))
        BLOCK: tl.constexpr = LANES * VEC
        middle, drift = one, one
        if S_STANDARD:
            total = tl.zeros([ROWS, LANES], DTYPE)
            moment = total
            for first in range(0, classes, BLOCK):
                here = col + first
                keep = counted[:, None, None] & (here < classes)
                x = read(s, here, keep, "evict_last")
                y = x
                if KIND != NONE:
                    y = read(t, here, keep, "evict_last")
                grad = student_gradient(x, y, here, label, s, t, v.known, v.means, slope, targets, KIND, HARD, SMOOTH)
                total += tl.sum(tl.where(keep, grad, 0.0), 2)
                moment += tl.sum(tl.where(keep, grad * x, 0.0), 2)
            middle, drift = divide(tl.sum(total, 1), n_classes), tl.sum(moment, 1) * s_back
        n_tiles = (width + BLOCK - 1) // BLOCK if LOOP else 1
        for k in range(n_tiles):
            here = col
            if LOOP:
                here = col + (n_tiles - 1 - k) * BLOCK
            keep = counted[:, None, None] & (here < classes)
            if LOOP:
                x = read(s, here, keep, "evict_first")
                y = x
                if KIND != NONE:
                    y = read(t, here, keep, "evict_first")
            grad = student_gradient(x, y, here, label, s, t, v.known, v.means, slope, targets, KIND, HARD, SMOOTH)
            grad = through_transform(grad, x, s, middle, drift, classes)
            to = grad_ptr + (row * width)[:, None, None] + here
            tl.store(to, tl.where(keep, grad, 0.0), mask=exists[:, None, None] & (here < width))
