"""Gradients of several teachers, their weights and their temperature from that of the logits y = T log p.

p = sum_k w_k p_k with p_k = softmax(y_k/T). With g = dL/dy, r = g/p and A_k = E_{p_k}[r]:
    dL/dy_k = w_k p_k (r - A_k),  dL/dw_k = T A_k (up to the same constant for all k),  dL/dT = -sum dL/dy_k y_k/T.
NKD reads the label's probability at temperature 1 as well, P = sum_k w_k P_k: with G = dL/dP
    dL/dy_k += G w_k P_k,label (e_label - P_k),  dL/dw_k += G P_k,label.
A p that underflows does not bound a p_k that it holds nothing or little of: r comes as ratio*exp(exponent), without
exponents of the divergences whose r grows like a logarithm.
"""

import triton
import triton.language as tl

from .row_gradients import scaled_mean
from .rows import INF, columns, divide, finite_max, row_labels
from .sides import (
    label_logit,
    part_log_prob,
    part_prob_at_one,
    read_one,
    side,
    teacher_side,
    through_transform,
)


@triton.jit
def load_ratio(ratio_ptr, exponent_ptr, at, keep):
    """ratio and exponent of a tile."""
    ratio = tl.load(ratio_ptr + at, mask=keep, other=0.0)
    exponent = tl.zeros_like(ratio)
    if exponent_ptr is not None:
        exponent = tl.load(exponent_ptr + at, mask=keep, other=0.0)
    return ratio, exponent


@triton.jit
def part_gradient(of, y, here, keep, ratio, exponent, mean, rest, label, of_label, AT_ONE: tl.constexpr):
    """dL/dy_k of a tile; mean + rest: A_k; of_label: G w_k P_k,label. 0 where keep is false or w_k is 0."""
    log_p = divide(y - finite_max(of.top)[:, None, None], of.side.T[:, None, None]) - of.log_sum[:, None, None]
    mean, rest = scaled_mean(mean[:, None, None], exponent), scaled_mean(rest[:, None, None], exponent)
    grad = tl.exp((log_p + of.log_weight[:, None, None]) + exponent) * ((ratio - mean) - rest)
    grad = tl.where(of.log_weight[:, None, None] == -INF, 0.0, grad)
    if AT_ONE:
        target = tl.where(here == label[:, None, None], 1.0, 0.0)
        grad = grad + of_label[:, None, None] * (target - part_prob_at_one(of, y))
    return tl.where(keep, grad, 0.0)


@triton.jit
def mean_ratios(
    t,
    ratio_ptr,
    exponent_ptr,
    at,
    less,
    col,
    counted,
    classes,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """E_{p_k}[r - less_k] for every teacher k; an infinite less_k is none."""
    N: tl.constexpr = len(t.parts)
    sums = ()
    for _k in tl.static_range(N):
        sums = sums + (tl.zeros([ROWS, LANES], t.T.dtype),)
    for first in range(0, classes, LANES * VEC):
        here = col + first
        keep = counted[:, None, None] & (here < classes)
        ratio, exponent = load_ratio(ratio_ptr, exponent_ptr, at + here, keep)
        more = ()
        for k in tl.static_range(N):
            p_k = tl.exp(part_log_prob(t.parts[k], here, keep, "evict_last") + exponent)
            off = tl.where(tl.abs(less[k]) == INF, 0.0, less[k])[:, None, None]
            more = more + (sums[k] + tl.sum((ratio - scaled_mean(off, exponent)) * p_k, 2),)
        sums = more
    found = ()
    for k in tl.static_range(N):
        found = found + (tl.sum(sums[k], 1),)
    return found


@triton.jit(do_not_specialize=["n_rows", "ignore_index", "classes", "width", "t_inner", "t_outer", "t_row"])
def mixture_backward(
    ratio_ptr,
    exponent_ptr,
    at_one_ptr,
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
    """ratio, exponent [N, classes] of DTYPE: r. d_ptrs, d_widths: a gradient per teacher; d_weights [N, K],
    d_temperature [N].
    """
    pid = tl.program_id(0).to(tl.int64)
    row = pid * ROWS + tl.arange(0, ROWS)
    exists = row < n_rows
    classes = classes * UNIT
    width = width * UNIT
    label, counted, _bad = row_labels(labels_ptr, mask_ptr, row, n_rows, classes, ignore_index, ROWS)
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
        at_one_ptr is not None,
        ROWS,
        LANES,
        VEC,
    )
    N: tl.constexpr = len(more_ptrs) + 1
    BLOCK: tl.constexpr = LANES * VEC
    AT_ONE: tl.constexpr = at_one_ptr is not None
    at = (row * classes)[:, None, None]
    zero = tl.zeros([ROWS, LANES], DTYPE)
    nothing = ()
    for _k in tl.static_range(N):
        nothing = nothing + (tl.zeros([ROWS], DTYPE),)
    means = mean_ratios(t, ratio_ptr, exponent_ptr, at, nothing, col, counted, classes, ROWS, LANES, VEC)
    # Where p_k is nearly all on one class r - A_k is far smaller than r: what rounding left of the mean counts.
    rests = mean_ratios(t, ratio_ptr, exponent_ptr, at, means, col, counted, classes, ROWS, LANES, VEC)

    up = tl.zeros([ROWS], DTYPE)
    if at_one_ptr is not None:
        up = tl.load(at_one_ptr + row, mask=counted, other=0.0)
    moment = zero
    for k in tl.static_range(N):
        of = t.parts[k]
        mean, rest = means[k], rests[k]
        of_label = tl.zeros([ROWS], DTYPE)
        if at_one_ptr is not None:
            y_label = label_logit(of.side, label, counted)
            of_label = up * tl.exp((y_label - finite_max(of.top)) - of.log_sum_at_one)
        if d_weights_ptr is not None:
            tl.store(d_weights_ptr + row * N + k, tl.where(counted, (mean + rest) * t.T + of_label, 0.0), mask=exists)
        of_label = tl.exp(of.log_weight) * of_label
        drift = zero
        if T_STANDARD and d_ptrs is not None:
            for first in range(0, classes, BLOCK):
                here = col + first
                keep = counted[:, None, None] & (here < classes)
                ratio, exponent = load_ratio(ratio_ptr, exponent_ptr, at + here, keep)
                y = read_one(of.side, here, keep, "evict_last")
                grad = part_gradient(of, y, here, keep, ratio, exponent, mean, rest, label, of_label, AT_ONE)
                drift += tl.sum(tl.where(grad == 0.0, 0.0, grad * y), 2)
        for first in range(0, width, BLOCK):
            here = col + first
            keep = counted[:, None, None] & (here < classes)
            ratio, exponent = load_ratio(ratio_ptr, exponent_ptr, at + here, keep)
            y = read_one(of.side, here, keep, "evict_last")
            if d_temperature_ptr is not None:
                grad = part_gradient(of, y, here, keep, ratio, exponent, mean, rest, label, of_label, False)
                from_top = y - finite_max(of.top)[:, None, None]
                moment += tl.sum(tl.where(grad == 0.0, 0.0, grad * from_top), 2)
            if d_ptrs is not None:
                grad = part_gradient(of, y, here, keep, ratio, exponent, mean, rest, label, of_label, AT_ONE)
                # Its mean over the row is 0.
                grad = through_transform(grad, y, of.side, tl.zeros([ROWS], DTYPE), tl.sum(drift, 1) * of.back, classes)
                d_width = d_widths[k] * UNIT
                to = d_ptrs[k] + (row * d_width)[:, None, None] + here
                tl.store(to, tl.where(keep, grad, 0.0), mask=exists[:, None, None] & (here < d_width))
    if d_temperature_ptr is not None:
        total = -divide(tl.sum(moment, 1), t.T)
        tl.store(d_temperature_ptr + row, tl.where(counted, total, 0.0), mask=exists)
