"""Gradients of several teachers, their weights and their temperature from that of the logits y = T log p.

p = sum_k w_k p_k with p_k = softmax(y_k/T). With g = dL/dy, r = g/p and A_k = E_{p_k}[r]:
    dL/dy_k = w_k p_k (r - A_k),  dL/dw_k = T A_k (up to the same constant for all k),  dL/dT = -sum dL/dy_k y_k/T.
NKD reads the label's probability at temperature 1 as well, P = sum_k w_k P_k: with G = dL/dP
    dL/dy_k += G w_k P_k,label (e_label - P_k),  dL/dw_k += G P_k,label.
A p that underflows does not bound a p_k that it holds nothing or little of: r comes as ratio*exp(exponent), without
exponents of the divergences whose r grows like a logarithm.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..rows.arithmetic import INF, columns, divide, finite_max
from ..rows.sides import (
    mixture,
    part_label_logit,
    part_log_prob,
    part_prob_at_one,
    place,
    read_one,
    side,
    through_transform,
)
from ..rows.structs import NUMBERS, Numbers, Part, Side
from .gradients import scaled_mean


class MixtureGradients(NamedTuple):
    """ratio, exponent [N, classes] of the arithmetic's dtype: r; at_one [N]: G. d_ptrs, d_widths: tuples, a gradient
    per teacher, or None; d_weights [N, K], d_temperature [N].
    """

    ratio_ptr: tl.tensor
    exponent_ptr: tl.tensor
    at_one_ptr: tl.tensor
    d_ptrs: tl.tuple
    d_widths: tl.tuple
    d_weights_ptr: tl.tensor
    d_temperature_ptr: tl.tensor


@triton.jit
def load_ratio(of, at, here, keep):
    """ratio and exponent of a tile."""
    to = (at.row * at.classes)[:, None, None] + here
    ratio = tl.load(of.ratio_ptr + to, mask=keep, other=0.0)
    exponent = tl.zeros_like(ratio)
    if of.exponent_ptr is not None:
        exponent = tl.load(of.exponent_ptr + to, mask=keep, other=0.0)
    return ratio, exponent


@triton.jit
def part_gradient(t, part, y, here, keep, ratio, exponent, mean, rest, label, of_label, AT_ONE: tl.constexpr):
    """dL/dy_k of a tile; mean + rest: A_k; of_label: G w_k P_k,label. 0 where keep is false or w_k is 0."""
    log_p = divide(y - finite_max(part.top)[:, None, None], t.T[:, None, None]) - part.log_sum[:, None, None]
    mean, rest = scaled_mean(mean[:, None, None], exponent), scaled_mean(rest[:, None, None], exponent)
    grad = tl.exp((log_p + part.log_weight[:, None, None]) + exponent) * ((ratio - mean) - rest)
    grad = tl.where(part.log_weight[:, None, None] == -INF, 0.0, grad)
    if AT_ONE:
        target = tl.where(here == label[:, None, None], 1.0, 0.0)
        grad = grad + of_label[:, None, None] * (target - part_prob_at_one(part, y))
    return tl.where(keep, grad, 0.0)


@triton.jit
def mean_ratios(t, of, less, at, col, how):
    """E_{p_k}[r - less_k] for every teacher k; an infinite less_k is none."""
    N: tl.constexpr = len(t.parts)
    sums = ()
    for _k in tl.static_range(N):
        sums = sums + (tl.zeros([how.ROWS, how.LANES], t.T.dtype),)
    for first in range(0, at.classes, how.LANES * how.VEC):
        here = col + first
        keep = at.counted[:, None, None] & (here < at.classes)
        ratio, exponent = load_ratio(of, at, here, keep)
        more = ()
        for k in tl.static_range(N):
            part = Part(*t.parts[k])
            p_k = tl.exp(part_log_prob(t, part, here, keep, "evict_last") + exponent)
            off = tl.where(tl.abs(less[k]) == INF, 0.0, less[k])[:, None, None]
            more = more + (sums[k] + tl.sum((ratio - scaled_mean(off, exponent)) * p_k, 2),)
        sums = more
    found = ()
    for k in tl.static_range(N):
        found = found + (tl.sum(sums[k], 1),)
    return found


@triton.jit
def standard_drift(t, part, of, mean, rest, of_label, at, col, how):
    """Lane sums of the gradient times y, for the chain rule of standardisation."""
    AT_ONE: tl.constexpr = of.at_one_ptr is not None
    drift = tl.zeros([how.ROWS, how.LANES], t.T.dtype)
    for first in range(0, at.classes, how.LANES * how.VEC):
        here = col + first
        keep = at.counted[:, None, None] & (here < at.classes)
        ratio, exponent = load_ratio(of, at, here, keep)
        y = read_one(t, part, here, keep, "evict_last")
        grad = part_gradient(t, part, y, here, keep, ratio, exponent, mean, rest, at.label, of_label, AT_ONE)
        drift += tl.sum(tl.where(grad == 0.0, 0.0, grad * y), 2)
    return drift


@triton.jit
def write_part(t, part, of, k: tl.constexpr, mean, rest, of_label, moment, at, col, width, how):
    """The gradient of teacher k; returns moment + lane sums of that without at_one times y - max y."""
    AT_ONE: tl.constexpr = of.at_one_ptr is not None
    none = tl.zeros_like(t.T)
    drift = tl.zeros([how.ROWS, how.LANES], t.T.dtype)
    if t.of.STANDARD and of.d_ptrs is not None:
        drift = standard_drift(t, part, of, mean, rest, of_label, at, col, how)
    for first in range(0, width, how.LANES * how.VEC):
        here = col + first
        keep = at.counted[:, None, None] & (here < at.classes)
        ratio, exponent = load_ratio(of, at, here, keep)
        y = read_one(t, part, here, keep, "evict_last")
        if of.d_temperature_ptr is not None:
            grad = part_gradient(t, part, y, here, keep, ratio, exponent, mean, rest, at.label, of_label, False)
            from_top = y - finite_max(part.top)[:, None, None]
            moment += tl.sum(tl.where(grad == 0.0, 0.0, grad * from_top), 2)
        if of.d_ptrs is not None:
            grad = part_gradient(t, part, y, here, keep, ratio, exponent, mean, rest, at.label, of_label, AT_ONE)
            # Its mean over the row is 0.
            grad = through_transform(grad, y, t, part, none, tl.sum(drift, 1) * part.back, at.classes)
            d_width = of.d_widths[k] * t.of.UNIT
            to = of.d_ptrs[k] + (at.row * d_width)[:, None, None] + here
            tl.store(to, tl.where(keep, grad, 0.0), mask=at.exists[:, None, None] & (here < d_width))
    return moment


@triton.jit(do_not_specialize=NUMBERS)
def mixture_backward(
    p,
    of,
    how,
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
):
    """Any of the gradients of `MixtureGradients`."""
    row = tl.program_id(0).to(tl.int64) * how.ROWS + tl.arange(0, how.ROWS)
    at = place(p, row, n_rows, ignore_index, classes * p.teacher.UNIT, how)
    col = columns(how)
    numbers = Numbers(teacher_temperature, t_scale, t_softcap, t_inner, t_outer, t_row)
    first = side(p.teacher, numbers, at, col, how)
    t = Side(p.teacher, *first, None)
    t = Side(p.teacher, *first, mixture(t, p, at, col, of.at_one_ptr is not None, how))
    N: tl.constexpr = len(p.more_ptrs) + 1
    none = tl.zeros_like(t.T)
    nothing = ()
    for _k in tl.static_range(N):
        nothing = nothing + (none,)
    means = mean_ratios(t, of, nothing, at, col, how)
    # Where p_k is nearly all on one class r - A_k is far smaller than r: what rounding left of the mean counts.
    rests = mean_ratios(t, of, means, at, col, how)

    up = none
    if of.at_one_ptr is not None:
        up = tl.load(of.at_one_ptr + row, mask=at.counted, other=0.0)
    moment = tl.zeros([how.ROWS, how.LANES], t.T.dtype)
    for k in tl.static_range(N):
        part = Part(*t.parts[k])
        of_label = none
        if of.at_one_ptr is not None:
            y_label = part_label_logit(t, part, at.label, at.counted)
            of_label = up * tl.exp((y_label - finite_max(part.top)) - part.log_sum_at_one)
        if of.d_weights_ptr is not None:
            d_weight = tl.where(at.counted, (means[k] + rests[k]) * t.T + of_label, 0.0)
            tl.store(of.d_weights_ptr + row * N + k, d_weight, mask=at.exists)
        of_label = tl.exp(part.log_weight) * of_label
        moment = write_part(t, part, of, k, means[k], rests[k], of_label, moment, at, col, width * p.teacher.UNIT, how)
    if of.d_temperature_ptr is not None:
        total = -divide(tl.sum(moment, 1), t.T)
        tl.store(of.d_temperature_ptr + row, tl.where(at.counted, total, 0.0), mask=at.exists)
