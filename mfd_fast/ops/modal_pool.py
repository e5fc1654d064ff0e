"""modal_pool: attention or weighted average over modalities.

    s_m = (scale·⟨query, x_m⟩ or given score) + bias_m,   a = softmax_m(s/τ) over the present modalities,
    pooled = Σ_m a_m x_m
Backward: ds_m = a_m (g_m − Σ_j a_j g_j)/τ with g_m = ⟨dpooled, x_m⟩ + dweights_m; dx_m = a_m dpooled +
ds_m·scale·query. Attention pooling: Ilse, Tomczak, Welling, arXiv:1802.04712.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import check_not_traced, choose, choose_recorded, pool_backend
from ..backends.plans import Done, Plans
from ..backends.protocol import PoolGradients, PoolNeeds
from ..problems.checks import by_pytorch, is_recorded, upstream
from ..problems.pool import PoolProblem, check_pool
from ..reference.modal_pool import modal_pool as reference_pool
from ..types import ModalPoolOutput
from .autograd import apply_of_plans, needs_reference, reference_gradients, requires_grad
from .registration import define, define_backward, differentiate, flatten, unflatten

# ------------------------------------------------------------------------------------------------- autograd


class _Pool(torch.autograd.Function):
    """pooled and weights; the backward reads the features once more and recomputes nothing but dot products."""

    @staticmethod
    def forward(ctx: Any, done: Done, *leaves: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        (pooled, weights), backend, tensors, rest, plan = done
        ctx.save_for_backward(*tensors, weights)
        ctx.call = backend, rest, plan
        ctx.set_materialize_grads(False)
        return pooled, weights

    @staticmethod
    def backward(ctx: Any, d_pooled: Tensor | None, d_weights: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_pooled is None and d_weights is None:
            return (None,) * len(ctx.needs_input_grad)
        (backend, rest, plan), needs = ctx.call, ctx.needs_input_grad[1:]
        kept = ctx.saved_tensors  # once: a checkpoint gives it once
        if plan is not None and not torch.compiler.is_compiling():
            found = plan.backward(kept, rest, d_pooled, d_weights, needs)
            if found is not None:
                return None, *found
        *tensors, weights = kept
        problem = _PLANS.problem(rest, iter(tensors))
        if needs_reference(d_pooled, d_weights):

            def values(leaves: list[Any]) -> tuple[Tensor, Tensor]:
                return by_reference(_with_leaves(problem, leaves))

            return None, *reference_gradients(_leaves(problem), values, (d_pooled, d_weights), needs)
        d_pooled, d_weights = (None if d is None else upstream(d) for d in (d_pooled, d_weights))
        wanted = unflatten(PoolNeeds, needs, len(problem.features))
        return None, *flatten(pool_backend(backend).backward(problem, weights, d_pooled, d_weights, wanted))


def _leaves(p: PoolProblem) -> tuple[Tensor | None, ...]:
    return p.query, p.scores, p.bias, p.temperature_tensor, *p.features


def _with_leaves(p: PoolProblem, leaves: Sequence[Any]) -> PoolProblem:
    query, scores, bias, temperature, *features = leaves
    tau = p.temperature if temperature is None else temperature
    return p.replace(query=query, scores=scores, bias=bias, temperature=tau, features=features)


def by_reference(p: PoolProblem) -> tuple[Tensor, Tensor]:
    """pooled and weights in plain PyTorch."""
    features = p.modality_features()
    pooled, weights = reference_pool(features, p.query, p.scores, p.bias, p.temperature, p.present, p.scale, p.dtype)
    return pooled.to(p.out_dtype), weights


def pool(problem: PoolProblem, backend: str, arguments: tuple[Any, ...] | None = None) -> tuple[Tensor, Tensor]:
    """pooled and weights of a checked call on a chosen backend; ``arguments`` of modal_pool, where it was called."""
    if backend == "reference":
        return by_pytorch("modal_pool", problem.named_tensors, lambda: by_reference(problem))
    if is_recorded():
        return by_pytorch("modal_pool", problem.named_tensors, lambda: _op(backend, [problem]))
    with torch.no_grad():
        results = pool_backend(backend).forward(problem)
    if arguments is None:
        rest, tensors = problem.split()
        done = Done(results, backend, tensors, rest)
    else:
        plan = getattr(pool_backend(backend), "call_plan", None)
        done = _PLANS.computed(results, backend, problem, arguments, plan, problem)
    return _Pool.apply(done, *_leaves(problem)) if requires_grad(*_leaves(problem)) else results


# -------------------------------------------------------------------------------------------- registered ops


def _chosen(backend: str | None, problem: PoolProblem) -> Any:
    return pool_backend(choose("modal_pool", problem, backend))


def _run(backend: str | None, problem: PoolProblem) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _chosen(backend, problem).forward(problem)
    return found


def _fake(p: PoolProblem) -> tuple[Tensor, Tensor]:
    empty = p.features[0].new_empty
    return empty((*p.leading, p.width), dtype=p.out_dtype), empty((*p.leading, p.modalities), dtype=p.dtype)


def _run_backward(
    backend: str | None,
    problem: PoolProblem,
    weights: Tensor,
    d_pooled: Tensor | None,
    d_weights: Tensor | None,
    needs: list[bool],
) -> PoolGradients:
    wanted = unflatten(PoolNeeds, needs, len(problem.features))
    found: PoolGradients = _chosen(backend, problem).backward(problem, weights, d_pooled, d_weights, wanted)
    return found


def _like(p: PoolProblem) -> PoolGradients:
    return PoolGradients(p.query, p.scores, p.bias, p.temperature_tensor, list(p.features))


def _backward(
    backend: str, problems: list[PoolProblem], kept: list[Tensor], grads: tuple[Any, ...], need: Callable[..., Any]
) -> dict[tuple[int, str], Any]:
    (problem,), (weights,), (d_pooled, d_weights) = problems, kept, grads
    if d_pooled is None and d_weights is None:
        return {}
    names = PoolNeeds._fields
    needs = flatten(PoolNeeds(*(need(0, name) for name in names)))
    flat = _op_backward(backend, [problem], weights, d_pooled, d_weights, needs)
    wanted = [g if need else None for g, need in zip(flat, needs, strict=True)]
    found = unflatten(PoolGradients, wanted, len(problem.features))
    return {(0, name): gradient for name, gradient in zip(names, found, strict=True)}


_op = define("modal_pool", (PoolProblem,), "", "(Tensor, Tensor)", _run, _fake, read=False)
_op_backward = define_backward(
    "modal_pool",
    (PoolProblem,),
    "Tensor weights, Tensor? d_pooled, Tensor? d_weights",
    _run_backward,
    _like,
    read=False,
)
differentiate("modal_pool", (PoolProblem,), lambda out: out[1:], lambda out: (), _backward)  # noqa: ARG005


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
) -> ModalPoolOutput:
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
        :class:`~mfd_fast.types.ModalPoolOutput`: ``pooled [..., D]`` in the features' dtype, ``weights [..., M]``
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
    arguments = (features, query, scores, bias, temperature, present, scale, backend)
    if not torch.compiler.is_compiling() and (done := _PLANS.run(arguments)) is not None:
        if done[2] is None:
            return ModalPoolOutput(*done[0])
        each = (features,) if isinstance(features, Tensor) else features
        return ModalPoolOutput(*_apply(done, query, scores, bias, None, *each))

    check_not_traced("modal_pool", backend)
    problem = _PLANS.check(arguments)
    name = (choose_recorded if is_recorded() else choose)("modal_pool", problem, backend)
    return ModalPoolOutput(*pool(problem, name, arguments))


_apply = apply_of_plans(_Pool)
_PLANS = Plans(modal_pool, check_pool, numbers=("temperature",))
