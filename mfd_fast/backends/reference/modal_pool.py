"""The modal_pool entry points in plain PyTorch, with the gradients of ``numerics`` written out.

The public function with ``backend="reference"`` runs the differentiable :mod:`mfd_fast.reference.modal_pool`
directly; these entry points serve the registered ops, inside which autograd does not record.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...problems.pool import PoolProblem
from ...reference.modal_pool import modal_pool
from ..protocol import PoolGradients, PoolNeeds

__all__ = ["backward", "can_run", "forward"]


def can_run(problem: PoolProblem) -> str | None:  # noqa: ARG001
    """Every call can run."""
    return None


def forward(p: PoolProblem) -> tuple[Tensor, Tensor]:
    """pooled ``[..., D]`` and weights ``[..., M]``, in memory of their own."""
    features = p.modality_features()
    pooled, weights = modal_pool(features, p.query, p.scores, p.bias, p.temperature, p.present, p.scale, p.dtype)
    return pooled.to(p.out_dtype, copy=True), weights.clone(memory_format=torch.contiguous_format)


def backward(
    p: PoolProblem, weights: Tensor, d_pooled: Tensor | None, d_weights: Tensor | None, needs: PoolNeeds
) -> PoolGradients:
    """Gradients of query, scores, bias, temperature and each of the features."""
    xs = [x.to(p.dtype) for x in p.modality_features()]
    zero = weights.new_zeros(())
    if p.present is not None:
        xs = [torch.where(p.present[..., m, None], x, zero) for m, x in enumerate(xs)]
    up = xs[0].new_zeros(xs[0].shape) if d_pooled is None else d_pooled.to(p.dtype)
    # g_m = <dpooled, x_m> + dweights_m, ds_m = a_m (g_m - sum_j a_j g_j)/temperature
    g = torch.stack([(up * x).sum(-1) for x in xs], -1)
    if d_weights is not None:
        g = g + d_weights
    ds = weights * (g - (weights * g).sum(-1, keepdim=True))
    if p.present is not None:
        ds = torch.where(p.present, ds, zero)
    temperature = p.temperature
    ds = ds / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)

    d_query = d_scores = d_bias = d_temperature = None
    rows = tuple(range(weights.dim() - 1))
    if needs.query and p.query is not None:
        total = torch.stack([ds[..., m, None] * x for m, x in enumerate(xs)]).sum((0, *(r + 1 for r in rows)))
        d_query = (p.scale * total).to(p.query.dtype)
    if needs.scores and p.scores is not None:
        d_scores = ds.to(p.scores.dtype, copy=True)
    if needs.bias and p.bias is not None:
        d_bias = (ds.sum(rows) if rows else ds.clone()).to(p.bias.dtype)
    if needs.temperature and isinstance(temperature, Tensor):
        # sum_m ds_m = 0, so log a_m may stand for s_m/temperature, from which it differs by a constant.
        per_row = -(ds * torch.where(weights == 0, torch.ones_like(weights), weights).log()).sum(-1)
        d_temperature = per_row if temperature.dim() else per_row.sum()
    dxs = [weights[..., m, None] * up for m in range(len(xs))]
    if p.query is not None:
        dxs = [dx + ds[..., m, None] * (p.scale * p.query.to(p.dtype)) for m, dx in enumerate(dxs)]
    if p.present is not None:
        dxs = [torch.where(p.present[..., m, None], dx, zero) for m, dx in enumerate(dxs)]
    if p.stacked:
        d_features = [torch.stack(dxs, -2).to(p.features[0].dtype) if needs.features[0] else None]
    else:
        features = zip(dxs, p.features, needs.features, strict=True)
        d_features = [dx.to(x.dtype, copy=True) if need else None for dx, x, need in features]
    return PoolGradients(d_query, d_scores, d_bias, d_temperature, d_features)
