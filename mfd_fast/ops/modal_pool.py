"""modal_pool: attention or weighted average over modalities.

    s_m = (scale·⟨query, x_m⟩ or given score) + bias_m,   a = softmax_m(s/τ) over the present modalities,
    pooled = Σ_m a_m x_m
Backward: ds_m = a_m (g_m − Σ_j a_j g_j)/τ with g_m = ⟨dpooled, x_m⟩ + dweights_m; dx_m = a_m dpooled +
ds_m·scale·query. Attention pooling: Ilse, Tomczak, Welling, arXiv:1802.04712.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import contract
from ..backends import check_not_traced, choose, implementation
from ..types import ModalPool
from . import pool_registered as registered
from .pool_problem import PoolProblem, by_reference, check_pool, differentiable_gradients

# ------------------------------------------------------------------------------------------------- autograd


class _Pool(torch.autograd.Function):
    """pooled and weights; the backward reads the features once more and recomputes nothing but dot products."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: PoolProblem,
        backend: str,
        query: Tensor | None,
        scores: Tensor | None,
        bias: Tensor | None,
        temperature: Tensor | None,
        *features: Tensor,
    ) -> tuple[Tensor, Tensor]:
        pooled, weights = implementation(backend, "modal_pool").forward(problem)
        ctx.call = (problem, backend)
        ctx.save_for_backward(weights, problem.present, query, scores, bias, temperature, *features)
        ctx.set_materialize_grads(False)
        return pooled, weights

    @staticmethod
    def backward(ctx: Any, d_pooled: Tensor | None, d_weights: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_pooled is None and d_weights is None:
            return (None,) * len(ctx.needs_input_grad)
        problem, backend = ctx.call
        weights, present, query, scores, bias, temperature, *features = ctx.saved_tensors
        problem = problem.with_leaves(present, query, scores, bias, temperature, features)
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return (None, None, *differentiable_gradients(problem, d_pooled, d_weights, needs))
        d_pooled, d_weights = (None if d is None else contract.upstream(d) for d in (d_pooled, d_weights))
        found = implementation(backend, "modal_pool").backward(problem, weights, d_pooled, d_weights, needs)
        return (None, None, *found)


def pool(problem: PoolProblem, backend: str) -> tuple[Tensor, Tensor]:
    """pooled and weights of a checked call on a chosen backend."""
    if backend == "reference":
        return contract.by_pytorch("modal_pool", problem.tensors(), lambda: by_reference(problem))
    if contract.is_recorded():
        return contract.by_pytorch("modal_pool", problem.tensors(), lambda: registered.pool(problem, backend))
    p = problem
    result: tuple[Tensor, Tensor] = _Pool.apply(
        p, backend, p.query, p.scores, p.bias, p.temperature_tensor, *p.features
    )
    return result


def choose_backend(problem: PoolProblem, backend: str | None) -> str:
    """Under torch.compile the registered op chooses when it runs: "" stands for that."""
    if not contract.is_recorded():
        return choose("modal_pool", problem, backend)
    return backend or ""


# ------------------------------------------------------------------------------------------- public function


def modal_pool(
    features: Sequence[Tensor] | Tensor,
    query: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    present: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> ModalPool:
    """Fuses M modalities by attention (``query``), given ``scores``, or a weighted average (``bias`` alone).

    Args:
        features: M tensors ``[..., D]`` of one shape, or one ``[..., M, D]``; any floating dtypes and strides.
        query: ``[D]``; scores are ``scale·⟨query, x_m⟩``.
        scores: ``[..., M]`` scores given from outside; excludes ``query``.
        bias: ``[M]`` added to the scores: a learned prior over the modalities.
        temperature: number > 0, 0-d tensor, or one per row ``[...]``; may require grad.
        present: bool ``[..., M]``; an absent modality has weight 0 and is not read (NaN there has no effect).
        scale: number; None uses ``D**-0.5``.
        backend: "reference", "cpu", "triton", "cuda" or None for the fastest that can run.

    Returns:
        :class:`~mfd_fast.types.ModalPool`: ``pooled [..., D]`` in the features' dtype, ``weights [..., M]``
        in float32 (float64 for float64 features); both differentiable to every floating input. A row with
        no modality present gives zeros and zero gradients. A score of -inf is a weight of 0; a row whose present
        modalities all have -inf has no softmax and is NaN, as a row of logits that are all -inf.

    Raises:
        TypeError, ValueError: an argument breaks the contract. BackendError: the backend cannot run.

    Source: attention pooling of Ilse, Tomczak, Welling, arXiv:1802.04712, with a single query.

    >>> import torch, mfd_fast as mfd
    >>> image, text = torch.ones(1, 2), torch.zeros(1, 2)
    >>> mfd.modal_pool([image, text]).pooled
    tensor([[0.5000, 0.5000]])
    """
    check_not_traced("modal_pool", backend)
    problem = check_pool(
        "modal_pool",
        features,
        query,
        scores=scores,
        bias=bias,
        temperature=temperature,
        present=present,
        scale=scale,
    )
    return ModalPool(*pool(problem, choose_backend(problem, backend)))
