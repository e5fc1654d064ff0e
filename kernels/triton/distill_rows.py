"""Per-row terms of distill_loss, what their gradients need, and the by-products; tiles as in `distill_loss`."""

import triton
import triton.language as tl

from .divergences import DKD, NKD, REVERSE
from .row_statistics import with_label
from .row_values import row_values
from .rows import STATISTICS, columns, divide, power, row_labels
from .sides import read, side, standardized, teacher_side


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
    KIND: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
    TERMS: tl.constexpr,
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
    """soft, hard and stats per row; the by-products with TERMS.

    stats = max x, sum es, max y, sum et (DKD, NKD: over the classes other than the label), sum of exp(x - max x) over
    all classes, D (what takes the factor T^2), and of `Means` (g, h, rest) or (rest, h); for NKD (sum of
    exp(y - max y), h).
    """
    pid = tl.program_id(0).to(tl.int64)
    row = pid * ROWS + tl.arange(0, ROWS)
    exists = row < n_rows
    classes = classes * UNIT
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
    col = columns(LANES, VEC, CONTIGUOUS)
    s, _s = standardized(s, col, counted, classes, ROWS, LANES, VEC)
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
        tl.full([1], a, DTYPE),
        tl.full([1], b, DTYPE),
        KIND,
        HARD,
        SMOOTH,
        TERMS,
        LOOP,
        ROWS,
        LANES,
        VEC,
        DTYPE,
    )

    soft = v.soft
    if SQUARED:
        soft = soft * (s.T * s.T)
    tl.store(soft_ptr + row, tl.where(counted, soft + v.at_one, 0.0), mask=exists)
    tl.store(hard_ptr + row, tl.where(counted, v.hard, 0.0), mask=exists)
    first, second, third = v.means.rest, v.means.h, tl.zeros([ROWS], DTYPE)
    if KIND == NKD:
        first, second = v.t1, v.means.h + v.means.rest
    if KIND >= REVERSE:
        first, third = v.means.g, v.means.rest
    out = stats_ptr + row * STATISTICS
    tl.store(out, tl.where(counted, v.known.ms, 0.0), mask=exists)
    tl.store(out + 1, tl.where(counted, v.known.ss, 0.0), mask=exists)
    tl.store(out + 2, tl.where(counted, v.known.mt, 0.0), mask=exists)
    tl.store(out + 3, tl.where(counted, v.known.st, 0.0), mask=exists)
    tl.store(out + 4, tl.where(counted, v.s1, 0.0), mask=exists)
    tl.store(out + 5, tl.where(counted, v.soft, 0.0), mask=exists)
    tl.store(out + 6, tl.where(counted, first, 0.0), mask=exists)
    tl.store(out + 7, tl.where(counted, second, 0.0), mask=exists)
    tl.store(out + 8, tl.where(counted, third, 0.0), mask=exists)
    for k in tl.static_range(9, STATISTICS):  # what other backends keep
        tl.store(out + k, tl.zeros([ROWS], DTYPE), mask=exists)
    if TERMS:
        ms, ss, xs, ix = v.known.ms, v.known.ss, v.sums.xs, v.sums.ix
        mt, st, yt, iy = v.known.mt, v.known.st, v.sums.yt, v.sums.iy
        nans = v.sums.nans
        if (KIND == DKD) or (KIND == NKD):
            ms, ss, xs, ix = with_label(ms, ss, xs, ix, v.x_label, label, s.c)
            mt, st, yt, iy = with_label(mt, st, yt, iy, v.y_label, label, t.c)
            nans += ((v.x_label != v.x_label) | (v.y_label != v.y_label)).to(tl.int32)
        student_entropy = tl.log(ss) - divide(divide(xs, ss), s.T)
        teacher_entropy = tl.log(st) - divide(divide(yt, st), t.T)
        tl.store(student_entropy_ptr + row, tl.where(counted, student_entropy, 0.0), mask=exists)
        tl.store(teacher_entropy_ptr + row, tl.where(counted, teacher_entropy, 0.0), mask=exists)
        agree = counted & (bad == 0) & (ix == iy) & (nans == 0)
        tl.store(agreement_ptr + row, agree, mask=exists)
        if HARD:
            q_label = divide(power(v.x_label - ms, s.c), ss)
            p_label = tl.where(bad, float("nan"), divide(power(v.y_label - mt, t.c), st))
            tl.store(student_prob_ptr + row, tl.where(counted, q_label, 0.0), mask=exists)
            tl.store(teacher_prob_ptr + row, tl.where(counted, p_label, 0.0), mask=exists)
