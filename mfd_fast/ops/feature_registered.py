"""The ``torch.library`` face of feature_loss: what torch.compile sees instead of the autograd functions.

    mfd_fast::feature_distances            per-row distances of every tap
    mfd_fast::feature_distances_backward   gradients of students and teachers

``backend`` "" means: choose when the op runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import contract
from ..backends import choose, implementation
from .feature_problem import FeatureProblem, Tap

# ``masks`` hold those of the taps that are ``masked``, in their order.
_SCHEMA = "Tensor[] students, Tensor[] teachers, Tensor[] masks, bool[] masked, str kind, str backend"
_N = 6  # arguments in _SCHEMA

_library = torch.library.Library("mfd_fast", "FRAGMENT")
_library.define(f"feature_distances({_SCHEMA}) -> Tensor[]")
_library.define(f"feature_distances_backward({_SCHEMA}, Tensor[] grads, bool[] needs) -> Tensor[]")


def _problem(*args: Any) -> tuple[FeatureProblem, str]:
    students, teachers, masks, masked, kind, backend = args
    rest = iter(masks)
    taps = [
        Tap(s.detach(), t.detach(), None, next(rest) if has else None, 1.0)
        for s, t, has in zip(students, teachers, masked, strict=True)
    ]
    dtype = contract.compute_dtype(*students, *teachers)
    problem = FeatureProblem(taps, kind, "none", dtype, students[0].device)
    return problem, choose("feature_loss", problem, backend or None)


def _impl(*args: Any) -> list[Tensor]:
    problem, backend = _problem(*args)
    found: list[Tensor] = implementation(backend, "feature_loss").distances(problem)
    return found


def _fake(*args: Any) -> list[Tensor]:
    students, teachers = args[:2]
    dtype = contract.compute_dtype(*students, *teachers)
    return [s.new_empty(s.shape[:-1], dtype=dtype) for s in students]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:  # noqa: ARG001
    students, teachers, masks = inputs[:3]
    ctx.count = len(students)
    ctx.save_for_backward(*students, *teachers, *masks)
    ctx.options = inputs[3:]


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    n, tensors = ctx.count, ctx.saved_tensors
    sides = (list(tensors[:n]), list(tensors[n : 2 * n]))
    needs = [*ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    found = torch.ops.mfd_fast.feature_distances_backward(
        *sides, list(tensors[2 * n :]), *ctx.options, list(grads), needs
    )
    wanted = [g if need else None for g, need in zip(found, needs, strict=True)]
    return wanted[:n], wanted[n:], [None] * (len(tensors) - 2 * n), None, None, None


def _backward_impl(*args: Any) -> list[Tensor]:
    problem, backend = _problem(*args[:_N])
    grads, needs = args[_N:]
    found = implementation(backend, "feature_loss").distances_backward(problem, grads, needs)
    return [grads[0].new_empty(0) if g is None else g for g in found]


def _backward_fake(*args: Any) -> list[Tensor]:
    sides, grads, needs = [*args[0], *args[1]], args[_N], args[-1]
    return [x.new_empty(x.shape) if need else grads[0].new_empty(0) for x, need in zip(sides, needs, strict=True)]


for _name, _run, _shape in (
    ("feature_distances", _impl, _fake),
    ("feature_distances_backward", _backward_impl, _backward_fake),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mfd_fast::{_name}", _shape, lib=_library)
torch.library.register_autograd("mfd_fast::feature_distances", _backward, setup_context=_setup, lib=_library)


def _no_second_derivatives(*_: Any) -> tuple[Any, ...]:
    raise RuntimeError(
        "mfd_fast::feature_distances_backward has no derivatives; call mfd_fast.feature_loss eagerly for second "
        "derivatives, or with backend='reference'"
    )


torch.library.register_autograd("mfd_fast::feature_distances_backward", _no_second_derivatives, lib=_library)


def distances(problem: FeatureProblem, backend: str) -> list[Tensor]:
    """The distances of every tap as one node of the graph."""
    masks = [tap.mask for tap in problem.taps]
    found: list[Tensor] = torch.ops.mfd_fast.feature_distances(
        [tap.student for tap in problem.taps],
        [tap.teacher for tap in problem.taps],
        [m for m in masks if m is not None],
        [m is not None for m in masks],
        problem.kind,
        backend,
    )
    return found
