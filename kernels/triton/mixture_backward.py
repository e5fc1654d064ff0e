"""Gradients of several teachers, their weights and their temperature from that of the logits y = T log p.

p = sum_k w_k p_k with p_k = softmax(y_k/T). With g = dL/dy, r = g/p and A_k = E_{p_k}[r]:
    dL/dy_k = w_k p_k (r - A_k),  dL/dw_k = T A_k (up to the same constant for all k),  dL/dT = -sum dL/dy_k y_k/T.
"""

import triton
import triton.language as tl

from .rows import columns, divide, finite_max, row_labels
from .sides import log_mixture, mixture, part_log_prob, read_one, side, through_transform


@triton.jit
def gradient_over_probability(grad_row, t, here, keep):
    """g/p of a tile, 0 where p is 0."""
    p = tl.exp(log_mixture(t, here, keep, "evict_last"))
    grad = tl.load(grad_row + here, mask=keep, other=0.0)
    return tl.where(p == 0.0, 0.0, divide(grad, tl.where(p == 0.0, 1.0, p)))


@triton.jit(do_not_specialize=["n_rows", "ignore_index", "classes", "width", "t_inner", "t_outer", "t_row"])
def mixture_backward(
    grad_ptr,
    teacher_ptr,
    d_ptrs,
    d_widths,
    d_weights_ptr,
    d_temperature_ptr,
    more_ptrs,
    more_inner,
    more_outer,
    more_row,
    weights_ptr,
    labels_ptr,
    mask_ptr,
    teacher_temperature_ptr,
    teacher_temperature: tl.float64,
    t_scale: tl.float64,
    t_softcap: tl.float64,
    n_rows: tl.int64,
    ignore_index: tl.int64,
    classes: tl.int32,
    width: tl.int32,
    t_inner: tl.int64,
    t_outer: tl.int64,
    t_row: tl.int64,
    UNIT: tl.constexpr,
    T_FLAT: tl.constexpr,
    TT_STEP: tl.constexpr,
    T_SCALED: tl.constexpr,
    T_CAPPED: tl.constexpr,
    T_STANDARD: tl.constexpr,
    DTYPE: tl.constexpr,
    EXACT: tl.constexpr,
    WEIGHTS_PER_ROW: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """grad [N, classes] of DTYPE; d_ptrs, d_widths: a gradient per teacher; d_weights [N, K], d_temperature [N]."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid * ROWS + tl.arange(0, ROWS)
    exists = row < n_rows
    classes = classes * UNIT
    width = width * UNIT
    _label, counted, _bad = row_labels(labels_ptr, mask_ptr, row, n_rows, classes, ignore_index, ROWS)
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
    t = mixture(
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
        ROWS,
        LANES,
        VEC,
    )
    N: tl.constexpr = len(more_ptrs) + 1
    BLOCK: tl.constexpr = LANES * VEC
    grad_row = grad_ptr + (row * classes)[:, None, None]
    zero = tl.zeros([ROWS, LANES], DTYPE)
    sums = ()
    for _k in tl.static_range(N):
        sums = sums + (zero,)
    for first in range(0, classes, BLOCK):
        here = col + first
        keep = counted[:, None, None] & (here < classes)
        ratio = gradient_over_probability(grad_row, t, here, keep)
        more = ()
        for k in tl.static_range(N):
            p_k = tl.exp(part_log_prob(t.parts[k], here, keep, "evict_last"))
            more = more + (sums[k] + tl.sum(ratio * p_k, 2),)
        sums = more

    moment = zero
    for first in range(0, width, BLOCK):
        here = col + first
        keep = counted[:, None, None] & (here < classes)
        ratio = gradient_over_probability(grad_row, t, here, keep)
        for k in tl.static_range(N):
            of = t.parts[k]
            mean = tl.sum(sums[k], 1)[:, None, None]
            y = read_one(of.side, here, keep, "evict_first")
            weighted = tl.exp(part_log_prob(of, here, keep, "evict_first") + of.log_weight[:, None, None])
            grad = tl.where(keep, weighted * (ratio - mean), 0.0)
            if d_temperature_ptr is not None:
                from_top = y - finite_max(of.top)[:, None, None]
                moment += tl.sum(tl.where(grad == 0.0, 0.0, grad * from_top), 2)
            if d_ptrs is not None:
                grad = tl.where(keep, through_transform(grad, y, of.side, of.top, of.top), 0.0)
                d_width = d_widths[k] * UNIT
                to = d_ptrs[k] + (row * d_width)[:, None, None] + here
                tl.store(to, grad, mask=exists[:, None, None] & (here < d_width))
    if d_weights_ptr is not None:
        for k in tl.static_range(N):
            mean = tl.sum(sums[k], 1) * t.T
            tl.store(d_weights_ptr + row * N + k, tl.where(counted, mean, 0.0), mask=exists)
    if d_temperature_ptr is not None:
        total = -divide(tl.sum(moment, 1), t.T)
        tl.store(d_temperature_ptr + row, tl.where(counted, total, 0.0), mask=exists)
