"""The parts of the single pass of mfd_loss that do not pool: products of tiles, losses of logits and pool weights."""

import triton
import triton.language as tl

from ..distill.divergences import NKD, NONE
from ..distill.gradients import student_gradient
from ..distill.scalar import label_targets
from ..distill.values import row_values
from ..rows.arithmetic import INTERPRETED, columns, divide, row_scalar
from ..rows.sides import place, read, side
from ..rows.structs import Numbers, Side


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
def write_dz(out, v, s, t, at, col, add, pid, slope, targets, z_stride, how):
    """dz of these rows, 0 beyond the classes; its sum over them goes to head_bias_partial[pid], added if `add`."""
    OPERAND: tl.constexpr = out.dz_ptr.dtype.element_ty
    for first in range(0, z_stride, how.LANES * how.VEC):
        here = col + first
        keep = at.counted[:, None, None] & (here < at.classes)
        x = read(s, here, keep, "evict_last")
        y = x
        if how.DIVERGENCE != NONE:
            y = read(t, here, keep, "evict_first")
        grad = student_gradient(x, y, here, at.label, s, t, v.known, v.means, slope, targets, how)
        grad = tl.where(keep, grad, 0.0)
        to = out.dz_ptr + (at.row * z_stride)[:, None, None] + here
        tl.store(to, operand(grad, OPERAND), mask=at.exists[:, None, None] & (here < z_stride))
        if out.head_bias_partial_ptr is not None:
            to = out.head_bias_partial_ptr + pid * at.classes + here
            before = tl.load(to, mask=(here < at.classes) & add, other=0.0)
            tl.store(to, before + tl.sum(grad, 0, keep_dims=True), mask=here < at.classes)


@triton.jit
def logit_rows(p, loss, out, row, add, pid, per_row, of, how):
    """[ROWS] shares of loss, soft and hard in the total, from the parked logits z; writes dz.

    ``p``: its student's logits are z; ``of``: the numbers, `MFDNumbers`.
    """
    at = place(p, row, of.n_rows, of.ignore_index, of.classes, how)
    col = columns(how)
    z_numbers = Numbers(of.temperature, 1.0, 1.0, 1, 0, of.z_stride)
    t_numbers = Numbers(of.teacher_temperature, 1.0, 1.0, of.t_inner, of.t_outer, of.t_row)
    s = Side(p.student, *side(p.student, z_numbers, at, col, how), None)
    t = Side(p.teacher, *side(p.teacher, t_numbers, at, col, how), None)
    one = tl.full([how.ROWS], 1.0, tl.float32)
    a, b = tl.full([1], of.a, tl.float32), tl.full([1], of.b, tl.float32)
    v = row_values(one, one, s, t, at, col, of.smoothing, a, b, how)
    w = one
    if loss.weight_ptr is not None:
        w = tl.load(loss.weight_ptr + row, mask=at.counted, other=0.0)
    share64 = w.to(tl.float64) * per_row
    share = share64.to(tl.float32)
    soft, hard = tl.zeros([how.ROWS], tl.float64), tl.zeros([how.ROWS], tl.float64)
    total = soft
    slope = divide(one, s.T)
    hard_share = tl.zeros([how.ROWS], tl.float32)
    at_one = hard_share
    if how.DIVERGENCE != NONE:
        soft = v.soft.to(tl.float64)
        if how.SQUARED:
            soft = soft * s.T * s.T
            slope = s.T
        soft_w = row_scalar(of.soft_weight, loss.soft_weight_ptr, row, at.exists, 0, how.ROWS, tl.float64)
        soft = tl.where(at.counted, share64 * (soft + v.at_one), 0.0)
        total += soft_w * soft
        slope = slope * (soft_w.to(tl.float32) * share)
        if how.DIVERGENCE == NKD:
            at_one = soft_w.to(tl.float32) * share * v.p1
    if how.HARD:
        hard_w = row_scalar(of.hard_weight, loss.hard_weight_ptr, row, at.exists, 0, how.ROWS, tl.float64)
        hard = tl.where(at.counted, share64 * v.hard, 0.0)
        total += hard_w * hard
        hard_share = hard_w.to(tl.float32) * share
    if out.dz_ptr is not None:
        targets = label_targets(v, hard_share, at_one, of.smoothing, at.classes, how)
        write_dz(out, v, s, t, at, col, add, pid, slope, targets, of.z_stride, how)
    return total, soft, hard
