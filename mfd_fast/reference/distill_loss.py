"""distill_loss in plain PyTorch: oracle, fallback, documentation and benchmark baseline.

Notation per row: x, y student and teacher logits after their transform; u = x/T, v = y/T;
q = softmax(u), p = softmax(v), or Σ_k w_k softmax(v_k) for several teachers.
    soft = T² D(p, q),  hard = (1−ε)(−log softmax(x)_label) + ε·mean_j(−log softmax(x)_j)
Hinton, Vinyals, Dean, arXiv:1503.02531 (soft, T²); Szegedy et al., arXiv:1512.00567 (smoothing ε). The
divergences D are in :mod:`mfd_fast.reference.divergences`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import DKD, NKD
from ..problems.checks import can_read, is_used
from ..problems.rows import RowLoss, RowProblem, Scalar, check_indices, check_labels_in_range, listed_twice
from ..problems.teachers import TopKRows
from ..types import DistillOutput, LogitTransform
from .divergences import decoupled, label_entropy, log_sum_exp, other_entropy, pointwise

STANDARDIZE_EPS = 1e-7


class RowTerms(NamedTuple):
    """Per-row ``[N]`` values; soft and hard carry the graph. ``hard`` is zeros without labels."""

    soft: Tensor
    hard: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_label_prob: Tensor | None
    teacher_label_prob: Tensor | None
    agreement: Tensor


def transform_logits(logits: Tensor, transform: LogitTransform | None) -> Tensor:
    if transform is None:
        return logits
    if transform.scale != 1.0:
        logits = logits * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    if transform.standardize:
        centred = logits - logits.mean(-1, keepdim=True)
        degrees = max(logits.shape[-1] - 1, 1)
        variance = centred.square().sum(-1, keepdim=True) / degrees
        # The square root has no derivative at 0; a constant row stays constant whatever σ is.
        constant = variance == 0
        deviation = torch.where(constant, torch.ones_like(variance), variance).sqrt()
        deviation = torch.where(constant, torch.zeros_like(deviation), deviation)
        logits = centred / (deviation + STANDARDIZE_EPS)
    return logits


def soften(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Log-softmax of logits / T; the maximum is subtracted before the division, which keeps extreme T exact."""
    shifted = logits - logits.detach().amax(-1, keepdim=True)
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(-1, 1)
        # −inf is divided by a constant: its derivative by T would be 0·inf.
        cut = shifted == -torch.inf
        zero = torch.zeros_like(shifted)
        scaled = torch.where(cut, zero, shifted) / temperature + torch.where(cut, shifted, zero) / temperature.detach()
    else:
        scaled = shifted / temperature
    return torch.log_softmax(scaled, -1)


def entropy(log_p: Tensor) -> Tensor:
    """−Σ p log p per row with 0·log 0 = 0."""
    p = log_p.exp()
    return -(p * torch.where(p == 0, torch.zeros_like(p), log_p)).sum(-1)


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Smoothed cross-entropy per row at temperature 1; ``labels`` are in range."""
    log_q = torch.log_softmax(logits, -1)
    if label_smoothing == 1:  # 0 of a label's +inf is 0
        return -log_q.mean(-1)
    loss = -log_q.gather(-1, labels[:, None]).squeeze(-1)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_q.mean(-1)
    return loss


def mix(log_probs: list[Tensor], weights: Tensor | None) -> Tensor:
    """log Σ_k w_k p_k of several teachers ``[N, C]``; ``weights`` [K] or [N, K] sum to 1, None: equal."""
    if len(log_probs) == 1:
        return log_probs[0]
    stacked = torch.stack(log_probs)  # [K, N, C]
    if weights is None:
        w = stacked.new_full((len(log_probs), 1, 1), 1 / len(log_probs))
    else:
        w = (weights.T if weights.dim() == 2 else weights[:, None])[:, :, None]
    heard = torch.where(w > 0, stacked.detach(), -torch.inf)
    top = heard.amax(0)
    top = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    # A teacher of weight 0 may have any p_k/p, of which the gradient of its weight is made.
    largest = math.log(torch.finfo(stacked.dtype).max) - 1.0
    total = (w * (stacked - top).clamp_max(largest).exp()).sum(0)
    nothing = total == 0
    return torch.where(nothing, -torch.inf, torch.where(nothing, torch.ones_like(total), total).log() + top)


def mass_left(log_p: Tensor) -> Tensor:
    """1 − Σ exp of ``[N, K]`` log-probabilities, >= 0, ``[N, 1]``; expm1 keeps the digits where one is near 1."""
    top = log_p.detach().argmax(-1, keepdim=True)
    others = log_p.scatter(-1, top, -torch.inf).exp().sum(-1, keepdim=True)
    return (-torch.expm1(log_p.gather(-1, top)) - others).clamp_min(0)


def sparse_teacher(rows: RowProblem, values: Tensor, temperature: float | Tensor) -> Tensor:
    """log p of the K listed classes and, last, of the rest ``[N, K + 1]``; −inf where nothing is left."""
    return soften(torch.cat((values, log_rest(rows, values)), -1), temperature)


def log_rest(rows: RowProblem, values: Tensor) -> Tensor:
    """log of what the values leave to the other classes, ``[N, 1]``."""
    nothing = torch.full_like(values[:, :1], -torch.inf)
    if rows.topk is None or not rows.topk.logprobs or rows.topk.tail == "renormalize":
        return nothing
    left, complete = mass_left(values), rows.lists_all_classes()
    empty = left == 0 if complete is None else (left == 0) | complete
    return torch.where(empty, nothing, torch.where(empty, torch.ones_like(left), left).log())


def for_lists(rows: RowProblem, x: Tensor) -> Tensor:
    """``[N, C]`` with one class of −inf behind the others for candidates that pad a list."""
    return x if rows.candidates is None else torch.cat((x, torch.full_like(x[:, :1], -torch.inf)), -1)


def sparse_pair(
    rows: RowProblem, topk: TopKRows, sides: Sides, indices: Tensor, t: float | Tensor, teacher_t: float | Tensor
) -> tuple[Tensor, Tensor]:
    """log p and log q over the classes that the tail leaves: K, K + 1, or C; see :class:`mfd_fast.TopK`."""
    x = for_lists(rows, sides.x)
    log_p = sparse_teacher(rows, sides.ys[0], teacher_t)
    if topk.tail == "renormalize":
        return log_p[:, :-1], soften(x.gather(-1, indices), t)
    log_q = soften(x, t)
    if topk.tail == "zero":
        return torch.full_like(log_q, -torch.inf).scatter(-1, indices, log_p[:, :-1]), log_q
    return log_p, torch.cat((log_q.gather(-1, indices), log_sum_exp(log_q.scatter(-1, indices, -torch.inf))), -1)


class Sides(NamedTuple):
    """Both sides' transformed logits, each ``[N, C]`` (a TopK's values ``[N, K]``), and where the label is.

    ``labels`` and ``indices`` are in range, the latter C where a candidate pads a list; ``label`` is the label's column
    among the classes compared.
    """

    x: Tensor
    ys: list[Tensor]
    labels: Tensor | None
    label: Tensor | None
    indices: Tensor | None


def raw_logits(rows: RowProblem) -> tuple[Tensor, list[Tensor]]:
    """The used columns of student and teachers as ``[N, C]`` of the arithmetic's dtype; uniform in rows that do not
    exist, so that every divergence is finite there.
    """
    n, c, counted = rows.n_rows, rows.classes, rows.counted()

    def used(side: Tensor, width: int, uniform: float) -> Tensor:
        values = side.reshape(n, side.shape[-1])[:, :width].to(rows.dtype)
        return values if counted is None else torch.where(counted[:, None], values, torch.full_like(values, uniform))

    if rows.topk is not None:
        values = used(rows.teacher, rows.teacher.shape[-1], -math.log(c + 1))  # more than K: something is left
        listed = listed_candidates(rows)
        return used(rows.student, c, 0.0), [values if listed is None else torch.where(listed, values, -torch.inf)]
    return used(rows.student, c, 0.0), [used(t, c, 0.0) for t in rows.teachers]


def listed_candidates(rows: RowProblem) -> Tensor | None:
    """``rows.candidates`` with True in rows that do not exist, None where nothing is padded."""
    counted = rows.counted()
    if rows.candidates is None or counted is None:
        return rows.candidates
    return rows.candidates | ~counted[:, None]


def with_existing_temperatures(rows: RowProblem) -> RowProblem:
    """Temperature 1 in rows that do not exist: whatever stands there would make NaN of its gradient."""
    counted = rows.counted()

    def existing(t: float | Tensor) -> float | Tensor:
        return torch.where(counted, t, torch.ones_like(t)) if isinstance(t, Tensor) and t.dim() else t  # type: ignore[arg-type]

    if counted is None:
        return rows
    own = rows.own_teacher_temperature
    return rows.replace(
        temperature=existing(rows.temperature), own_teacher_temperature=None if own is None else existing(own)
    )


def both_sides(rows: RowProblem, op: str) -> Sides:
    """Checks labels and indices where that is free, and transforms; a row of a bad one is NaN elsewhere."""
    check_labels_in_range(op, rows)
    check_indices(op, rows)
    x, ys = raw_logits(rows)
    labels, indices = rows.labels, rows.indices
    bad = x.new_zeros(rows.n_rows, dtype=torch.bool)
    if labels is not None:
        outside, labelled = (labels < 0) | (labels >= rows.classes), rows.labelled()
        bad = outside if labelled is None else outside & labelled
        labels = labels.masked_fill(outside, 0)
    if indices is not None:
        outside, candidates = (indices < 0) | (indices >= rows.classes), listed_candidates(rows)
        indices = indices.masked_fill(outside, 0)
        if candidates is not None:
            outside, indices = outside & candidates, indices.masked_fill(~candidates, rows.classes)
        bad = bad | outside.any(-1)
    label = labels
    if labels is not None and indices is not None and rows.divergence.needs_labels:
        listed = indices == labels[:, None]
        bad = bad | ~listed.any(-1)
        label = listed.to(torch.int8).argmax(-1)
    x = transform_logits(x, rows.student_transform)
    if not can_read(x):
        if rows.indices is not None:
            bad = bad | listed_twice(rows.indices, rows.candidates).any(-1)
        counted = rows.counted()
        if counted is not None:  # of the others nothing may reach what all rows share
            bad = bad & counted
        x = torch.where(bad[:, None], torch.full_like(x, torch.nan), x)
    return Sides(x, [transform_logits(y, rows.teacher_transform) for y in ys], labels, label, indices)


def compared(rows: RowProblem, sides: Sides, t: float | Tensor, teacher_t: float | Tensor) -> tuple[Tensor, Tensor]:
    """log p and log q at the given temperatures, over the classes that are compared."""
    if rows.topk is not None and sides.indices is not None:
        return sparse_pair(rows, rows.topk, sides, sides.indices, t, teacher_t)
    return mix([soften(y, teacher_t) for y in sides.ys], rows.teacher_weights), soften(sides.x, t)


def divergence_value(rows: RowProblem, log_p: Tensor, log_q: Tensor, label: Tensor | None) -> Tensor:
    """The part of D(p, q) that carries T², per row; all of it but for NKD."""
    divergence = rows.divergence
    if isinstance(divergence, (DKD, NKD)):
        assert label is not None
        if isinstance(divergence, DKD):
            return decoupled(divergence, log_p, log_q, label)
        if divergence.gamma == 0:
            return torch.zeros_like(log_q[:, 0])
        return divergence.gamma * other_entropy(log_p, log_q, label)
    return pointwise(divergence, log_p, log_q, complete=rows.topk is None or rows.topk.tail != "zero")


def soft_value(rows: RowProblem, sides: Sides) -> Tensor:
    """T²·D(p, q) per row."""
    if len(sides.ys) > 1:  # float32 has no place for the p_k/p of a teacher of weight 0
        sides = sides._replace(x=sides.x.double(), ys=[y.double() for y in sides.ys])
    log_p, log_q = compared(rows, sides, rows.temperature, rows.teacher_temperature)
    value = divergence_value(rows, log_p, log_q, sides.label)
    if rows.scale_by_temperature:
        value = value * rows.temperature**2
    if isinstance(rows.divergence, NKD):
        assert sides.label is not None
        value = value + label_entropy(*compared(rows, sides, 1.0, 1.0), sides.label)
    if isinstance(rows.divergence, (DKD, NKD)):  # of which a part of weight 0 would hide a row without distribution
        both, nothing = log_p.sum(-1) + log_q.sum(-1), torch.zeros_like(value)
        bad = both != both
        # NaN times both, so that its gradient is NaN on either side.
        value = value + torch.where(bad, torch.full_like(value, torch.nan), nothing) * torch.where(bad, both, nothing)
    return value.to(rows.dtype)


def row_terms(rows: RowProblem, op: str = "distill_loss", *, soft: bool = True, hard: bool = True) -> RowTerms:
    """All per-row terms; a term that is not wanted is zeros and costs nothing."""
    rows = with_existing_temperatures(rows)
    sides = both_sides(rows, op)
    soft_term = hard_term = sides.x.new_zeros(rows.n_rows)
    if soft:
        soft_term = soft_value(rows, sides)
    if hard and sides.labels is not None:
        hard_term = cross_entropy(sides.x, sides.labels, rows.label_smoothing)
    with torch.no_grad():
        by_products = _by_products(rows, *sides)
    # Detached, as no_grad does not stop forward derivatives.
    terms = RowTerms(soft_term, hard_term, *(None if t is None else t.detach() for t in by_products))  # type: ignore[arg-type]
    counted, labelled = rows.counted(), rows.labelled()
    of_labels = RowTerms(counted, labelled, counted, counted, labelled, labelled, counted)  # type: ignore[arg-type]
    return RowTerms(*(where_true(exists, t) for exists, t in zip(of_labels, terms, strict=True)))  # type: ignore[arg-type]


def where_true(condition: Tensor | None, values: Tensor | None) -> Tensor | None:
    """``values`` with 0 where the condition is False; None of a condition: it never is."""
    return values if condition is None or values is None else torch.where(condition, values, torch.zeros_like(values))


def _by_products(
    rows: RowProblem, x: Tensor, ys: list[Tensor], labels: Tensor | None, _: Tensor | None, indices: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Entropies, label probabilities and agreement, of all C classes of the student and what the teacher has."""
    log_q = soften(x, rows.temperature)
    if rows.topk is None or indices is None:
        log_p = mix([soften(y, rows.teacher_temperature) for y in ys], rows.teacher_weights)
        choice = log_p.argmax(-1) if len(ys) > 1 else ys[0].argmax(-1)
        of_label = log_p
    else:
        log_p = sparse_teacher(rows, ys[0], rows.teacher_temperature)
        # A candidate of probability 0 comes before one that pads the list.
        ranked = torch.where(indices == rows.classes, -torch.inf, ys[0].clamp_min(torch.finfo(rows.dtype).min))
        choice = indices.gather(-1, ranked.argmax(-1, keepdim=True)).squeeze(-1)
        of_label = torch.full_like(for_lists(rows, log_q), -torch.inf).scatter(-1, indices, log_p[:, :-1])
    q_label = p_label = None
    if labels is not None:
        q_label, p_label = (s.gather(-1, labels[:, None]).squeeze(-1).exp() for s in (log_q, of_label))
    has_nan = (x != x).any(-1)
    for y in ys:
        has_nan = has_nan | (y != y).any(-1)
    agreement = (x.argmax(-1) == choice) & ~has_nan
    return entropy(log_q), entropy(log_p), q_label, p_label, agreement


def _weighted(per_row: Tensor, rows: RowProblem, loss: RowLoss) -> Tensor:
    """Times the rows' weights. What stands in that of a row that is not counted must not reach what others share."""
    weight = where_true(rows.counted(), loss.weight)
    return per_row if weight is None else per_row * weight


def _divisor(rows: RowProblem, loss: RowLoss, hard: bool) -> Scalar:
    """What "mean" divides the sum of the soft or the hard term by."""
    normalizer = loss.hard_normalizer if hard and loss.hard_normalizer is not None else loss.normalizer
    if normalizer is not None:
        return normalizer
    exists = rows.labelled() if hard else rows.counted()
    return max(rows.n_rows, 1) if exists is None else exists.sum().clamp_min(1)


def reduce_rows(per_row: Tensor, rows: RowProblem, loss: RowLoss, *, hard: bool = False) -> Tensor:
    """The weights and the reduction of the contract; ``per_row`` [N] is 0 where a row is not counted.

    ``hard``: "mean" is that of the hard term, over the rows that have a label.
    """
    per_row = _weighted(per_row, rows, loss)
    if loss.reduction == "none":
        return per_row.reshape(rows.student.shape[:-1])
    total = per_row.sum()
    if loss.reduction == "sum":
        return total
    by = _divisor(rows, loss, hard)
    return total / (by.to(total) if isinstance(by, Tensor) else by)


def row_factors(rows: RowProblem, loss: RowLoss) -> tuple[Tensor | None, Tensor | None]:
    """d loss/d soft and d loss/d hard of every row ``[N]``, of a scalar loss; None for a term that is not used."""
    row = _weighted(torch.ones(rows.n_rows, dtype=rows.dtype, device=rows.device), rows, loss)

    def of(weight: Scalar, hard: bool) -> Tensor | None:
        if not is_used(weight):
            return None
        return (row / _divisor(rows, loss, hard) if loss.reduction == "mean" else row) * weight

    return of(loss.soft_weight, False), of(loss.hard_weight, True)


def combine(rows: RowProblem, loss: RowLoss) -> Tensor:
    """The whole loss, differentiable to any order in everything that requires grad."""
    terms = row_terms(rows, rows.op, soft=loss.use_soft, hard=loss.use_hard)
    return combine_rows(rows, loss, terms.soft, terms.hard)


def combine_with_parts(rows: RowProblem, loss: RowLoss) -> DistillOutput:
    """:func:`combine` with the parts beside it."""
    terms = row_terms(rows, rows.op, soft=loss.use_soft, hard=loss.use_hard)
    return DistillOutput(combine_rows(rows, loss, terms.soft, terms.hard), *parts_of(rows, loss, *terms[:4]))


def parts_of(
    rows: RowProblem,
    loss: RowLoss,
    soft: Tensor,
    hard: Tensor | None,
    student_entropy: Tensor,
    teacher_entropy: Tensor,
) -> list[Tensor]:
    """The fields of DistillOutput after the loss, from values per row ``[N]``."""

    def reduced(value: Tensor | None, used: bool, hard: bool = False) -> Tensor:
        kept = value.detach() if value is not None and used else torch.zeros_like(soft.detach())
        return reduce_rows(kept, rows, loss, hard=hard).detach()

    entropies = [reduced(value, loss.use_soft) for value in (student_entropy, teacher_entropy)]
    return [reduced(soft, loss.use_soft), reduced(hard, loss.use_hard, hard=True), *entropies]


def combine_rows(rows: RowProblem, loss: RowLoss, soft: Tensor, hard: Tensor) -> Tensor:
    """The loss from the per-row terms ``[N]``; a term whose weight is the number 0 has no part in it."""
    per_row = torch.zeros_like(soft)
    if loss.use_soft:
        per_row = per_row + loss.soft_weight * soft
    if loss.use_hard and loss.counts_apart(rows):
        return reduce_rows(per_row, rows, loss) + reduce_rows(loss.hard_weight * hard, rows, loss, hard=True)
    if loss.use_hard:
        per_row = per_row + loss.hard_weight * hard
    if not (loss.use_soft or loss.use_hard):
        # An empty slice of the student: a loss without terms can still be differentiated.
        per_row = per_row + rows.student[..., :0].sum()
    return reduce_rows(per_row, rows, loss)
