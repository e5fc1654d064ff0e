"""modal_pool on the CUDA C++ kernels: marshals tensors to addresses, allocates the outputs, launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import allocate
from ..cpu.modal_pool import MAX_MODALITIES, feature_gradients
from ..cpu.rows import DTYPES, NO_ROWS, address, rows_argument, stacked_arguments
from . import native, why_not_device
from .launch import where

__all__ = ["backward", "can_run", "forward", "native_pool", "plan"]


def can_run(problem: Any) -> str | None:
    """None if the kernels cover this call, else the reason."""
    if problem.modalities > MAX_MODALITIES:
        return f"the kernel has room for {MAX_MODALITIES} modalities, not for {problem.modalities}"
    return why_not_device(problem.device)


def contiguous(value: Tensor | None, keep: list[Tensor]) -> int:
    """Address of ``value`` as a contiguous tensor of its own dtype, 0 for None."""
    if value is None:
        return 0
    value = value.contiguous()
    keep.append(value)
    return value.data_ptr()


def _code(tensor: Tensor | None) -> int:
    return 0 if tensor is None else DTYPES[tensor.dtype]


def native_pool(module: Any, p: Any, keep: list[Tensor]) -> tuple[Any, tuple[int, int, int]]:
    """The native description of a pool and the dtypes of query, scores and bias.

    Tensors it points into are appended to ``keep``. The host does not wait for the temperature.
    """
    features = stacked_arguments(p.features[0], keep) if p.stacked else [rows_argument(x, keep) for x in p.features]
    tau = p.temperature
    temperature: tuple[float, int, int] = (1.0, 0, 0)
    if isinstance(tau, Tensor):
        temperature = (1.0, contiguous(tau, keep), 0 if tau.dim() == 0 else 1)
    else:
        temperature = (tau, 0, 0)
    pool = module.Pool(
        p.leading.numel(),
        p.width,
        p.dtype is torch.float64,
        features,
        contiguous(p.query, keep),
        contiguous(p.scores, keep),
        contiguous(p.bias, keep),
        *temperature,
        p.scale,
        contiguous(p.present, keep),
    )
    return pool, (_code(p.query), _code(p.scores), _code(p.bias))


def plan(p: Any, backward: bool = False) -> tuple[bool, bool, int]:
    """How the device shares the rows: whether they lie in shared memory, whether a block works on a row, blocks."""
    module = native()
    pool, _ = native_pool(module, p, [])
    found: tuple[bool, bool, int] = module.cuda.pool_plan(pool, backward, DTYPES[p.out_dtype], where(p.device)[0])
    return found


def forward(p: Any) -> tuple[Tensor, Tensor]:
    """pooled ``[..., D]`` and weights ``[..., M]``, in one launch."""
    module = native()
    keep: list[Tensor] = []
    pooled = allocate.empty_large(torch.Size([*p.leading, p.width]), p.out_dtype, p.device)
    weights = allocate.empty((*p.leading, p.modalities), p.dtype, p.device)
    if p.leading.numel():
        module.cuda.pool_forward(
            *native_pool(module, p, keep),
            pooled.data_ptr(),
            DTYPES[p.out_dtype],
            weights.data_ptr(),
            *where(p.device),
        )
    return pooled, weights


def backward(
    p: Any, weights: Tensor, d_pooled: Tensor | None, d_weights: Tensor | None, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of query, scores, bias, temperature and each of the features; a second launch adds up partial sums."""
    module = native()
    keep: list[Tensor] = []
    need_query, need_scores, need_bias, need_temperature, *need_features = needs
    dtype, device = p.dtype, p.device
    d_features, addresses, row_stride = feature_gradients(p.features, need_features, p.stacked, p.modalities, p.width)

    def empty(need: bool, like: Tensor | None) -> Tensor | None:
        return allocate.empty(tuple(like.shape), like.dtype, device) if need and like is not None else None

    per_row = need_temperature and p.temperature.dim() > 0
    d_query, d_scores, d_bias = empty(need_query, p.query), empty(need_scores, p.scores), empty(need_bias, p.bias)
    d_temperature = empty(need_temperature, p.temperature_tensor)
    found = [d_query, d_scores, d_bias, d_temperature, *d_features]
    if p.leading.numel() == 0:
        return [None if t is None else t.zero_() for t in found]
    pool, dtypes = native_pool(module, p, keep)
    up = NO_ROWS if d_pooled is None else rows_argument(d_pooled, keep)
    query_partial = shared_partial = None
    if need_query or need_bias or (need_temperature and not per_row):
        code = up[1] if d_pooled is not None else DTYPES[p.features[0].dtype]
        _, _, blocks = module.cuda.pool_plan(pool, True, code, where(device)[0])
        if need_query:
            query_partial = allocate.empty((blocks, p.width), dtype, device)
        if need_bias or (need_temperature and not per_row):
            shared_partial = allocate.empty((blocks, p.modalities + 1), torch.float64, device)
    if d_weights is not None:
        d_weights = d_weights.to(dtype)
    module.cuda.pool_backward(
        pool,
        dtypes,
        contiguous(weights, keep),
        up,
        contiguous(d_weights, keep),
        addresses,
        row_stride,
        address(d_query),
        address(d_bias),
        0 if per_row else address(d_temperature),
        address(d_scores),
        address(d_temperature) if per_row else 0,
        address(query_partial),
        address(shared_partial),
        *where(device),
    )
    return found
