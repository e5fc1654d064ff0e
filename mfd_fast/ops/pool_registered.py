"""The ``torch.library`` face of modal_pool: what torch.compile sees instead of the autograd function.

    mfd_fast::modal_pool            pooled and weights
    mfd_fast::modal_pool_backward   gradients of features, query, scores, bias and temperature

The temperature is a tensor here, so changing it never recompiles. ``backend`` "" means: choose when the op runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import choose, implementation
from .pool_problem import PoolProblem, check_pool

# ``features`` hold one [..., M, D] tensor where ``stacked``; ``scale`` None stands for D**-0.5.
_SCHEMA = (
    "Tensor[] features, Tensor? query, Tensor? scores, Tensor? bias, Tensor temperature, Tensor? present, "
    "float? scale, bool stacked, str backend"
)
_N = 9  # arguments in _SCHEMA

_library = torch.library.Library("mfd_fast", "FRAGMENT")
_library.define(f"modal_pool({_SCHEMA}) -> (Tensor, Tensor)")
_library.define(
    f"modal_pool_backward({_SCHEMA}, Tensor weights, Tensor? d_pooled, Tensor? d_weights, bool[] needs) "
    "-> (Tensor[], Tensor, Tensor, Tensor, Tensor)"
)


def _problem(*args: Any) -> tuple[PoolProblem, str]:
    features, query, scores, bias, temperature, present, scale, stacked, backend = args
    problem = check_pool(
        "modal_pool",
        features[0].detach() if stacked else [x.detach() for x in features],
        query,
        scores=scores,
        bias=bias,
        temperature=temperature,
        present=present,
        scale=scale,
    )
    return problem, choose("modal_pool", problem, backend or None)


def _dtypes(features: list[Tensor]) -> tuple[torch.dtype, torch.dtype]:
    """(compute dtype, dtype of the pooled features)."""
    out = features[0].dtype
    for x in features[1:]:
        out = torch.promote_types(out, x.dtype)
    return (torch.float64 if any(x.dtype == torch.float64 for x in features) else torch.float32), out


def _impl(*args: Any) -> tuple[Tensor, Tensor]:
    problem, backend = _problem(*args)
    found: tuple[Tensor, Tensor] = implementation(backend, "modal_pool").forward(problem)
    return found


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    features, stacked = args[0], args[7]
    dtype, out = _dtypes(features)
    first = features[0]
    leading, modalities = (first.shape[:-2], first.shape[-2]) if stacked else (first.shape[:-1], len(features))
    return (
        first.new_empty((*leading, first.shape[-1]), dtype=out),
        first.new_empty((*leading, modalities), dtype=dtype),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, *tensors = inputs[:6]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *tensors, *features)
    ctx.options = inputs[6:_N]


def _backward(ctx: Any, d_pooled: Tensor | None, d_weights: Tensor | None) -> tuple[Any, ...]:
    weights, query, scores, bias, temperature, present, *features = ctx.saved_tensors
    need = ctx.needs_input_grad
    needs = [*need[1:5], *need[0]]
    if d_pooled is None and d_weights is None:
        return [None] * len(features), *(None,) * (_N - 1)
    d_features, *rest = torch.ops.mfd_fast.modal_pool_backward(
        features,
        query,
        scores,
        bias,
        temperature,
        present,
        *ctx.options,
        weights,
        d_pooled,
        d_weights,
        needs,
    )
    lists = [g if n else None for g, n in zip(d_features, needs[4:], strict=True)]
    return lists, *(g if n else None for g, n in zip(rest, needs[:4], strict=True)), *(None,) * (_N - 5)


def _backward_impl(*args: Any) -> tuple[Any, ...]:
    problem, backend = _problem(*args[:_N])
    weights, d_pooled, d_weights, needs = args[_N:]
    found = implementation(backend, "modal_pool").backward(problem, weights, d_pooled, d_weights, needs)
    query, scores, bias, temperature, *features = [weights.new_empty(0) if g is None else g for g in found]
    return features, query, scores, bias, temperature


def _backward_fake(*args: Any) -> tuple[Any, ...]:
    features, query, scores, bias, temperature = args[:5]
    weights, needs = args[_N], args[-1]
    like = (query, scores, bias, temperature, *features)
    found = [
        weights.new_empty(t.shape, dtype=t.dtype) if n else weights.new_empty(0)
        for t, n in zip(like, needs, strict=True)
    ]
    return found[4:], *found[:4]


for _name, _run, _shape in (
    ("modal_pool", _impl, _fake),
    ("modal_pool_backward", _backward_impl, _backward_fake),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mfd_fast::{_name}", _shape, lib=_library)
torch.library.register_autograd("mfd_fast::modal_pool", _backward, setup_context=_setup, lib=_library)


def _no_second_derivatives(*_: Any) -> tuple[Any, ...]:
    raise RuntimeError(
        "mfd_fast::modal_pool_backward has no derivatives; call mfd_fast.modal_pool eagerly for second "
        "derivatives, or with backend='reference'"
    )


torch.library.register_autograd("mfd_fast::modal_pool_backward", _no_second_derivatives, lib=_library)


def pool(problem: PoolProblem, backend: str) -> tuple[Tensor, Tensor]:
    """modal_pool as one node of the graph."""
    p = problem
    temperature = p.temperature
    if not isinstance(temperature, Tensor):
        temperature = torch.full((), temperature, dtype=p.dtype)
    found: tuple[Tensor, Tensor] = torch.ops.mfd_fast.modal_pool(
        p.features,
        p.query,
        p.scores,
        p.bias,
        temperature,
        p.present,
        None if p.given_scale is None else float(p.given_scale),
        p.stacked,
        backend,
    )
    return found
