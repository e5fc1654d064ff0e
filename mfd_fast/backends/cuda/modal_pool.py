"""modal_pool on the CUDA C++ kernels: marshals tensors to addresses, allocates the outputs, launches."""

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
    feature_gradients,
    feature_matrices,
    reads_pool,
    row_matrix,
)
from ..plans import Places
from ..protocol import PoolGradients, PoolNeeds
from . import native, why_not_device
from .launch import where

__all__ = ["backward", "call_plan", "can_run", "forward", "plan", "pool_description"]


def can_run(problem: PoolProblem) -> str | None:
    """None if the kernels cover this call, else the reason."""
    if problem.modalities > MAX_MODALITIES:
        return f"the kernel has room for {MAX_MODALITIES} modalities, not for {problem.modalities}"
    return why_not_device(problem.device)


def contiguous(value: Tensor | None, keep: list[Any]) -> int:
    """Address of ``value`` as a contiguous tensor of its own dtype, 0 for None."""
    if value is None:
        return 0
    value = value.contiguous()
    keep.append(value)
    return value.data_ptr()


def _code(tensor: Tensor | None) -> int:
    return 0 if tensor is None else DTYPES[tensor.dtype]


def pool_description(module: ModuleType, p: PoolProblem, keep: list[Any]) -> tuple[Any, tuple[int, int, int]]:
    """The native description of a pool and the dtypes of query, scores and bias.

    Tensors it points into are appended to ``keep``. The host does not wait for the temperature.
    """
    tau = p.temperature
    temperature: RowScalar
    if isinstance(tau, Tensor):
        temperature = (1.0, contiguous(tau, keep), 0 if tau.dim() == 0 else 1)
    else:
        temperature = (tau, 0, 0)
    pool = module.Pool(
        p.leading.numel(),
        p.width,
        p.dtype is torch.float64,
        feature_matrices(p.features, p.stacked, keep),
        contiguous(p.query, keep),
        contiguous(p.scores, keep),
        contiguous(p.bias, keep),
        *temperature,
        p.scale,
        contiguous(p.present, keep),
    )
    return pool, (_code(p.query), _code(p.scores), _code(p.bias))


def plan(p: PoolProblem, backward: bool = False) -> tuple[bool, bool, int]:
    """How the device shares the rows: whether they lie in shared memory, whether a block works on a row, blocks."""
    module = native()
    keep: list[Any] = []
    pool, dtypes = pool_description(module, p, keep)
    found: tuple[bool, bool, int] = module.cuda.pool_plan(
        pool, dtypes, backward, DTYPES[p.out_dtype], where(p.device)[0]
    )
    return found


def forward(p: PoolProblem) -> tuple[Tensor, Tensor]:
    """pooled ``[..., D]`` and weights ``[..., M]``, in one launch."""
    module = native()
    keep: list[Any] = []
    pooled = allocate.empty_large(torch.Size([*p.leading, p.width]), p.out_dtype, p.device)
    weights = allocate.empty((*p.leading, p.modalities), p.dtype, p.device)
    if p.leading.numel():
        module.cuda.pool_forward(
            *pool_description(module, p, keep),
            pooled.data_ptr(),
            DTYPES[p.out_dtype],
            weights.data_ptr(),
            *where(p.device),
        )
    return pooled, weights


def call_plan(p: PoolProblem, places: Places) -> Any:
    """The native plan of :func:`forward` and :func:`backward` for calls like this one; None where :func:`reads_pool`
    says so.
    """
    module = native()
    if not hasattr(module.cuda, "PoolPlan") or not p.leading.numel() or not reads_pool(p, places, False):
        return None
    pool, dtypes = pool_description(module, p, [])
    return module.cuda.PoolPlan(
        dtypes,
        pool,
        DTYPES[p.out_dtype],
        p.stacked,
        *temperature_range(p.dtype),
        places.argument("temperature"),
        *places.first(),
        places.given,
    )


def backward(
    p: PoolProblem, weights: Tensor, d_pooled: Tensor | None, d_weights: Tensor | None, needs: PoolNeeds
) -> PoolGradients:
    """Gradients of query, scores, bias, temperature and each of the features; a second launch adds up partial sums."""
    module = native()
    keep: list[Any] = []
    dtype, device = p.dtype, p.device
    d_features, addresses, row_stride = feature_gradients(p.features, needs.features, p.stacked, p.modalities, p.width)

    def empty(need: bool, like: Tensor | None) -> Tensor | None:
        return allocate.empty(tuple(like.shape), like.dtype, device) if need and like is not None else None

    per_row = isinstance(p.temperature, Tensor) and p.temperature.dim() > 0
    d_query, d_scores, d_bias = empty(needs.query, p.query), empty(needs.scores, p.scores), empty(needs.bias, p.bias)
    d_temperature = empty(needs.temperature, p.temperature_tensor)
    found = PoolGradients(d_query, d_scores, d_bias, d_temperature, d_features)
    if p.leading.numel() == 0:
        for t in (*found[:4], *found.features):
            if t is not None:
                t.zero_()
        return found
    pool, dtypes = pool_description(module, p, keep)
    up = NO_ROWS if d_pooled is None else row_matrix(d_pooled, keep)
    query_partial = shared_partial = None
    if needs.query or needs.bias or (needs.temperature and not per_row):
        code = up[1] if d_pooled is not None else DTYPES[p.features[0].dtype]
        _, _, blocks = module.cuda.pool_plan(pool, dtypes, True, code, where(device)[0])
        if needs.query:
            query_partial = allocate.empty((blocks, p.width), dtype, device)
        if needs.bias or (needs.temperature and not per_row):
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
