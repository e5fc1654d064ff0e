"""mfd_loss in plain PyTorch: pool the modalities, classify, and sum the four terms per row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..problems.checks import is_used
from ..problems.mfd import MFDProblem
from ..problems.rows import RowProblem
from ..types import MFDOutput
from .distill_loss import reduce_rows, row_terms
from .feature_loss import row_distance
from .modal_pool import modal_log_weights, modal_scores, modal_weights, present_features, weighted_sum

Attention = Callable[[list[Tensor], "Tensor | None", "float | Tensor"], tuple[Tensor, Tensor]]
ComputeTerms = Callable[[RowProblem, bool, bool], tuple[Tensor, Tensor]]


def pool_divergence(teacher_weights: Tensor, log_weights: Tensor) -> Tensor:
    """KL(teacher_weights ‖ weights) over modalities per row, with 0·log 0 = 0, never negative.

    It takes the logarithms of the student's weights: these underflow where the divergence is still finite.
    """
    unused = teacher_weights == 0
    ratio = teacher_weights.masked_fill(unused, 1.0).log() - log_weights.masked_fill(unused, 0.0)
    kl = (teacher_weights * ratio).sum(-1)
    return torch.where(kl < 0, kl - kl.detach(), kl)


def reference_terms(rows: RowProblem, soft: bool, hard: bool) -> tuple[Tensor, Tensor]:
    """soft ``[N]`` and hard ``[N]`` in plain PyTorch; a term that is not wanted is zeros."""
    terms = row_terms(rows, "mfd_loss", soft=soft, hard=hard)
    return terms.soft, terms.hard


def mfd_loss(
    problem: MFDProblem,
    attention: Attention | None = None,
    terms: ComputeTerms = reference_terms,
    distance: Callable[[Tensor, Tensor, str], Tensor] = row_distance,
) -> MFDOutput:
    """The single pass, term by term.

    A backend may pass its own ``attention(features, present, temperature) -> (pooled, weights)`` over ``[N, D]``
    features, its own ``terms`` and its own ``distance`` between rows. The divergence of the pool weights is computed
    from the scores, here for every backend.
    """
    p, loss, rows = problem, problem.loss, problem.rows
    counted = rows.counted()
    n, modalities, width = rows.n_rows, p.pool.modalities, p.pool.width
    dtype = rows.dtype
    features = [x.reshape(n, width) for x in p.pool.modality_features()]
    present = None if p.pool.present is None else p.pool.present.reshape(n, modalities)
    if counted is not None:  # a row that does not exist has neither modalities nor features
        present = counted[:, None] if present is None else present & counted[:, None]
        present = present.expand(n, modalities)
    temperature = p.pool.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype).reshape(n if temperature.dim() else ())
    pool_used = is_used(p.pool_weight)
    # Once for pool and divergence, whose gradients are added before they are rounded.
    if attention is None or pool_used:
        features = present_features(features, present, dtype)
        scores = modal_scores(features, p.pool.query, None, p.pool.bias, present, p.pool.scale)
    if attention is None:
        weights = modal_weights(scores, temperature, present)
        pooled = weighted_sum(features, weights)
    else:
        pooled, weights = attention(features, present, temperature)
    logits = pooled @ p.head_weight.to(dtype).T
    if p.head_bias is not None:
        logits = logits + p.head_bias.to(dtype)

    soft_used, hard_used = loss.use_soft, loss.use_hard
    student = rows.replace(student=logits, teachers=[rows.teacher.reshape(n, rows.classes)])
    soft, hard = terms(student, soft_used, hard_used)
    feature = torch.zeros_like(soft)
    if is_used(p.feature_weight) and p.teacher_features is not None:
        target = p.teacher_features.reshape(n, width).to(dtype)
        feature = _existing(distance(pooled, _existing(target, counted), p.feature_kind), counted)
    per_row = torch.zeros_like(soft)
    apart = hard_used and loss.counts_apart(rows)
    hard_here = 0.0 if apart else loss.hard_weight
    for weight, term in ((loss.soft_weight, soft), (hard_here, hard), (p.feature_weight, feature)):
        if is_used(weight):
            per_row = per_row + weight * term
    if pool_used and p.teacher_pool_weights is not None:
        target = _existing(p.teacher_pool_weights.reshape(n, modalities).to(dtype), counted)
        log_weights = modal_log_weights(scores, temperature, present)
        per_row = per_row + p.pool_weight * pool_divergence(target, log_weights)

    leading = p.leading

    def reduced(values: Tensor, hard: bool = False) -> Tensor:
        value = reduce_rows(values, rows, loss, hard=hard)
        return value.reshape(leading) if loss.reduction == "none" else value

    total = reduced(per_row)
    if apart:
        total = total + reduced(loss.hard_weight * hard, hard=True)

    predictions = logits.detach().argmax(-1)
    if counted is not None:
        predictions = predictions.masked_fill(~counted, -1)
    return MFDOutput(
        total,
        reduced(soft).detach(),
        reduced(hard, hard=True).detach(),
        reduced(feature).detach(),
        weights.detach().reshape(*leading, modalities),
        predictions.reshape(leading),
    )


def _existing(values: Tensor, counted: Tensor | None) -> Tensor:
    """``values`` with 0 on the rows that are not counted."""
    if counted is None:
        return values
    return torch.where(counted.reshape(-1, *(1,) * (values.dim() - 1)), values, torch.zeros_like(values))
