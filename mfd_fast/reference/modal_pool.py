"""modal_pool in plain PyTorch: softmax-weighted sum over modalities.

s_m = (scale·⟨query, x_m⟩ or given score) + bias_m,   a = softmax_m(s/τ) over the present modalities,
pooled = Σ_m a_m x_m
"""

from __future__ import annotations

import torch
from torch import Tensor


def modal_weights(logits: Tensor, temperature: float | Tensor, present: Tensor | None) -> Tensor:
    """Softmax of ``logits / temperature`` over the present modalities: ``[..., M]``.

    Logits of absent modalities are finite. A row with nothing present gives zeros and zero gradients.
    """
    weights = _exponents(logits, temperature, present).softmax(-1)
    return weights if present is None else weights.masked_fill(~present, 0.0)


def modal_log_weights(logits: Tensor, temperature: float | Tensor, present: Tensor | None) -> Tensor:
    """Logarithm of :func:`modal_weights`: finite where a weight underflows, -inf where a modality is absent."""
    log_weights = _exponents(logits, temperature, present).log_softmax(-1)
    return log_weights if present is None else log_weights.masked_fill(~present, -torch.inf)


def _exponents(logits: Tensor, temperature: float | Tensor, present: Tensor | None) -> Tensor:
    logits = logits / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    if present is None:
        return logits
    # A row with nothing present keeps finite logits, so that zeroing its weights zeroes its gradients.
    return logits.masked_fill(~(present | ~present.any(-1, keepdim=True)), -torch.inf)


def present_features(features: list[Tensor], present: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """The features in ``dtype``; an absent modality is replaced by zeros before anything is computed from it."""
    xs = [x.to(dtype) for x in features]
    if present is None:
        return xs
    return [x.masked_fill(~present[..., m, None], 0.0) for m, x in enumerate(xs)]


def modal_scores(
    xs: list[Tensor],
    query: Tensor | None,
    scores: Tensor | None,
    bias: Tensor | None,
    present: Tensor | None,
    scale: float,
) -> Tensor:
    """``s [..., M]`` of :func:`present_features`, in their dtype."""
    dtype = xs[0].dtype
    if query is not None:
        logits = scale * torch.stack([(x * query.to(dtype)).sum(-1) for x in xs], -1)
    elif scores is not None:
        logits = scores.to(dtype)
        if present is not None:
            logits = logits.masked_fill(~present, 0.0)
    else:
        logits = xs[0].new_zeros(*xs[0].shape[:-1], len(xs))
    return logits if bias is None else logits + bias.to(dtype)


def modal_pool(
    features: list[Tensor],
    query: Tensor | None,
    scores: Tensor | None,
    bias: Tensor | None,
    temperature: float | Tensor,
    present: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``pooled [..., D]`` and ``weights [..., M]`` in ``dtype``; a row with nothing present gives zeros."""
    xs = present_features(features, present, dtype)
    weights = modal_weights(modal_scores(xs, query, scores, bias, present, scale), temperature, present)
    return weighted_sum(xs, weights), weights


def weighted_sum(xs: list[Tensor], weights: Tensor) -> Tensor:
    """Σ_m weights_m x_m, ``[..., D]``."""
    pooled = torch.zeros_like(xs[0])
    # The gradient of one unbind costs O(M), that of M selections O(M²).
    for share, x in zip(weights.unbind(-1), xs, strict=True):
        pooled = pooled + share[..., None] * x
    return pooled
