"""Per-row terms of distill_loss, what their gradients need, and the by-products; tiles as in `scalar`."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..rows.arithmetic import STATISTICS, columns, divide, power
from ..rows.sides import mixture, place, read, side
from ..rows.structs import NUMBERS, Numbers, Side
from .divergences import DKD, NKD, REVERSE
from .statistics import with_label
from .values import entropies, row_values


class RowTerms(NamedTuple):
    """Where the terms of each row go, [N], and its statistics, [N, STATISTICS]; None of what is not asked for."""

    soft_ptr: tl.tensor
    hard_ptr: tl.tensor
    stats_ptr: tl.tensor
    student_entropy_ptr: tl.tensor
    teacher_entropy_ptr: tl.tensor
    student_prob_ptr: tl.tensor
    teacher_prob_ptr: tl.tensor
    agreement_ptr: tl.tensor


@triton.jit
def write_terms(out, v, at, T, how):
    """soft, hard and stats."""
    soft = v.soft
    if how.SQUARED:
        soft = soft * (T * T)
    tl.store(out.soft_ptr + at.row, tl.where(at.counted, soft + v.at_one, 0.0), mask=at.exists)
    tl.store(out.hard_ptr + at.row, tl.where(at.counted, v.hard, 0.0), mask=at.exists)
    first, second, third = v.means.rest, v.means.h, tl.zeros_like(T)
    if how.DIVERGENCE == NKD:
        first, second = v.t1, v.means.h + v.means.rest
    if how.DIVERGENCE >= REVERSE:
        first, third = v.means.g, v.means.rest
    known = (v.known.ms, v.known.ss, v.known.mt, v.known.st, v.s1, v.soft, first, second, third)
    to = out.stats_ptr + at.row * STATISTICS
    for k in tl.static_range(STATISTICS):
        if k < len(known):
            tl.store(to + k, tl.where(at.counted, known[k], 0.0), mask=at.exists)
        else:  # what other backends keep
            tl.store(to + k, tl.zeros_like(T), mask=at.exists)


@triton.jit
def write_by_products(out, v, s, t, at, how):
    """Entropies, agreement and, with labels, their probabilities."""
    ms, ss, xs, ix = v.known.ms, v.known.ss, v.sums.xs, v.sums.ix
    mt, st, yt, iy = v.known.mt, v.known.st, v.sums.yt, v.sums.iy
    nans = v.sums.nans
    if (how.DIVERGENCE == DKD) or (how.DIVERGENCE == NKD):
        ms, ss, xs, ix = with_label(ms, ss, xs, ix, v.x_label, at.label, s.c)
        mt, st, yt, iy = with_label(mt, st, yt, iy, v.y_label, at.label, t.c)
        nans += ((v.x_label != v.x_label) | (v.y_label != v.y_label)).to(tl.int32)
    student_entropy, teacher_entropy = entropies(v, s, t, at, how)
    tl.store(out.student_entropy_ptr + at.row, tl.where(at.counted, student_entropy, 0.0), mask=at.exists)
    tl.store(out.teacher_entropy_ptr + at.row, tl.where(at.counted, teacher_entropy, 0.0), mask=at.exists)
    agree = at.counted & (at.bad == 0) & (ix == iy) & (nans == 0)
    tl.store(out.agreement_ptr + at.row, agree, mask=at.exists)
    if how.HARD:
        q_label = divide(power(v.x_label - ms, s.c), ss)
        p_label = tl.where(at.bad, float("nan"), divide(power(v.y_label - mt, t.c), st))
        tl.store(out.student_prob_ptr + at.row, tl.where(at.labelled, q_label, 0.0), mask=at.exists)
        tl.store(out.teacher_prob_ptr + at.row, tl.where(at.labelled, p_label, 0.0), mask=at.exists)


@triton.jit(do_not_specialize=NUMBERS)
def distill_rows(
    p,
    out,
    how,
    temperature: tl.float64,
    teacher_temperature: tl.float64,
    smoothing: tl.float64,
    s_scale: tl.float64,
    s_softcap: tl.float64,
    t_scale: tl.float64,
    t_softcap: tl.float64,
    a: tl.float64,
    b: tl.float64,
    n_rows: tl.int64,
    ignore_index: tl.int64,
    classes: tl.int32,
    s_inner: tl.int64,
    s_outer: tl.int64,
    s_row: tl.int64,
    t_inner: tl.int64,
    t_outer: tl.int64,
    t_row: tl.int64,
):
    """soft, hard and stats per row; the by-products with TERMS.

    stats = max x, sum es, max y, sum et (DKD, NKD: over the classes other than the label), sum of exp(x - max x) over
    all classes, D (what takes the factor T^2), and of `Means` (g, h, rest) or (rest, h); for NKD (sum of
    exp(y - max y), h).
    """
    row = tl.program_id(0).to(tl.int64) * how.ROWS + tl.arange(0, how.ROWS)
    classes = classes * p.student.UNIT
    at = place(p, row, n_rows, ignore_index, classes, how)
    col = columns(how)
    s_numbers = Numbers(temperature, s_scale, s_softcap, s_inner, s_outer, s_row)
    t_numbers = Numbers(teacher_temperature, t_scale, t_softcap, t_inner, t_outer, t_row)
    s = Side(p.student, *side(p.student, s_numbers, at, col, how), None)
    first = side(p.teacher, t_numbers, at, col, how)
    t = Side(p.teacher, *first, None)
    if p.more_ptrs is not None:
        t = Side(p.teacher, *first, mixture(t, p, at, col, how.DIVERGENCE == NKD, how))
    a = tl.full([1], a, s.T.dtype)
    b = tl.full([1], b, s.T.dtype)

    keep = at.counted[:, None, None] & (col < classes)
    x = read(s, col, keep, "evict_last" if how.LOOP else "evict_first")
    y = read(t, col, keep, "evict_last" if how.LOOP else "evict_first")
    v = row_values(x, y, s, t, at, col, smoothing, a, b, how)
    write_terms(out, v, at, s.T, how)
    if how.TERMS:
        write_by_products(out, v, s, t, at, how)
