"""mfd_loss in plain PyTorch: pool the modalities, classify, and sum the four terms per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rows import Rows
from ..types import MFDOutput
from .distill_loss import reduce_rows, row_terms
from .feature_loss import row_distance
from .modal_pool import modal_pool


def is_used(weight: float | Tensor) -> bool:
    """A term whose weight is the number 0 is not computed."""
    return isinstance(weight, Tensor) or weight != 0


def pool_divergence(teacher_weights: Tensor, weights: Tensor) -> Tensor:
    """KL(teacher_weights ‖ weights) over modalities per row, with 0·log 0 = 0, never negative."""
    absent = teacher_weights == 0
    one = torch.ones_like(weights)
    ratio = torch.where(absent, one, teacher_weights).log() - torch.where(absent, one, weights).log()
    kl = (teacher_weights * ratio).sum(-1)
    return torch.where(kl < 0, kl - kl.detach(), kl)


def mfd_loss(problem: Any) -> MFDOutput:
    """The single pass, term by term; ``problem`` is :class:`mfd_fast.ops.mfd_loss.MFDProblem`."""
    p = problem
    rows: Rows = p.rows
    counted = rows.counted()
    n = rows.n_rows
    dtype = rows.dtype
    features = [x.reshape(n, x.shape[-1]).to(dtype) for x in p.features]
    zero = torch.zeros((), dtype=dtype, device=rows.device)
    present = None if p.present is None else p.present.reshape(n, len(features))
    if counted is not None:  # a row that does not exist has neither modalities nor features
        features = [torch.where(counted[:, None], x, zero) for x in features]
        present = counted[:, None] if present is None else present & counted[:, None]
        present = present.expand(n, len(features))
    temperature = p.pool_temperature
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature.reshape(n)
    pooled, weights = modal_pool(features, p.query, None, p.bias, temperature, present, p.pool_scale, dtype)
    logits = pooled @ p.head_weight.to(dtype).T
    if p.head_bias is not None:
        logits = logits + p.head_bias.to(dtype)

    soft_used, hard_used = is_used(p.soft_weight), is_used(p.hard_weight)
    terms = row_terms(
        rows.replace(student=logits, teacher=rows.teacher.reshape(n, rows.classes)),
        "mfd_loss",
        soft=soft_used,
        hard=hard_used,
    )
    feature = torch.zeros_like(terms.soft)
    if is_used(p.feature_weight):
        target = p.teacher_features.reshape(n, p.teacher_features.shape[-1]).to(dtype)
        feature = _existing(row_distance(pooled, _existing(target, counted), p.feature_kind), counted)
    per_row = torch.zeros_like(terms.soft)
    for weight, term in ((p.soft_weight, terms.soft), (p.hard_weight, terms.hard), (p.feature_weight, feature)):
        if is_used(weight):
            per_row = per_row + weight * term
    if is_used(p.pool_weight):
        target = _existing(p.teacher_pool_weights.reshape(n, len(features)).to(dtype), counted)
        per_row = per_row + p.pool_weight * pool_divergence(target, weights)

    leading = p.leading

    def reduced(values: Tensor) -> Tensor:
        value = reduce_rows(values, rows, p.weight, p.reduction, p.normalizer)
        return value.reshape(leading) if p.reduction == "none" else value

    predictions = logits.detach().argmax(-1)
    if counted is not None:
        predictions = predictions.masked_fill(~counted, -1)
    return MFDOutput(
        reduced(per_row),
        reduced(terms.soft).detach(),
        reduced(terms.hard).detach(),
        reduced(feature).detach(),
        weights.detach().reshape(*leading, len(features)),
        predictions.reshape(leading),
    )


def _existing(values: Tensor, counted: Tensor | None) -> Tensor:
    """``values`` with 0 on the rows that are not counted."""
    if counted is None:
        return values
    return torch.where(counted.reshape(-1, *(1,) * (values.dim() - 1)), values, torch.zeros_like(values))
