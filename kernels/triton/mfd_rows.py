"""The parts of the single pass of mfd_loss that do not pool: products of tiles, losses of logits and pool weights."""

import triton
import triton.language as tl

from .divergences import NKD, NONE
from .row_gradients import Targets, student_gradient
from .row_values import row_values
from .rows import INTERPRETED, columns, divide, row_labels, row_scalar
from .sides import read, side


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
def pool_targets(target_ptr, row, on, M: tl.constexpr, DTYPE: tl.constexpr):
    """Tuple of the teacher's pool weights, 0 where `on` is not."""
    target = ()
    for m in tl.static_range(M):
        target = target + (tl.load(target_ptr + row * M + m, mask=on[m], other=0.0).to(DTYPE),)
    return target


@triton.jit
def pool_divergence(target_ptr, row, counted, logs, M: tl.constexpr, DTYPE: tl.constexpr):
    """KL(teacher's pool weights || weights) with 0*log 0 = 0, at least 0; logs: of the weights."""
    kl = tl.zeros(row.shape, DTYPE)
    for m in tl.static_range(M):
        p = tl.load(target_ptr + row * M + m, mask=counted, other=0.0).to(DTYPE)
        kl += tl.where(p == 0.0, 0.0, p * (tl.log(tl.where(p == 0.0, 1.0, p)) - logs[m]))
    return tl.where(kl < 0.0, 0.0, kl)


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
    a,
    b,
    n_rows,
    ignore_index,
    classes,
    z_stride,
    T_FLAT: tl.constexpr,
    T_STEP: tl.constexpr,
    TT_STEP: tl.constexpr,
    KIND: tl.constexpr,
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

    The sum of dz over these rows goes to head_bias_partial[pid], added if `add`. KIND: the divergence.
    """
    exists = row < n_rows
    label, counted, bad = row_labels(labels_ptr, mask_ptr, row, n_rows, classes, ignore_index, ROWS)
    one = tl.full([ROWS], 1.0, DTYPE)
    s = side(
        z_ptr,
        row,
        exists,
        1,
        0,
        z_stride,
        temperature,
        temperature_ptr,
        1.0,
        1.0,
        1,
        True,
        T_STEP,
        False,
        False,
        False,
        EXACT,
        ROWS,
        DTYPE,
    )
    t = side(
        teacher_ptr,
        row,
        exists,
        teacher_inner,
        teacher_outer,
        teacher_stride,
        teacher_temperature,
        teacher_temperature_ptr,
        1.0,
        1.0,
        UNIT,
        T_FLAT,
        TT_STEP,
        False,
        False,
        False,
        EXACT,
        ROWS,
        DTYPE,
    )
    col = columns(LANES, VEC, CONTIGUOUS)
    v = row_values(
        one,
        one,
        s,
        t,
        col,
        counted,
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
        False,
        True,
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
    soft, hard, loss = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
    slope = divide(one, s.T)
    hard_share = tl.zeros([ROWS], DTYPE)
    at_one = hard_share
    if KIND != NONE:
        soft = v.soft.to(tl.float64)
        if SQUARED:
            soft = soft * s.T * s.T
            slope = s.T
        soft_w = row_scalar(soft_weight, soft_weight_ptr, row, exists, 0, ROWS, tl.float64)
        soft = tl.where(counted, share64 * (soft + v.at_one), 0.0)
        loss += soft_w * soft
        slope = slope * (soft_w.to(DTYPE) * share)
        if KIND == NKD:
            at_one = soft_w.to(DTYPE) * share * v.p1
    if HARD:
        hard_w = row_scalar(hard_weight, hard_weight_ptr, row, exists, 0, ROWS, tl.float64)
        hard = tl.where(counted, share64 * v.hard, 0.0)
        loss += hard_w * hard
        hard_share = hard_w.to(DTYPE) * share
    if dz_ptr is not None:
        OPERAND: tl.constexpr = dz_ptr.dtype.element_ty
        eps = tl.full([ROWS], smoothing, DTYPE)
        n_classes = tl.full([ROWS], classes, DTYPE)
        kept = hard_share * (1.0 - eps * divide(n_classes - 1.0, n_classes)) + at_one
        targets = Targets(v.s_top, divide(hard_share + at_one, v.s1), kept, divide(hard_share * eps, n_classes))
        for first in range(0, z_stride, LANES * VEC):
            here = col + first
            keep = counted[:, None, None] & (here < classes)
            x = read(s, here, keep, "evict_last")
            y = x
            if KIND != NONE:
                y = read(t, here, keep, "evict_first")
            grad = student_gradient(x, y, here, label, s, t, v.known, v.means, slope, targets, KIND, HARD, SMOOTH)
            grad = tl.where(keep, grad, 0.0)
            to = dz_ptr + (row * z_stride)[:, None, None] + here
            tl.store(to, operand(grad, OPERAND), mask=exists[:, None, None] & (here < z_stride))
            if head_bias_partial_ptr is not None:
                at = head_bias_partial_ptr + pid * classes + here
                before = tl.load(at, mask=(here < classes) & add, other=0.0)
                tl.store(at, before + tl.sum(grad, 0, keep_dims=True), mask=here < classes)
    return loss, soft, hard
