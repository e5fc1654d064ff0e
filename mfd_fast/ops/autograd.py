"""What the autograd nodes of all ops share.

A node keeps problems without tensors; every tensor it reads again goes through ``save_for_backward``, also gradients
that are computed already. So autograd frees them after the backward, notices if they have changed, and hooks and
checkpoints see them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import scale_backend
from ..backends.plans import is_plain_one
from ..problems.checks import upstream
from ..problems.problem import Problem


def save(ctx: Any, problems: tuple[Problem, ...], *more: Tensor | None) -> None:
    """Keeps what :func:`saved` gives back."""
    kept, tensors = [], []
    for problem in problems:
        rest, found = problem.split()
        kept.append(rest)
        tensors += found
    ctx.problems, ctx.count = kept, len(tensors)
    ctx.save_for_backward(*tensors, *more)


def saved(ctx: Any, kept: Sequence[Tensor] | None = None) -> tuple[list[Any], list[Any]]:
    """The problems with their tensors, and the further tensors.

    ``kept``: what ``ctx.saved_tensors`` gave already: a checkpoint gives it once.
    """
    tensors = iter(ctx.saved_tensors if kept is None else kept)
    return [problem.with_tensors(tensors).check_memory() for problem in ctx.problems], list(tensors)


def needs_reference(*grad_outputs: Tensor | None) -> bool:
    """Whether gradients must be differentiable (create_graph) or are batched (is_grads_batched): no kernel can."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return True
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grad_outputs)


def reference_gradients(
    leaves: Sequence[Tensor | None],
    outputs_of: Callable[[list[Any]], Sequence[Tensor]],
    grad_outputs: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of ``leaves`` as autograd finds them through ``outputs_of(leaves)`` in plain PyTorch."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # One alias per role: a tensor that serves in two of them gets each role's gradient once.
        aliases = [None if leaf is None else leaf.view_as(leaf) for leaf in leaves]
        ends = zip(outputs_of(aliases), grad_outputs, strict=True)
        pairs = [(value, g) for value, g in ends if g is not None and value.requires_grad]
        wanted = [leaf for leaf, need in zip(aliases, needs, strict=True) if need and leaf is not None]
        if not pairs or not wanted:
            return [None] * len(needs)
        outputs, upstreams = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, upstreams, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]


def ready_gradients(
    ctx: Any, gradients: Sequence[Tensor | None], grad_loss: Tensor, backend: str, again: Callable[[], Sequence[Any]]
) -> Sequence[Tensor | None]:
    """``gradients`` of a scalar loss, which were saved, times ``grad_loss``, without a copy.

    The first backward gives them away; a later one runs the pass once more: ``again()``.
    """
    found = again() if hasattr(ctx, "given") else _given_away(ctx, gradients)
    scale_backend(backend).scale_gradients_([g for g in found if g is not None], upstream(grad_loss))
    return found


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """``gradient·factor``, 0-d and maybe of a wider dtype, rounded once; for graphs that are recorded."""
    wide = torch.promote_types(gradient.dtype, factor.dtype)
    return (gradient.to(wide) * factor).to(gradient.dtype)


def planned_gradients(
    ctx: Any, kept: Sequence[Tensor], grad_loss: Tensor, place: int, plan: Any
) -> Sequence[Tensor | None] | None:
    """:func:`ready_gradients` of the usual backward: the first one, which nobody records, of a call that ``plan`` has
    run, or of a loss on a CPU that is what is differentiated; else None.

    ``kept``: what ``ctx.saved_tensors`` gave, which is read once; the gradients are those from ``place`` on.
    """
    if hasattr(ctx, "given") or torch.compiler.is_compiling():
        return None
    if not (is_plain_one(grad_loss) if plan is None else plan.scale(kept, -place, grad_loss)):
        return None
    return _given_away(ctx, kept[place:])


def apply_of_plans(node: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``node.apply`` without its look for tensors of torch.func, of which no plan has any."""
    return super(torch.autograd.Function, node).apply  # type: ignore[misc]


def _given_away(ctx: Any, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    ctx.given = True
    # Aliases with a version of their own: what is done to them is no change of a saved tensor.
    return [None if g is None else g.data for g in gradients]


def requires_grad(*values: object) -> bool:
    """Whether one of the values is a tensor to whose gradient the result leads."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)
