"""Values of a row with a sparse teacher: the listed classes and the rest, as one class, are a tile [1, SLOTS, 1].

The rest's logits are that of the student, T log sum exp(x/T) over its classes, and log(1 - sum of the listed
probabilities). So everything is that of a whole row of K + 1 classes (`row_values`), and the gradient of an unlisted
class is that of the rest times its share. Tail RENORMALIZE has no rest. Tail ZERO takes the teacher's rest out again
after the softening: p sums to less than 1, which shows in the value and in E_p[h] by the constant in h.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .divergences import ALPHA_BETA, DKD, FORWARD_POINT, NKD, SKEW, SKEW_REVERSE
from .row_gradients import Known, Means, Targets, raised, student_soft, targets_gradient
from .row_statistics import hold_rows
from .row_values import prob_at_one, soft_value, surprise_at_one
from .rows import INF, LAST, LOG2E, divide, finite_max, hard_value, power, valid_sum
from .sides import Side, label_logit, read
from .topk_rest import Rest, mark_listed, no_rest, over_tile, rest_sums

BUCKET = tl.constexpr(0)
RENORMALIZE = tl.constexpr(1)
ZERO = tl.constexpr(2)


class TopKRow(NamedTuple):
    """x (minus shift), y, column and its masks are tiles, all else is [1]. shift is the largest of the student's logits
    that are compared, shift + top that of all.

    seen: y as the divergence sees it. label: where it stands in the tile. left: exp(y) of the rest. share, power_share:
    of ALPHA_BETA with the tail ZERO, q over exp((x - top)/T) and q g over its power, of an unlisted class. at_one, p1:
    NKD's first part and its p. s1, of all classes, and u1, of those that NKD compares: sums of exp(x), the latter
    relative to u_top.
    """

    x: tl.tensor
    y: tl.tensor
    seen: tl.tensor
    slot: tl.tensor
    column: tl.tensor
    listed: tl.tensor
    at_rest: tl.tensor
    label: tl.tensor
    shift: tl.tensor
    top: tl.tensor
    rest: Rest
    left: tl.tensor
    share: tl.tensor
    power_share: tl.tensor
    soft: tl.tensor
    hard: tl.tensor
    at_one: tl.tensor
    p1: tl.tensor
    s1: tl.tensor
    u_top: tl.tensor
    u1: tl.tensor
    t_top: tl.tensor
    t1: tl.tensor
    bad: tl.tensor
    known: Known
    means: Means


@triton.jit
def pick(tile, wanted):
    """The one element of a tile where ``wanted``, [1]; 0 if none is."""
    return over_tile(tl.where(wanted, tile, 0.0))


@triton.jit
def constant_in_h(a, b, KIND: tl.constexpr):
    """What `pointwise` has left out of h, and with the opposite sign of f per p - q."""
    if KIND == FORWARD_POINT:
        return a * 0.0 + 1.0
    elif KIND == SKEW:
        return b
    elif KIND == SKEW_REVERSE:
        return -a
    else:
        return a * 0.0


@triton.jit
def topk_row(
    s: Side,
    t: Side,
    indices_ptr,
    bits,
    row,
    counted,
    bad,
    label,
    classes,
    listed_classes,
    words,
    col,
    smoothing,
    a,
    b,
    KIND: tl.constexpr,
    TAIL: tl.constexpr,
    LOGPROBS: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
    TERMS: tl.constexpr,
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Values of one row; NaN where `bad`, an index is out of range or twice, or a label that D needs is not listed."""
    APART: tl.constexpr = (KIND == DKD) or (KIND == NKD)
    POWERS: tl.constexpr = (KIND == ALPHA_BETA) and (TAIL == ZERO)
    none = tl.zeros([1], DTYPE)
    slot = tl.arange(0, SLOTS)[None, :, None]
    listed = counted[:, None, None] & (slot < listed_classes)
    at_rest = counted[:, None, None] & (slot == listed_classes) & (TAIL != RENORMALIZE)
    index = tl.load(indices_ptr + (row * listed_classes)[:, None, None] + slot, mask=listed, other=0)
    inside = listed & (index >= 0) & (index < classes)
    column = tl.where(inside, index, 0).to(tl.int32)
    bad = bad | mark_listed(bits, column, inside, words, col, LANES * VEC)
    bad = bad | (over_tile((listed & (inside == 0)).to(tl.int32)) > 0)
    label_slot = tl.min(tl.min(tl.where(listed & (index == label[:, None, None]), slot, LAST), 2), 1)
    if APART:
        bad = bad | (counted & (label_slot == LAST))

    of_label = none
    if HARD:
        of_label = label_logit(s, label, counted)
    near_label = tl.where(tl.abs(of_label) < INF, of_label, 0.0)
    rest = no_rest(DTYPE)
    if HARD or TERMS or (TAIL != RENORMALIZE):
        AT_ONE: tl.constexpr = HARD or (KIND == NKD)
        rest = rest_sums(
            s, bits, col, counted, classes, near_label, a + b, POWERS, AT_ONE, SMOOTH, TERMS, LANES, VEC, DTYPE
        )
    x = read(s, column, listed, "evict_last")
    spread = over_tile(tl.where(listed, x - near_label[:, None, None], 0.0)) + rest.spread
    shift = tl.max(tl.max(x, 2), 1)
    over_all = finite_max(tl.maximum(shift, rest.top))
    shift = over_all if TAIL != RENORMALIZE else finite_max(shift)
    top = over_all - shift
    x = x - shift[:, None, None]
    rest_x = tl.where(rest.total == 0.0, -INF, (rest.top - shift) + s.T * tl.log(rest.total))
    x = tl.where(at_rest, rest_x[:, None, None], x)
    y = read(t, slot, listed, "evict_last")
    left = none
    if LOGPROBS and TAIL != RENORMALIZE:
        left = (1.0 - over_tile(tl.exp(y.to(tl.float64)))).to(DTYPE)
        left = tl.where(left < 0.0, 0.0, left)
    rest_y = tl.where(left == 0.0, -INF, tl.log(left))
    y = tl.where(at_rest, rest_y[:, None, None], y)

    compared = listed | at_rest
    ms, mt, sums = hold_rows(x, y, slot, compared, s, t, label_slot, none, KIND, False, False, False)
    x_label, y_label = none, none
    if APART:
        at_label = listed & (slot == label_slot[:, None, None])
        x_label, y_label = pick(x, at_label), pick(y, at_label)
    seen = y
    if TAIL == ZERO:
        seen = tl.where(at_rest, -INF, y)
    if POWERS:  # sum q^degree is not (sum q)^degree
        x = tl.where(at_rest, -INF, x)
    soft = soft_value(
        x,
        seen,
        s,
        t,
        slot,
        counted,
        bad,
        label_slot,
        x_label,
        y_label,
        classes,
        ms,
        mt,
        sums,
        a,
        b,
        KIND,
        False,
        1,
        SLOTS,
        1,
    )
    value, means, lost, share, power_share = soft.value, soft.means, none, none, none
    if TAIL == ZERO:
        p_rest = power(rest_y - finite_max(mt), t.c) * soft.known.inv_t
        lost = constant_in_h(a, b, KIND) * p_rest
        value = value - lost
        means = Means(means.g, means.h - lost, means.rest)
    if POWERS:  # f = q^degree/(a degree), q g = q^degree/a
        from_top = rest.top - shift - finite_max(ms)
        share = power(from_top, s.c) * soft.known.inv_s
        power_share = divide(raised(from_top, s.c, soft.known.ss, a + b), a)
        value = value + divide(power_share * rest.powers, a + b)
        means = Means(means.g + power_share * rest.powers, means.h, means.rest)

    c1 = tl.full([1], LOG2E, s.c.dtype)
    of_listed = tl.where(listed, power(x - top[:, None, None], c1[:, None, None]), 0.0)
    s1 = rest.at_one * power(rest.top - over_all, c1) + over_tile(of_listed)
    s1 = tl.where(bad, float("nan"), valid_sum(s1))
    hard, at_one, p1, u_top, u1 = none, none, none, top, s1
    if HARD:
        eps, n_classes = tl.full([1], smoothing, DTYPE), tl.full([1], classes, DTYPE)
        hard = hard_value(s1, over_all, of_label, spread, eps, n_classes, SMOOTH)
    if KIND == NKD:
        if TAIL == RENORMALIZE:
            u_top, u1 = soft.s_top, soft.s1
        p1 = prob_at_one(t, label, counted, y_label, soft.t_top, soft.t1)
        at_one = tl.where(p1 == 0.0, 0.0, p1 * surprise_at_one(x_label, u_top, u1))
    return TopKRow(
        x,
        y,
        seen,
        slot,
        column,
        listed,
        at_rest,
        label_slot,
        shift,
        top,
        rest,
        left,
        share,
        power_share,
        value,
        hard,
        at_one,
        p1,
        s1,
        u_top,
        u1,
        soft.t_top,
        soft.t1,
        bad,
        soft.known,
        means,
    )


class Slopes(NamedTuple):
    """tile: slope*dD/du of the compared classes. rest: that of an unlisted class per exp((x - top)/T), and power: per
    its power. hard, unit: targets. asked: whether hard counts.
    """

    tile: tl.tensor
    rest: tl.tensor
    power: tl.tensor
    hard: Targets
    unit: Targets
    asked: tl.tensor


@triton.jit
def topk_slopes(v, s, t, slope, hard_share, at_one, smoothing, classes, KIND: tl.constexpr):
    """at_one: the upstream gradient of NKD's first part times p."""
    none = tl.zeros_like(slope)
    n_classes = none + classes
    eps = (none + smoothing).to(none.dtype)
    tile = student_soft(v.x, v.seen, v.slot, v.label, s, t, v.known, v.means, KIND) * slope[:, None, None]
    rest = pick(tile, v.at_rest)
    rest = tl.where(v.rest.total == 0.0, 0.0, divide(rest, tl.where(v.rest.total == 0.0, 1.0, v.rest.total)))
    rest = rest - slope * v.share * v.means.g
    kept = hard_share * (1.0 - eps * divide(n_classes - 1.0, n_classes))
    hard = Targets(v.top, divide(hard_share, v.s1), kept, divide(hard_share * eps, n_classes))
    unit = Targets(v.u_top, divide(at_one, v.u1), at_one, none)
    return Slopes(tile, rest, slope * v.power_share, hard, unit, hard_share != 0.0)


@triton.jit
def hard_gradient(x, here, label, s, slopes, SMOOTH: tl.constexpr):
    """Of the labels; 0 where they do not count: no NaN of a class that nothing else looks at."""
    grad = targets_gradient(x, here, label, slopes.hard, s.c, SMOOTH)
    return tl.where(slopes.asked[:, None, None], grad, 0.0)


@triton.jit
def listed_gradient(v, s, slopes, label, KIND: tl.constexpr, HARD: tl.constexpr, SMOOTH: tl.constexpr):
    """Of the transformed logits of the listed classes."""
    grad = slopes.tile
    if HARD:
        grad = grad + hard_gradient(v.x, v.column, label, s, slopes, SMOOTH)
    if KIND == NKD:
        grad = grad + targets_gradient(v.x, v.column, label, slopes.unit, s.c, False)
    return grad


@triton.jit
def unlisted_gradient(
    x,
    here,
    v,
    s,
    slopes,
    label,
    KIND: tl.constexpr,
    TAIL: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """Of the transformed logits of the other classes of a tile."""
    grad = tl.zeros_like(x)
    if TAIL != RENORMALIZE:
        from_top = x - finite_max(v.rest.top)[:, None, None]
        grad = power(from_top, s.c[:, None, None]) * slopes.rest[:, None, None]
        if KIND == ALPHA_BETA and TAIL == ZERO:
            degree = v.known.a + v.known.b
            grad = grad + raised(from_top, s.c[:, None, None], 1.0 + 0.0 * degree, degree) * slopes.power[:, None, None]
    x = x - v.shift[:, None, None]
    if HARD:
        grad = grad + hard_gradient(x, here, label, s, slopes, SMOOTH)
    if KIND == NKD and TAIL != RENORMALIZE:
        grad = grad + targets_gradient(x, here, label, slopes.unit, s.c, False)
    return grad
