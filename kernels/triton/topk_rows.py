"""Per-row terms of distill_loss with a sparse teacher, their by-products, and their gradients from the logits."""

import triton
import triton.language as tl

from .divergences import ALPHA_BETA, NKD
from .row_gradients import Targets, moment, student_soft, teacher_gradient, teacher_soft
from .rows import (
    LAST,
    STATISTICS,
    columns,
    divide,
    finite_max,
    first_column,
    power,
    rescale,
    rescale_moment,
    row_labels,
)
from .sides import label_logit, side, standardized
from .topk_loss import write_student
from .topk_rest import over_tile
from .topk_values import RENORMALIZE, ZERO, constant_in_h, pick, topk_row, topk_slopes


@triton.jit
def entropy(total, weighted, T):
    """Of a softmax from its sum of e = exp((x - max)/T) and the sum of e*(x - max)."""
    return tl.log(total) - divide(divide(weighted, total), T)


@triton.jit
def tile_sums(x, top, c):
    """Sum of e = 2**((x - top)*c) and of e*(x - top)."""
    d = x - finite_max(top)[:, None, None]
    e = power(d, c[:, None, None])
    return over_tile(e), over_tile(tl.where(e > 0.0, e * d, 0.0))


@triton.jit(
    do_not_specialize=[
        "n_rows",
        "ignore_index",
        "grad_soft_stride",
        "grad_hard_stride",
        "classes",
        "s_width",
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
def topk_rows(
    student_ptr,
    teacher_ptr,
    indices_ptr,
    bits_ptr,
    soft_ptr,
    hard_ptr,
    stats_ptr,
    student_entropy_ptr,
    teacher_entropy_ptr,
    student_prob_ptr,
    teacher_prob_ptr,
    agreement_ptr,
    d_student_ptr,
    d_teacher_ptr,
    d_temperature_ptr,
    d_teacher_temperature_ptr,
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
    a: tl.float64,
    b: tl.float64,
    n_rows: tl.int64,
    ignore_index: tl.int64,
    grad_soft_stride: tl.int64,
    grad_hard_stride: tl.int64,
    classes: tl.int32,
    s_width: tl.int32,
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
    TERMS: tl.constexpr,
    SQUARED: tl.constexpr,
    S_SCALED: tl.constexpr,
    S_CAPPED: tl.constexpr,
    S_STANDARD: tl.constexpr,
    DTYPE: tl.constexpr,
    EXACT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """soft and hard [N] with, of TERMS, the by-products; or, where grad_soft is given, any of the gradients:
    d_student [N, width], d_teacher [N, listed], d_temperature and d_teacher_temperature [N]. None: not wanted.
    """
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    exists = row < n_rows
    classes = classes * UNIT
    s_width = s_width * UNIT
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
    a = tl.full([1], a, DTYPE)
    b = tl.full([1], b, DTYPE)
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
        a,
        b,
        KIND,
        TAIL,
        LOGPROBS,
        HARD,
        SMOOTH,
        TERMS,
        SLOTS,
        LANES,
        VEC,
        DTYPE,
    )
    if soft_ptr is not None:
        soft = v.soft
        if SQUARED:
            soft = soft * (s.T * s.T)
        tl.store(soft_ptr + row, tl.where(counted, soft + v.at_one, 0.0), mask=exists)
        tl.store(hard_ptr + row, tl.where(counted, v.hard, 0.0), mask=exists)
        for k in tl.static_range(STATISTICS):  # the backward starts again from the logits
            tl.store(stats_ptr + row * STATISTICS + k, tl.zeros([1], DTYPE), mask=exists)
    if TERMS:
        x = tl.where(v.listed, v.x, float("-inf"))
        top = tl.max(tl.max(x, 2), 1)
        row_top = tl.maximum(top, v.rest.top - v.shift)
        total, weighted = tile_sums(x, row_top, s.c)
        below = v.rest.top - v.shift - finite_max(row_top)
        total += rescale(v.rest.total, v.rest.top - v.shift, row_top, s.c)
        weighted += rescale_moment(v.rest.moment, v.rest.total, below, v.rest.top - v.shift, row_top, s.c)
        total = tl.where(v.bad, float("nan"), total)
        tl.store(student_entropy_ptr + row, tl.where(counted, entropy(total, weighted, s.T), 0.0), mask=exists)
        y_top = tl.max(tl.max(v.y, 2), 1)
        y_total, y_weighted = tile_sums(v.y, y_top, t.c)
        y_entropy = entropy(y_total, y_weighted, t.T)
        tl.store(teacher_entropy_ptr + row, tl.where(counted, y_entropy, 0.0), mask=exists)
        best = tl.max(tl.max(tl.where(v.listed, v.y, float("-inf")), 2), 1)
        slot = tl.min(tl.min(tl.where(v.listed & (v.y == best[:, None, None]), v.slot, LAST), 2), 1)
        iy = over_tile(tl.where(v.slot == slot[:, None, None], v.column, 0))
        ix = tl.min(first_column(tl.where(v.listed, x, float("nan")), top[:, None, None], v.column), 1)
        rest_top = v.rest.top - v.shift
        ix = tl.where(rest_top > top, v.rest.column, tl.where(rest_top == top, tl.minimum(ix, v.rest.column), ix))
        nans = v.rest.nans + over_tile((v.listed & ((v.x != v.x) | (v.y != v.y))).to(tl.int32))
        tl.store(agreement_ptr + row, counted & (v.bad == 0) & (ix == iy) & (nans == 0), mask=exists)
        if HARD:
            x_label = label_logit(s, label, counted) - v.shift
            q_label = divide(power(x_label - finite_max(row_top), s.c), total)
            at_label = v.listed & (v.slot == v.label[:, None, None])
            weight = power(v.y - finite_max(y_top)[:, None, None], t.c[:, None, None])
            p_label = tl.where(v.bad, float("nan"), divide(pick(weight, at_label), y_total))
            tl.store(student_prob_ptr + row, tl.where(counted, q_label, 0.0), mask=exists)
            tl.store(teacher_prob_ptr + row, tl.where(counted, p_label, 0.0), mask=exists)

    if grad_soft_ptr is not None:
        none = tl.zeros([1], DTYPE)
        g_soft = tl.load(grad_soft_ptr + row * grad_soft_stride, mask=counted, other=0.0).to(DTYPE)
        slope = divide(g_soft, s.T)
        t_slope = divide(g_soft, t.T)
        if SQUARED:
            slope = g_soft * s.T
            t_slope = t_slope * (s.T * s.T)
        g_hard = none
        if HARD:
            g_hard = tl.load(grad_hard_ptr + row * grad_hard_stride, mask=counted, other=0.0).to(DTYPE)
        if d_student_ptr is not None:
            slopes = topk_slopes(v, s, t, slope, g_hard, g_soft * v.p1, smoothing, classes, KIND)
            write_student(
                d_student_ptr,
                v,
                s,
                slopes,
                bits,
                row,
                exists,
                counted,
                label,
                classes,
                s_width,
                col,
                s_back,
                KIND,
                TAIL,
                HARD,
                SMOOTH,
                LANES * VEC,
            )
        compared = v.listed | v.at_rest
        if d_temperature_ptr is not None:
            grad = student_soft(v.x, v.seen, v.slot, v.label, s, t, v.known, v.means, KIND)
            # The rest moves with the mean of its logits.
            mean = v.rest.top - v.shift + divide(v.rest.moment, tl.where(v.rest.total == 0.0, 1.0, v.rest.total))
            x = tl.where(v.at_rest, mean[:, None, None], v.x)
            total = tl.sum(moment(tl.where(compared, grad, 0.0), x, finite_max(v.known.ms)), 1)
            if KIND == ALPHA_BETA and TAIL == ZERO:
                below = tl.where(v.rest.total == 0.0, 0.0, v.rest.top - v.shift - finite_max(v.known.ms))
                total += v.power_share * (v.rest.power_moment + v.rest.powers * below)
                total -= v.share * v.means.g * (v.rest.moment + v.rest.total * below)
            if SQUARED:
                total = 2.0 * (s.T * v.soft) - total
            else:
                total = -divide(total, s.T * s.T)
            tl.store(d_temperature_ptr + row, tl.where(counted, g_soft * total, 0.0), mask=exists)
        p_rest = none
        if TAIL == ZERO:
            p_rest = power(pick(v.y, v.at_rest) - finite_max(v.known.mt), t.c) * v.known.inv_t
        of_rest = -p_rest * (constant_in_h(a, b, KIND) + v.means.h)
        if d_teacher_ptr is not None:
            up = -g_soft * v.at_one
            targets = Targets(v.t_top, none, none, none)
            if KIND == NKD:
                targets = Targets(v.t_top, divide(up, v.t1), up, none)
            grad = teacher_gradient(v.x, v.seen, v.slot, v.label, s, t, v.known, v.means, t_slope, targets, KIND)
            if TAIL == ZERO:
                grad = tl.where(v.at_rest, (of_rest * t_slope)[:, None, None], grad)
            if LOGPROBS and TAIL != RENORMALIZE:
                pull = divide(pick(grad, v.at_rest), tl.where(v.left == 0.0, 1.0, v.left))
                grad = grad - tl.exp(v.y) * tl.where(v.left == 0.0, 0.0, pull)[:, None, None]
            to = d_teacher_ptr + (row * listed)[:, None, None] + v.slot
            inside = exists[:, None, None] & (v.slot < listed)
            tl.store(to, tl.where(v.listed, grad, 0.0), mask=inside)
        if d_teacher_temperature_ptr is not None:
            grad = teacher_soft(v.x, v.seen, v.slot, v.label, s, t, v.known, v.means, KIND)
            if TAIL == ZERO:
                grad = tl.where(v.at_rest, of_rest[:, None, None], grad)
            total = tl.sum(moment(tl.where(compared, grad, 0.0), v.y, finite_max(v.known.mt)), 1)
            total = -divide(total, t.T)
            tl.store(d_teacher_temperature_ptr + row, tl.where(counted, t_slope * total, 0.0), mask=exists)
