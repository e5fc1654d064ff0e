"""The parts of the single pass of mfd_loss that do not pool: products of tiles, losses of logits and pool weights."""

import triton
import triton.language as tl

from .row_gradients import split_ratio, student_gradient
from .row_statistics import stream_rows
from .rows import (
    INTERPRETED,
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


@triton.jit
def operand(x, DTYPE: tl.constexpr):
    """x rounded to the dtype of a matrix product; the interpreter's own rounding to bfloat16 loses a carry."""
    if INTERPRETED and (tl.bfloat16 == DTYPE):
        bits = x.to(tl.uint32, bitcast=True)
        kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, kept.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def multiply_add(a, b, total):
    """total + a b; float32 operands keep float32 accuracy; the interpreter cannot multiply bfloat16."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def reciprocal(x):
    """1/x in float64 by Newton's iteration: a division would be a call, around which registers are spilled."""
    r = divide(tl.full(x.shape, 1.0, tl.float32), x.to(tl.float32)).to(tl.float64)
    r = r * (2.0 - x * r)
    return r * (2.0 - x * r)


@triton.jit
def pool_divergence(target_ptr, row, counted, weights, M: tl.constexpr, DTYPE: tl.constexpr):
    """KL(teacher's pool weights || weights) with 0*log 0 = 0, at least 0; the teacher's weights and their sum."""
    kl, total = tl.zeros(row.shape, DTYPE), tl.zeros(row.shape, DTYPE)
    target = ()
    for m in tl.static_range(M):
        p = tl.load(target_ptr + row * M + m, mask=counted, other=0.0).to(DTYPE)
        a = tl.where(p == 0.0, 1.0, weights[m])
        kl += p * (tl.log(tl.where(p == 0.0, 1.0, p)) - tl.log(a))
        total += p
        target = target + (p,)
    return tl.where(kl < 0.0, 0.0, kl), target, total


@triton.jit
def logit_rows(
    row,
    add,
    pid,
    per_row,
    z_ptr,
    dz_ptr,
    head_bias_partial_ptr,
    teacher_ptr,
    teacher_inner,
    teacher_outer,
    teacher_stride,
    labels_ptr,
    mask_ptr,
    weight_ptr,
    temperature_ptr,
    teacher_temperature_ptr,
    soft_weight_ptr,
    hard_weight_ptr,
    temperature,
    teacher_temperature,
    soft_weight,
    hard_weight,
    smoothing,
    n_rows,
    ignore_index,
    classes,
    z_stride,
    T_FLAT: tl.constexpr,
    T_STEP: tl.constexpr,
    TT_STEP: tl.constexpr,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
    SQUARED: tl.constexpr,
    EXACT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """[ROWS] shares of loss, soft and hard in the total, from the parked logits z; writes dz.

    The sum of dz over these rows goes to head_bias_partial[pid], added if `add`.
    """
    exists = row < n_rows
    label, counted, bad = row_labels(labels_ptr, mask_ptr, row, n_rows, classes, ignore_index, ROWS)
    one = tl.full([ROWS], 1.0, DTYPE)
    z_row = row * z_stride
    teacher_start = row_start(row, teacher_inner, teacher_outer, teacher_stride, T_FLAT, UNIT)
    Ts = row_scalar(temperature, temperature_ptr, row, exists, T_STEP, ROWS, DTYPE)
    Tt = row_scalar(teacher_temperature, teacher_temperature_ptr, row, exists, TT_STEP, ROWS, DTYPE)
    cs = per_temperature(Ts, EXACT)
    ct = per_temperature(Tt, EXACT)
    of_label = tl.zeros([ROWS], DTYPE)
    if HARD:
        of_label = label_logit(z_ptr, z_row, label, counted, 1.0, 1.0, False, False, DTYPE)
    shift = tl.where(tl.abs(of_label) < float("inf"), of_label, 0.0)
    col = columns(LANES, VEC, CONTIGUOUS)
    ms, mt, ss, st, cross, blocked, s1, spread, _xs, _yt, _ix, _iy, _nans = stream_rows(
        z_ptr,
        z_row,
        teacher_ptr,
        teacher_start,
        col,
        counted,
        classes,
        cs,
        ct,
        divide(Tt, Ts),
        shift,
        1.0,
        1.0,
        1.0,
        1.0,
        SOFT,
        HARD,
        SMOOTH,
        False,
        False,
        False,
        False,
        False,
        ROWS,
        LANES,
        VEC,
        DTYPE,
    )
    w = one
    if weight_ptr is not None:
        w = tl.load(weight_ptr + row, mask=counted, other=0.0)
    share64 = w.to(tl.float64) * per_row
    share = share64.to(DTYPE)
    none = tl.zeros([ROWS], DTYPE)
    soft, hard, loss = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
    q_factor, ratio, ratio_rest, q1_factor, hard_share = none, none, none, none, none
    if SOFT:
        ss = tl.where(bad, float("nan"), valid_sum(ss))
        st = valid_sum(st)
        soft = kl_value(ss, st, cross, blocked, mt, ct, Tt).to(tl.float64)
        slope = divide(one, Ts)
        if SQUARED:
            soft = soft * Ts * Ts
            slope = Ts
        soft_w = row_scalar(soft_weight, soft_weight_ptr, row, exists, 0, ROWS, tl.float64)
        soft = tl.where(counted, share64 * soft, 0.0)
        loss += soft_w * soft
        q_factor = divide(slope * (soft_w.to(DTYPE) * share), ss)
        ratio, ratio_rest = split_ratio(ss, st)
    eps = tl.full([ROWS], smoothing, DTYPE)
    n_classes = tl.full([ROWS], classes, DTYPE)
    if HARD:
        s1 = tl.where(bad, float("nan"), valid_sum(s1))
        hard_w = row_scalar(hard_weight, hard_weight_ptr, row, exists, 0, ROWS, tl.float64)
        hard = hard_value(s1, ms, of_label, spread, eps, n_classes, SMOOTH)
        hard = tl.where(counted, share64 * hard, 0.0)
        loss += hard_w * hard
        hard_share = hard_w.to(DTYPE) * share
        q1_factor = divide(hard_share, s1)
    if dz_ptr is not None:
        OPERAND: tl.constexpr = dz_ptr.dtype.element_ty
        label_share = hard_share * (1.0 - eps * divide(n_classes - 1.0, n_classes))
        even_share = divide(hard_share * eps, n_classes)
        for first in range(0, z_stride, LANES * VEC):
            here = col + first
            keep = counted[:, None, None] & (here < classes)
            x = read(z_ptr, z_row, here, keep, 1.0, 1.0, False, False, DTYPE, "evict_last")
            y = x
            if SOFT:
                y = read(teacher_ptr, teacher_start, here, keep, 1.0, 1.0, False, False, DTYPE, "evict_first")
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
                1.0,
                1.0,
                SOFT,
                HARD,
                SMOOTH,
                False,
                False,
            )
            grad = tl.where(keep, grad, 0.0)
            to = dz_ptr + z_row[:, None, None] + here
            tl.store(to, operand(grad, OPERAND), mask=exists[:, None, None] & (here < z_stride))
            if head_bias_partial_ptr is not None:
                at = head_bias_partial_ptr + pid * classes + here
                before = tl.load(at, mask=(here < classes) & add, other=0.0)
                tl.store(at, before + tl.sum(grad, 0, keep_dims=True), mask=here < classes)
    return loss, soft, hard
