"""modal_pool on the native CPU kernels: marshals tensors to addresses and allocates the outputs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...codes import DTYPES
from ...problems.checks import temperature_range
from ...problems.pool import PoolProblem
from .. import allocate
from ..native import (
    MAX_MODALITIES,
    NO_ROWS,
    RowScalar,
    address,
    cast,
    dense,
    feature_gradients,
    feature_matrices,
    reads_pool,
    row_matrix,
)
from ..plans import Places
from ..protocol import PoolGradients, PoolNeeds
from . import POOL_MIN_BYTES, native, streams

__all__ = ["backward", "call_plan", "can_run", "forward", "pool_description"]


def can_run(problem: PoolProblem) -> str | None:
    """Why the native kernels cannot take this call, None if they can."""
    if problem.device.type != "cpu":
        return f"the tensors are on {problem.device}"
    if problem.modalities > MAX_MODALITIES:
        return f"the native kernel has room for {MAX_MODALITIES} modalities, not for {problem.modalities}"
    return None


def _temperature(value: float | Tensor) -> RowScalar:
    if not isinstance(value, Tensor):
        return value, 0, 0
    if value.dim() == 0:
        return value.item(), 0, 0
    return 1.0, value.data_ptr(), 1


def pool_description(module: ModuleType, p: PoolProblem, keep: list[Any]) -> Any:
    """The native description of a pool; tensors it points into are appended to ``keep``."""
    temperature = p.temperature
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature.reshape(-1).to(p.dtype).contiguous()
        keep.append(temperature)
    return module.Pool(
        p.leading.numel(),
        p.width,
        p.dtype is torch.float64,
        feature_matrices(p.features, p.stacked, keep),
        dense(p.query, p.dtype, keep),
        dense(p.scores, p.dtype, keep),
        dense(p.bias, p.dtype, keep),
        *_temperature(temperature),
        p.scale,
        dense(p.present, torch.bool, keep),
    )


def forward(p: PoolProblem) -> tuple[Tensor, Tensor]:
    """pooled ``[..., D]`` and weights ``[..., M]``."""
    module = native()
    keep: list[Any] = []
    pooled = allocate.empty_large(torch.Size([*p.leading, p.width]), p.out_dtype, p.device)
    weights = allocate.empty((*p.leading, p.modalities), p.dtype, p.device)
    module.pool_forward(
        pool_description(module, p, keep),
        pooled.data_ptr(),
        DTYPES[p.out_dtype],
        weights.data_ptr(),
        streams(pooled),
        torch.get_num_threads(),
    )
    return pooled, weights


def call_plan(p: PoolProblem, places: Places) -> Any:
    """The native plan of :func:`forward` and :func:`backward` for calls like this one; None where there is more to do
    than read the arguments, or where the outputs are large.
    """
    if not reads_pool(p, places, True) or p.leading.numel() * p.width * p.out_dtype.itemsize >= POOL_MIN_BYTES:
        return None
    module = native()
    tensors, numbers = places.first()
    return module.PoolPlan(
        pool_description(module, p, []),
        DTYPES[p.out_dtype],
        p.stacked,
        *temperature_range(p.dtype),
        places.argument("temperature"),
        tensors,
        numbers,
        places.given,
    )


def backward(
    p: PoolProblem, weights: Tensor, d_pooled: Tensor | None, d_weights: Tensor | None, needs: PoolNeeds
) -> PoolGradients:
    """Gradients of query, scores, bias, temperature and each of the features."""
    module = native()
    keep: list[Any] = []
    dtype, device = p.dtype, p.device
    d_features, addresses, row_stride = feature_gradients(p.features, needs.features, p.stacked, p.modalities, p.width)

    def empty(need: bool, *shape: int) -> Tensor | None:
        return allocate.empty(shape, dtype, device) if need else None

    per_row = isinstance(p.temperature, Tensor) and p.temperature.dim() > 0
    d_query, d_bias = empty(needs.query, p.width), empty(needs.bias, p.modalities)
    d_scores = empty(needs.scores, *p.leading, p.modalities)
    d_temperature = empty(needs.temperature, *(p.leading if per_row else ()))
    module.pool_backward(
        pool_description(module, p, keep),
        dense(weights, dtype, keep),
        NO_ROWS if d_pooled is None else row_matrix(d_pooled, keep),
        dense(d_weights, dtype, keep),
        addresses,
        row_stride,
        streams(*d_features),
        address(d_query),
        address(d_bias),
        0 if per_row else address(d_temperature),
        address(d_scores),
        address(d_temperature) if per_row else 0,
        torch.get_num_threads(),
    )

    def like(gradient: Tensor | None, leaf: Tensor | None) -> Tensor | None:
        return None if gradient is None or leaf is None else cast(gradient, leaf.dtype)

    return PoolGradients(
        like(d_query, p.query), like(d_scores, p.scores), like(d_bias, p.bias), d_temperature, d_features
    )
