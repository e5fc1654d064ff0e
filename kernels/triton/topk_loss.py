"""distill_loss with a sparse teacher: the scalar loss and its gradient.

One program per row: the K listed classes are a tile of their own (`topk_values`), the student's row streams past once
for the sums over the other classes and once for their gradient. Numbers and strides arrive as in `distill_loss`.
"""

import triton
import triton.language as tl

from .reduce import divisor
from .rows import columns, divide, row_labels, row_scalar
from .sides import read, side, standardized, through_transform
from .topk_rest import is_listed, over_tile
from .topk_values import listed_gradient, topk_row, topk_slopes, unlisted_gradient


@triton.jit
def write_student(
    grad_ptr,
    v,
    s,
    slopes,
    bits,
    row,
    exists,
    counted,
    label,
    classes,
    width,
    col,
    back,
    KIND: tl.constexpr,
    TAIL: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The student's gradient."""
    grad_row = grad_ptr + (row * width)[:, None, None]
    of_listed = listed_gradient(v, s, slopes, label, KIND, HARD, SMOOTH)
    x_listed = v.x + v.shift[:, None, None]
    middle, drift = back, back
    if s.STANDARD:
        total = over_tile(tl.where(v.listed, of_listed, 0.0))
        moment = over_tile(tl.where(v.listed, of_listed * x_listed, 0.0))
        for first in range(0, classes, BLOCK):
            here = col + first
            keep = counted[:, None, None] & (here < classes)
            others = keep & (is_listed(bits, here, keep) == 0)
            x = read(s, here, keep, "evict_last")
            grad = unlisted_gradient(x, here, v, s, slopes, label, KIND, TAIL, HARD, SMOOTH)
            total += over_tile(tl.where(others, grad, 0.0))
            moment += over_tile(tl.where(others, grad * x, 0.0))
        middle, drift = divide(total, tl.zeros_like(total) + classes), moment * back
    n_tiles = (width + BLOCK - 1) // BLOCK
    for k in range(n_tiles):
        here = col + (n_tiles - 1 - k) * BLOCK
        keep = counted[:, None, None] & (here < classes)
        x = read(s, here, keep, "evict_first")
        grad = unlisted_gradient(x, here, v, s, slopes, label, KIND, TAIL, HARD, SMOOTH)
        grad = through_transform(grad, x, s, middle, drift, classes)
        tl.store(grad_row + here, tl.where(keep, grad, 0.0), mask=exists[:, None, None] & (here < width))
    tl.debug_barrier()  # whole vectors first, then the listed classes among them
    of_listed = through_transform(of_listed, x_listed, s, middle, drift, classes)
    tl.store(grad_row + v.column, of_listed, mask=v.listed)


@triton.jit(
    do_not_specialize=[
        "n_rows",
        "n_counts",
        "ignore_index",
        "classes",
        "width",
        "listed",
        "words",
        "s_inner",
        "s_outer",
        "s_row",
        "t_inner",
        "t_outer",
        "t_row",
    ]
)
def topk_scalar(
    student_ptr,
    teacher_ptr,
    indices_ptr,
    bits_ptr,
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
    a: tl.float64,
    b: tl.float64,
    n_rows: tl.int64,
    n_counts: tl.int64,
    ignore_index: tl.int64,
    classes: tl.int32,
    width: tl.int32,
    listed: tl.int32,
    words: tl.int32,
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
    TAIL: tl.constexpr,
    LOGPROBS: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
    SQUARED: tl.constexpr,
    S_SCALED: tl.constexpr,
    S_CAPPED: tl.constexpr,
    S_STANDARD: tl.constexpr,
    COUNTS: tl.constexpr,
    DTYPE: tl.constexpr,
    EXACT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """partial[row] = weight*(soft_weight*soft + hard_weight*hard); grad of sum/divisor."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    exists = row < n_rows
    classes = classes * UNIT
    width = width * UNIT
    label, counted, bad = row_labels(labels_ptr, mask_ptr, row, n_rows, classes, ignore_index, 1)
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
        1,
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
        1.0,
        1.0,
        1,
        T_FLAT,
        TT_STEP,
        False,
        False,
        False,
        EXACT,
        1,
        DTYPE,
    )
    col = columns(LANES, VEC, CONTIGUOUS)
    s, s_back = standardized(s, col, counted, classes, 1, LANES, VEC)
    bits = bits_ptr + (row * words)[:, None, None]
    v = topk_row(
        s,
        t,
        indices_ptr,
        bits,
        row,
        counted,
        bad,
        label,
        classes,
        listed,
        words,
        col,
        smoothing,
        tl.full([1], a, DTYPE),
        tl.full([1], b, DTYPE),
        KIND,
        TAIL,
        LOGPROBS,
        HARD,
        SMOOTH,
        False,
        SLOTS,
        LANES,
        VEC,
        DTYPE,
    )

    one = tl.full([1], 1.0, DTYPE)
    w = one
    if weight_ptr is not None:
        w = tl.load(weight_ptr + row, mask=counted, other=0.0)
    share = divide(w, one * divisor(normalizer, normalizer_ptr, counts_ptr, n_counts, COUNTS, DTYPE))
    soft = v.soft.to(tl.float64)
    slope = divide(one, s.T)
    if SQUARED:
        soft = soft * s.T * s.T
        slope = s.T
    soft_w = row_scalar(soft_weight, soft_weight_ptr, row, exists, 0, 1, tl.float64)
    loss = soft_w * (soft + v.at_one)
    soft_share = soft_w.to(DTYPE) * share
    hard_share = tl.zeros([1], DTYPE)
    if HARD:
        hard_w = row_scalar(hard_weight, hard_weight_ptr, row, exists, 0, 1, tl.float64)
        loss += hard_w * v.hard
        hard_share = hard_w.to(DTYPE) * share
    tl.store(partial_ptr + row, tl.where(counted, w * loss, 0.0), mask=exists)
    if grad_ptr is not None:
        slopes = topk_slopes(v, s, t, slope * soft_share, hard_share, soft_share * v.p1, smoothing, classes, KIND)
        write_student(
            grad_ptr,
            v,
            s,
            slopes,
            bits,
            row,
            exists,
            counted,
            label,
            classes,
            width,
            col,
            s_back,
            KIND,
            TAIL,
            HARD,
            SMOOTH,
            LANES * VEC,
        )
