"""modal_pool on the native CPU kernels: marshals tensors to addresses and allocates the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import allocate
from . import native
from .rows import DTYPES, NO_ROWS, address, cast, dense, rows_argument, stacked_arguments, streams, temperature_argument

#: Modalities that the kernels have room for.
MAX_MODALITIES = 32


def can_run(problem: Any) -> str | None:
    """Why the native kernels cannot take this call, None if they can."""
    if problem.device.type != "cpu":
        return f"the tensors are on {problem.device}"
    if problem.modalities > MAX_MODALITIES:
        return f"the native kernel has room for {MAX_MODALITIES} modalities, not for {problem.modalities}"
    return None


def native_pool(module: Any, p: Any, keep: list[Tensor]) -> Any:
    """The native description of a pool; tensors it points into are appended to ``keep``."""
    features = stacked_arguments(p.features[0], keep) if p.stacked else [rows_argument(x, keep) for x in p.features]
    temperature = p.temperature
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature.reshape(-1).to(p.dtype).contiguous()
        keep.append(temperature)
    return module.Pool(
        p.leading.numel(),
        p.width,
        p.dtype is torch.float64,
        features,
        dense(p.query, p.dtype, keep),
        dense(p.scores, p.dtype, keep),
        dense(p.bias, p.dtype, keep),
        *temperature_argument(temperature),
        p.scale,
        dense(p.present, torch.bool, keep),
    )


def forward(p: Any) -> tuple[Tensor, Tensor]:
    """pooled ``[..., D]`` and weights ``[..., M]``."""
    module = native()
    keep: list[Tensor] = []
    pooled = allocate.empty_large(torch.Size([*p.leading, p.width]), p.out_dtype, p.device)
    weights = allocate.empty((*p.leading, p.modalities), p.dtype, p.device)
    module.pool_forward(
        native_pool(module, p, keep),
        pooled.data_ptr(),
        DTYPES[p.out_dtype],
        weights.data_ptr(),
        streams(pooled),
        torch.get_num_threads(),
    )
    return pooled, weights


def feature_gradients(
    features: Sequence[Tensor], needs: Sequence[bool], stacked: bool, modalities: int, width: int
) -> tuple[list[Tensor | None], list[int], int]:
    """Gradient tensors, one address per modality, and the distance of two rows in elements."""
    found = [allocate.empty_gradient(x) if need else None for x, need in zip(features, needs, strict=True)]
    if not stacked:
        return found, [address(t) for t in found], width
    (one,) = found
    if one is None:
        return found, [0] * modalities, width
    return found, [one.data_ptr() + m * width * one.itemsize for m in range(modalities)], modalities * width


def backward(
    p: Any, weights: Tensor, d_pooled: Tensor | None, d_weights: Tensor | None, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of query, scores, bias, temperature and each of the features."""
    module = native()
    keep: list[Tensor] = []
    need_query, need_scores, need_bias, need_temperature, *need_features = needs
    dtype, device = p.dtype, p.device
    d_features, addresses, row_stride = feature_gradients(p.features, need_features, p.stacked, p.modalities, p.width)

    def empty(need: bool, *shape: int) -> Tensor | None:
        return allocate.empty(shape, dtype, device) if need else None

    per_row = need_temperature and p.temperature.dim() > 0
    d_query, d_bias = empty(need_query, p.width), empty(need_bias, p.modalities)
    d_scores = empty(need_scores, *p.leading, p.modalities)
    d_temperature = empty(need_temperature, *(p.leading if per_row else ()))
    module.pool_backward(
        native_pool(module, p, keep),
        dense(weights, dtype, keep),
        NO_ROWS if d_pooled is None else rows_argument(d_pooled, keep),
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
    if d_query is not None:
        d_query = cast(d_query, p.query.dtype)
    if d_scores is not None:
        d_scores = cast(d_scores, p.scores.dtype)
    if d_bias is not None:
        d_bias = cast(d_bias, p.bias.dtype)
    return [d_query, d_scores, d_bias, d_temperature, *d_features]
