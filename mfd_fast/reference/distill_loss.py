"""distill_loss in plain PyTorch: oracle, fallback, documentation and benchmark baseline.

Notation per row: x, y student and teacher logits after their transform; u = x/T, v = y/T;
q = softmax(u), p = softmax(v).
    soft = T² KL(p‖q),  hard = (1−ε)(−log softmax(x)_label) + ε·mean_j(−log softmax(x)_j)
Hinton, Vinyals, Dean, arXiv:1503.02531 (soft, T²); Szegedy et al., arXiv:1512.00567 (smoothing ε).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import check_labels_in_range
from ..rows import Rows
from ..types import LogitTransform

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


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) per row with 0·log 0 = 0, never negative."""
    p = log_p.exp()
    zero = p == 0
    ratio = torch.where(zero, torch.zeros_like(p), log_p) - torch.where(zero, torch.zeros_like(p), log_q)
    kl = (p * ratio).sum(-1)
    # Rounding below zero is cut from the value only; the gradient stays q − p.
    return torch.where(kl < 0, kl - kl.detach(), kl)


def entropy(log_p: Tensor) -> Tensor:
    """−Σ p log p per row with 0·log 0 = 0."""
    p = log_p.exp()
    return -(p * torch.where(p == 0, torch.zeros_like(p), log_p)).sum(-1)


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Smoothed cross-entropy per row at temperature 1; ``labels`` are in range."""
    log_q = torch.log_softmax(logits, -1)
    loss = -log_q.gather(-1, labels[:, None]).squeeze(-1)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_q.mean(-1)
    return loss


def row_terms(rows: Rows, op: str = "distill_loss", *, soft: bool = True, hard: bool = True) -> RowTerms:
    """All per-row terms; a term that is not wanted is zeros and costs nothing."""
    check_labels_in_range(op, rows)
    n, c = rows.n_rows, rows.classes
    x = rows.student.reshape(n, rows.student.shape[-1])[:, :c].to(rows.dtype)
    y = rows.teacher.reshape(n, rows.teacher.shape[-1])[:, :c].to(rows.dtype)
    labels = rows.labels
    out_of_range = None
    if labels is not None:
        out_of_range = (labels < 0) | (labels >= c)
        labels = labels.masked_fill(out_of_range, 0)
    counted = rows.counted()
    if counted is not None:  # a row that does not exist is replaced before anything is computed from it
        x = torch.where(counted[:, None], x, torch.zeros_like(x))
        y = torch.where(counted[:, None], y, torch.zeros_like(y))
    x = transform_logits(x, rows.student_transform)
    y = transform_logits(y, rows.teacher_transform)
    if out_of_range is not None and (rows.device.type != "cpu" or torch.compiler.is_compiling()):
        x = torch.where(out_of_range[:, None], torch.full_like(x, torch.nan), x)

    log_q = soften(x, rows.temperature)
    log_p = soften(y, rows.teacher_temperature)
    soft_term = hard_term = x.new_zeros(n)
    if soft:
        soft_term = forward_kl(log_p, log_q)
        if rows.scale_by_temperature:
            soft_term = soft_term * rows.temperature**2
    if hard and labels is not None:
        hard_term = cross_entropy(x, labels, rows.label_smoothing)
    with torch.no_grad():
        q_label = p_label = None
        if labels is not None:
            q_label, p_label = (s.gather(-1, labels[:, None]).squeeze(-1).exp() for s in (log_q, log_p))
        has_nan = (x != x).any(-1) | (y != y).any(-1)
        agreement = (x.argmax(-1) == y.argmax(-1)) & ~has_nan
        terms = RowTerms(soft_term, hard_term, entropy(log_q), entropy(log_p), q_label, p_label, agreement)
    if counted is None:
        return terms
    return RowTerms(*(None if t is None else torch.where(counted, t, torch.zeros_like(t)) for t in terms))  # type: ignore[arg-type]


def reduce_rows(
    per_row: Tensor, rows: Rows, weight: Tensor | None, reduction: str, normalizer: float | Tensor | None
) -> Tensor:
    """``weight`` [N] and the reduction of the contract; ``per_row`` [N] is 0 where a row is not counted."""
    counted = rows.counted()
    if weight is not None:
        weighted = weight * per_row
        per_row = weighted if counted is None else torch.where(counted, weighted, torch.zeros_like(weighted))
    if reduction == "none":
        return per_row.reshape(rows.student.shape[:-1])
    total = per_row.sum()
    if reduction == "sum":
        return total
    if normalizer is not None:
        return total / (normalizer.to(total) if isinstance(normalizer, Tensor) else normalizer)
    if counted is None:
        return total / max(rows.n_rows, 1)
    return total / counted.sum().clamp_min(1)


def combine(
    rows: Rows,
    weight: Tensor | None,
    soft_weight: float | Tensor,
    hard_weight: float | Tensor,
    reduction: str,
    normalizer: float | Tensor | None,
    op: str = "distill_loss",
) -> Tensor:
    """The whole loss, differentiable to any order in everything that requires grad."""
    soft, hard = _is_used(soft_weight), _is_used(hard_weight)
    terms = row_terms(rows, op, soft=soft, hard=hard)
    return combine_rows(rows, terms.soft, terms.hard, weight, soft_weight, hard_weight, reduction, normalizer)


def combine_rows(
    rows: Rows,
    soft: Tensor,
    hard: Tensor,
    weight: Tensor | None,
    soft_weight: float | Tensor,
    hard_weight: float | Tensor,
    reduction: str,
    normalizer: float | Tensor | None,
) -> Tensor:
    """The loss from the per-row terms ``[N]``; a term whose weight is the number 0 has no part in it."""
    per_row = torch.zeros_like(soft)
    if _is_used(soft_weight):
        per_row = per_row + soft_weight * soft
    if _is_used(hard_weight):
        per_row = per_row + hard_weight * hard
    if not (_is_used(soft_weight) or _is_used(hard_weight)):
        # An empty slice of the student: a loss without terms can still be differentiated.
        per_row = per_row + rows.student[..., :0].sum()
    return reduce_rows(per_row, rows, weight, reduction, normalizer)


def _is_used(weight: float | Tensor) -> bool:
    return isinstance(weight, Tensor) or weight != 0
