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
    logits = logits / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    if present is None:
        return logits.softmax(-1)
    # A row with nothing present keeps finite logits, so that zeroing its weights zeroes its gradients.
    keep = present | ~present.any(-1, keepdim=True)
    weights = logits.masked_fill(~keep, -torch.inf).softmax(-1)
    return torch.where(present, weights, torch.zeros_like(weights))


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
    xs = [x.to(dtype) for x in features]
    if present is not None:  # an absent modality is replaced before anything is computed from it
        zero = torch.zeros((), dtype=dtype, device=present.device)
        xs = [torch.where(present[..., m, None], x, zero) for m, x in enumerate(xs)]
    if query is not None:
        logits = scale * torch.stack([(x * query.to(dtype)).sum(-1) for x in xs], -1)
    elif scores is not None:
        logits = scores.to(dtype)
        if present is not None:
            logits = torch.where(present, logits, zero)
    else:
        logits = xs[0].new_zeros(*xs[0].shape[:-1], len(xs))
    if bias is not None:
        logits = logits + bias.to(dtype)
    weights = modal_weights(logits, temperature, present)
    pooled = torch.zeros_like(xs[0])
    # The gradient of one unbind costs O(M), that of M selections O(M²).
    for share, x in zip(weights.unbind(-1), xs, strict=True):
        pooled = pooled + share[..., None] * x
    return pooled, weights
