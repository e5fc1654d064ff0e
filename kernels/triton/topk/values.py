"""Values of a row with a sparse teacher: the listed classes and the rest, as one class, are a tile [1, SLOTS, 1].

The rest's logits are that of the student, T log sum exp(x/T) over its classes, and log(1 - sum of the listed
probabilities). So everything is that of a whole row of K + 1 classes (`row_values`), and the gradient of an unlisted
class is that of the rest times its share. Tail RENORMALIZE has no rest. Tail ZERO takes the teacher's rest out again
after the softening: p sums to less than 1, which shows in the value and in E_p[h] by the constant in h.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..distill.divergences import ALPHA_BETA, DKD, FORWARD_POINT, NKD, SKEW, SKEW_REVERSE
from ..distill.gradients import Known, Means, Targets, raised, student_soft, targets_gradient
from ..distill.statistics import hold_rows
from ..distill.values import prob_at_one, soft_value, surprise_at_one
from ..rows.arithmetic import (
    INF,
    LAST,
    LOG2E,
    divide,
    finite_max,
    hard_value,
    power,
    rescale,
    rescale_moment,
    valid_sum,
)
from ..rows.sides import label_logit, read
from ..rows.structs import How, Place
from .rest import Rest, mark_listed, n_words, no_rest, over_tile, rest_sums

BUCKET = tl.constexpr(0)
RENORMALIZE = tl.constexpr(1)
ZERO = tl.constexpr(2)
PADDING = tl.constexpr(-(2**63))


class Listed(NamedTuple):
    """The listed classes: indices [N, K], PADDING where one only pads the list, and, per row, a bitmap for `rest`.

    TAIL: what is made of the other classes. LOGPROBS: the teacher gives log-probabilities. SLOTS: room for K + 1.
    tile: the listed classes and the rest as whole rows of a divergence alone.
    """

    indices_ptr: tl.tensor
    bits_ptr: tl.tensor
    TAIL: tl.constexpr
    LOGPROBS: tl.constexpr
    SLOTS: tl.constexpr
    tile: How


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
def constant_in_h(a, b, how):
    """What `pointwise` has left out of h, and with the opposite sign of f per p - q."""
    if how.DIVERGENCE == FORWARD_POINT:
        return a * 0.0 + 1.0
    elif how.DIVERGENCE == SKEW:
        return b
    elif how.DIVERGENCE == SKEW_REVERSE:
        return -a
    else:
        return a * 0.0


class Slots(NamedTuple):
    """The listed classes of a row and the rest as one more, as tiles but for label, bad [1]; fields as in `TopKRow`."""

    slot: tl.tensor
    column: tl.tensor
    listed: tl.tensor
    at_rest: tl.tensor
    label: tl.tensor
    bad: tl.tensor


@triton.jit
def load_slots(p, bits, at, col, n_listed, how):
    """`Slots` of a row, whose bitmap is set; bad: also an index out of range or twice, or a label that is not listed
    where the divergence needs it.
    """
    DECOUPLED: tl.constexpr = (how.DIVERGENCE == DKD) or (how.DIVERGENCE == NKD)
    slot = tl.arange(0, p.SLOTS)[None, :, None]
    listed = at.counted[:, None, None] & (slot < n_listed)
    at_rest = at.counted[:, None, None] & (slot == n_listed) & (p.TAIL != RENORMALIZE)
    index = tl.load(p.indices_ptr + (at.row * n_listed)[:, None, None] + slot, mask=listed, other=0)
    listed = listed & (index != PADDING)
    inside = listed & (index >= 0) & (index < at.classes)
    column = tl.where(inside, index, 0).to(tl.int32)
    bad = at.bad | mark_listed(bits, column, inside, n_words(at.classes), col, how.LANES * how.VEC)
    bad = bad | (over_tile((listed & (inside == 0)).to(tl.int32)) > 0)
    label = tl.min(tl.min(tl.where(listed & (index == at.label[:, None, None]), slot, LAST), 2), 1)
    if DECOUPLED:
        bad = bad | (at.counted & (label == LAST))
    return Slots(slot, column, listed, at_rest, label, bad)


class Compared(NamedTuple):
    """Logits of both sides as the tile has them, and what goes with them; fields as in `TopKRow`.

    over_all: the largest logit of the row. of_label: that of the label; spread: sum of x - shift over all classes.
    rest_y: the teacher's rest.
    """

    x: tl.tensor
    y: tl.tensor
    shift: tl.tensor
    top: tl.tensor
    over_all: tl.tensor
    left: tl.tensor
    rest_y: tl.tensor
    of_label: tl.tensor
    spread: tl.tensor
    rest: Rest


@triton.jit
def compare(s, t, p, slots, bits, at, col, a, b, how):
    """`Compared` from one read of the student's row."""
    POWERS: tl.constexpr = (how.DIVERGENCE == ALPHA_BETA) and (p.TAIL == ZERO)
    none = tl.zeros_like(s.T)
    of_label = none
    if how.HARD:
        of_label = label_logit(s, at.label, at.counted)
    near_label = tl.where(tl.abs(of_label) < INF, of_label, 0.0)
    rest = no_rest(none.dtype)
    if how.HARD or how.TERMS or (p.TAIL != RENORMALIZE):
        AT_ONE: tl.constexpr = how.HARD or (how.DIVERGENCE == NKD)
        rest = rest_sums(s, bits, at, col, near_label, a + b, POWERS, AT_ONE, how)
    x = read(s, slots.column, slots.listed, "evict_last")
    spread = over_tile(tl.where(slots.listed, x - near_label[:, None, None], 0.0)) + rest.spread
    shift = tl.max(tl.max(x, 2), 1)
    over_all = finite_max(tl.maximum(shift, rest.top))
    shift = over_all if p.TAIL != RENORMALIZE else finite_max(shift)
    x = x - shift[:, None, None]
    rest_x = tl.where(rest.total == 0.0, -INF, (rest.top - shift) + s.T * tl.log(rest.total))
    x = tl.where(slots.at_rest, rest_x[:, None, None], x)
    y = read(t, slots.slot, slots.listed, "evict_last")
    left = none
    if p.LOGPROBS and p.TAIL != RENORMALIZE:
        left = (1.0 - over_tile(tl.exp(y.to(tl.float64)))).to(none.dtype)
        left = tl.where(left < 0.0, 0.0, left)
        left = tl.where(over_tile(slots.listed.to(tl.int32)) == at.classes, 0.0, left)
    rest_y = tl.where(left == 0.0, -INF, tl.log(left))
    y = tl.where(slots.at_rest, rest_y[:, None, None], y)
    return Compared(x, y, shift, over_all - shift, over_all, left, rest_y, of_label, spread, rest)


@triton.jit
def topk_row(s, t, p, bits, at, col, n_listed, smoothing, a, b, how):
    """Values of one row; NaN where `bad`, an index is out of range or twice, or a label that D needs is not listed."""
    DECOUPLED: tl.constexpr = (how.DIVERGENCE == DKD) or (how.DIVERGENCE == NKD)
    POWERS: tl.constexpr = (how.DIVERGENCE == ALPHA_BETA) and (p.TAIL == ZERO)
    none = tl.zeros_like(s.T)
    slots = load_slots(p, bits, at, col, n_listed, how)
    bad = slots.bad
    d = compare(s, t, p, slots, bits, at, col, a, b, how)
    x, y, shift, top, rest = d.x, d.y, d.shift, d.top, d.rest

    slot_at = Place(at.row, at.exists, slots.label, at.counted, at.labelled, bad, at.classes)
    compared = slots.listed | slots.at_rest
    ms, mt, sums = hold_rows(x, y, slots.slot, compared, s, t, slots.label, none, p.tile)
    x_label, y_label = none, none
    if DECOUPLED:
        at_label = slots.listed & (slots.slot == slots.label[:, None, None])
        x_label, y_label = pick(x, at_label), pick(y, at_label)
    seen = y
    if p.TAIL == ZERO:
        seen = tl.where(slots.at_rest, -INF, y)
    if POWERS:  # sum q^degree is not (sum q)^degree
        x = tl.where(slots.at_rest, -INF, x)
    soft = soft_value(x, seen, s, t, slot_at, slots.slot, x_label, y_label, ms, mt, sums, a, b, p.tile)
    value, means, lost, share, power_share = soft.value, soft.means, none, none, none
    if p.TAIL == ZERO:
        p_rest = power(d.rest_y - finite_max(mt), t.c) * soft.known.inv_t
        lost = constant_in_h(a, b, how) * p_rest
        value = value - lost
        means = Means(means.g, means.h - lost, means.rest)
    if POWERS:  # f = q^degree/(a degree), q g = q^degree/a
        from_top = rest.top - shift - finite_max(ms)
        share = power(from_top, s.c) * soft.known.inv_s
        power_share = divide(raised(from_top, s.c, soft.known.ss, a + b), a)
        value = value + divide(power_share * rest.powers, a + b)
        means = Means(means.g + power_share * rest.powers, means.h, means.rest)

    c1 = tl.full([1], LOG2E, s.c.dtype)
    of_listed = tl.where(slots.listed, power(x - top[:, None, None], c1[:, None, None]), 0.0)
    s1 = rest.at_one * power(rest.top - d.over_all, c1) + over_tile(of_listed)
    s1 = tl.where(bad, float("nan"), valid_sum(s1))
    hard, at_one, p1, u_top, u1 = none, none, none, top, s1
    if how.HARD:
        eps, n_classes = tl.full([1], smoothing, none.dtype), tl.full([1], at.classes, none.dtype)
        hard = tl.where(at.labelled, hard_value(s1, d.over_all, d.of_label, d.spread, eps, n_classes, how.SMOOTH), 0.0)
    if how.DIVERGENCE == NKD:
        if p.TAIL == RENORMALIZE:
            u_top, u1 = soft.s_top, soft.s1
        p1 = prob_at_one(t, slots.label, at.counted, y_label, soft.t_top, soft.t1)
        at_one = tl.where(p1 == 0.0, 0.0, p1 * surprise_at_one(x_label, u_top, u1))
    tiles = (x, y, seen, slots.slot, slots.column, slots.listed, slots.at_rest, slots.label)
    values = (value, hard, at_one, p1, s1, u_top, u1, soft.t_top, soft.t1, bad)
    return TopKRow(*tiles, shift, top, rest, d.left, share, power_share, *values, soft.known, means)


@triton.jit
def tile_sums(x, top, c):
    """Sum of e = 2**((x - top)*c) and of e*(x - top)."""
    d = x - finite_max(top)[:, None, None]
    e = power(d, c[:, None, None])
    return over_tile(e), over_tile(tl.where(e > 0.0, e * d, 0.0))


@triton.jit
def entropy(total, weighted, T):
    """Of a softmax from its sum of e = exp((x - max)/T) and the sum of e*(x - max)."""
    return tl.log(total) - divide(divide(weighted, total), T)


@triton.jit
def softened_sums(v, s, t):
    """Of the student's row and of the teacher's tile: maximum, and of both the sums that `entropy` takes."""
    x = tl.where(v.listed, v.x, float("-inf"))
    top = tl.maximum(tl.max(tl.max(x, 2), 1), v.rest.top - v.shift)
    total, weighted = tile_sums(x, top, s.c)
    below = v.rest.top - v.shift - finite_max(top)
    total += rescale(v.rest.total, v.rest.top - v.shift, top, s.c)
    weighted += rescale_moment(v.rest.moment, v.rest.total, below, v.rest.top - v.shift, top, s.c)
    total = tl.where(v.bad, float("nan"), total)
    y_top = tl.max(tl.max(v.y, 2), 1)
    y_total, y_weighted = tile_sums(v.y, y_top, t.c)
    return top, total, weighted, y_top, y_total, y_weighted


class TopKSlopes(NamedTuple):
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
def topk_slopes(v, s, t, slope, hard_share, at_one, smoothing, classes, how):
    """at_one: the upstream gradient of NKD's first part times p."""
    none = tl.zeros_like(slope)
    n_classes = none + classes
    eps = (none + smoothing).to(none.dtype)
    tile = student_soft(v.x, v.seen, v.slot, v.label, s, t, v.known, v.means, how) * slope[:, None, None]
    rest = pick(tile, v.at_rest)
    rest = tl.where(v.rest.total == 0.0, 0.0, divide(rest, tl.where(v.rest.total == 0.0, 1.0, v.rest.total)))
    rest = rest - slope * v.share * v.means.g
    kept = hard_share * (1.0 - eps * divide(n_classes - 1.0, n_classes))
    hard = Targets(v.top, divide(hard_share, v.s1), kept, divide(hard_share * eps, n_classes))
    unit = Targets(v.u_top, divide(at_one, v.u1), at_one, none)
    return TopKSlopes(tile, rest, slope * v.power_share, hard, unit, hard_share != 0.0)


@triton.jit
def hard_gradient(x, here, label, s, slopes, SMOOTH: tl.constexpr):
    """Of the labels; 0 where they do not count: no NaN of a class that nothing else looks at."""
    grad = targets_gradient(x, here, label, slopes.hard, s.c, SMOOTH)
    return tl.where(slopes.asked[:, None, None], grad, 0.0)


@triton.jit
def listed_gradient(v, s, slopes, label, how):
    """Of the transformed logits of the listed classes."""
    grad = slopes.tile
    if how.HARD:
        grad = grad + hard_gradient(v.x, v.column, label, s, slopes, how.SMOOTH)
    if how.DIVERGENCE == NKD:
        grad = grad + targets_gradient(v.x, v.column, label, slopes.unit, s.c, False)
    return grad


@triton.jit
def unlisted_gradient(x, here, v, s, slopes, label, p, how):
    """Of the transformed logits of the other classes of a tile."""
    grad = tl.zeros_like(x)
    if p.TAIL != RENORMALIZE:
        from_top = x - finite_max(v.rest.top)[:, None, None]
        grad = power(from_top, s.c[:, None, None]) * slopes.rest[:, None, None]
        if how.DIVERGENCE == ALPHA_BETA and p.TAIL == ZERO:
            degree = v.known.a + v.known.b
            grad = grad + raised(from_top, s.c[:, None, None], 1.0 + 0.0 * degree, degree) * slopes.power[:, None, None]
    x = x - v.shift[:, None, None]
    if how.HARD:
        grad = grad + hard_gradient(x, here, label, s, slopes, how.SMOOTH)
    if how.DIVERGENCE == NKD and p.TAIL != RENORMALIZE:
        grad = grad + targets_gradient(x, here, label, slopes.unit, s.c, False)
    return grad
