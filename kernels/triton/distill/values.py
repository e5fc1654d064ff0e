"""All terms of a row pair, from logits to values: what the scalar and the per-row kernel share."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..rows.arithmetic import INF, LOG2E, divide, finite_max, hard_value, power, rescale, valid_sum
from ..rows.sides import label_logit, label_prob_at_one
from .divergences import DKD, NKD, NONE, REVERSE
from .gradients import Known, Means, centred_gap, know, online_value, pointwise_means
from .statistics import Sums, hold_rows, stream_rows, with_label


class Soft(NamedTuple):
    """D (what takes the factor T^2) per row [ROWS], and what its gradients need.

    s_top, s1, t_top, t1: maximum and sum of exponentials at temperature 1, over all classes.
    """

    value: tl.tensor
    s_top: tl.tensor
    s1: tl.tensor
    t_top: tl.tensor
    t1: tl.tensor
    known: Known
    means: Means


class Values(NamedTuple):
    """Per row [ROWS]. soft takes the factor T^2, at_one (the first part of NKD) does not.

    s_top, s1, t_top, t1: as in `Soft`. p1: NKD's teacher probability of the label at temperature 1.
    x_label, y_label: logits of the label, where they are needed.
    """

    soft: tl.tensor
    at_one: tl.tensor
    hard: tl.tensor
    s_top: tl.tensor
    s1: tl.tensor
    t_top: tl.tensor
    t1: tl.tensor
    p1: tl.tensor
    x_label: tl.tensor
    y_label: tl.tensor
    known: Known
    means: Means
    sums: Sums


@triton.jit
def soft_value(x, y, s, t, at, col, x_label, y_label, ms, mt, sums, a, b, how):
    """`Soft` from the sums of the rows, which x, y hold or, with LOOP, are read again where D asks for it."""
    DECOUPLED: tl.constexpr = (how.DIVERGENCE == DKD) or (how.DIVERGENCE == NKD)
    none = tl.zeros_like(ms)
    value = none
    ss, st, s1, t1, s_top, t_top = sums.ss, sums.st, sums.s1, sums.t1, ms, mt
    if DECOUPLED:
        s_top, t_top = tl.maximum(ms, x_label), tl.maximum(mt, y_label)
        to_s, to_t = x_label - finite_max(s_top), y_label - finite_max(t_top)
        all_s = valid_sum(rescale(ss, ms, s_top, s.c) + power(to_s, s.c))
        all_t = valid_sum(rescale(st, mt, t_top, t.c) + power(to_t, t.c))
        ss, st = ss + (all_s - all_s), st + (all_t - all_t)
        c1 = tl.full([1], LOG2E, s.c.dtype)
        s1 = rescale(s1, ms, s_top, c1) + power(to_s, c1)
        t1 = rescale(t1, mt, t_top, c1) + power(to_t, c1)
    elif how.DIVERGENCE != NONE:
        ss, st = valid_sum(ss), valid_sum(st)
    ss = tl.where(at.bad, float("nan"), ss)
    s1 = tl.where(at.bad, float("nan"), valid_sum(s1))

    known, pair = know(ms, ss, mt, st, s, t, x_label, y_label, a, b, how)
    means = Means(none, none, none)
    if how.DIVERGENCE >= REVERSE:
        value, means = pointwise_means(x, y, s, t, known, at, col, how)
    elif how.DIVERGENCE != NONE:
        value = online_value(known, pair, sums.cross, sums.blocked, t, how)
        mean = sums.cross * known.inv_t if DECOUPLED else divide(sums.cross, st)
        rest = none
        if not how.LOOP:
            rest = centred_gap(x, y, col, at.label, s, t, known, mean, how)
        means = Means(none, tl.where(value < INF, mean, value), rest)
    return Soft(value, s_top, s1, t_top, t1, known, means)


@triton.jit
def prob_at_one(t, label, counted, y_label, t_top, t1):
    """The teacher's probability of the label at temperature 1."""
    if t.parts is None:
        return divide(power(y_label - finite_max(t_top), tl.full([1], LOG2E, t.c.dtype)), t1)
    else:
        return label_prob_at_one(t, label, counted)


@triton.jit
def surprise_at_one(x_label, s_top, s1):
    """-log q of the label at temperature 1."""
    return tl.log(s1) - (x_label - finite_max(s_top))


@triton.jit
def entropies(v, s, t, at, how):
    """Of student and teacher, [ROWS], of rows whose values ``v`` were found with TERMS."""
    ms, ss, xs, ix = v.known.ms, v.known.ss, v.sums.xs, v.sums.ix
    mt, st, yt, iy = v.known.mt, v.known.st, v.sums.yt, v.sums.iy
    if (how.DIVERGENCE == DKD) or (how.DIVERGENCE == NKD):
        ms, ss, xs, ix = with_label(ms, ss, xs, ix, v.x_label, at.label, s.c)
        mt, st, yt, iy = with_label(mt, st, yt, iy, v.y_label, at.label, t.c)
    return tl.log(ss) - divide(divide(xs, ss), s.T), tl.log(st) - divide(divide(yt, st), t.T)


@triton.jit
def row_values(x, y, s, t, at, col, smoothing, a, b, how):
    """Values of the rows that x, y hold or, with LOOP, that are read here. NaN where `bad` or without any logit."""
    DECOUPLED: tl.constexpr = (how.DIVERGENCE == DKD) or (how.DIVERGENCE == NKD)
    none = tl.zeros_like(s.T)
    x_label, y_label, hard, at_one, p1 = none, none, none, none, none
    if how.HARD or DECOUPLED:
        x_label = label_logit(s, at.label, at.counted)
    if DECOUPLED or (how.HARD and how.TERMS):
        y_label = label_logit(t, at.label, at.counted)
    shift = tl.where(tl.abs(x_label) < INF, x_label, 0.0)
    if how.LOOP:
        ms, mt, sums = stream_rows(s, t, at, col, shift, how)
    else:
        keep = at.counted[:, None, None] & (col < at.classes)
        ms, mt, sums = hold_rows(x, y, col, keep, s, t, at.label, shift, how)
    soft = soft_value(x, y, s, t, at, col, x_label, y_label, ms, mt, sums, a, b, how)
    if how.DIVERGENCE == NKD:
        p1 = prob_at_one(t, at.label, at.counted, y_label, soft.t_top, soft.t1)
        at_one = tl.where(p1 == 0.0, 0.0, p1 * surprise_at_one(x_label, soft.s_top, soft.s1))
    if how.HARD:
        eps, n_classes = tl.full([how.ROWS], smoothing, s.T.dtype), tl.full([how.ROWS], at.classes, s.T.dtype)
        hard = hard_value(soft.s1, soft.s_top, x_label, sums.spread, eps, n_classes, how.SMOOTH)
        hard = tl.where(at.labelled, hard, 0.0)
    tops = (soft.s_top, soft.s1, soft.t_top, soft.t1)
    return Values(soft.value, at_one, hard, *tops, p1, x_label, y_label, soft.known, soft.means, sums)
