"""feature_loss: matching of intermediate features over one tap or many.

    loss = Σ_taps weight_k · mean(distance(projector_k · student_k, teacher_k))
Romero et al., FitNets, arXiv:1412.6550 (mse with a projector).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import contract
from ..backends import check_not_traced, choose, implementation
from ..reference.feature_loss import reduce_tap, tap_rows
from . import feature_registered as registered
from .feature_problem import FeatureProblem, check_feature_loss
from .upstream import scale_gradients_

# --------------------------------------------------------------------------------------- projector, reference


def _projected(problem: FeatureProblem) -> FeatureProblem:
    """The same problem with the students behind their projectors, by a library GEMM that autograd knows."""
    if all(tap.projector is None for tap in problem.taps):
        return problem
    taps = []
    for tap in problem.taps:
        student = tap.student
        if tap.projector is not None:
            student = student.to(problem.dtype)
            if tap.mask is not None:  # a row that does not exist must not reach the projector's gradient
                student = torch.where(tap.mask[..., None], student, student.new_zeros(()))
            student = student @ tap.projector.to(problem.dtype).T
        taps.append(replace(tap, student=student, projector=None))
    return replace(problem, taps=taps)


def _combined(problem: FeatureProblem, distances: Sequence[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=problem.dtype, device=problem.device)
    for tap, rows in zip(problem.taps, distances, strict=True):
        width = tap.teacher.shape[-1]
        total = total + tap.weight * reduce_tap(rows, tap.mask, width, problem.kind, problem.reduction)
    return total


def _reference_distances(p: FeatureProblem) -> list[Tensor]:
    return [tap_rows(tap.student, tap.teacher, tap.projector, tap.mask, p.kind, p.dtype) for tap in p.taps]


def _with_sides(problem: FeatureProblem, sides: Sequence[Tensor]) -> FeatureProblem:
    """``sides``: the students, then the teachers."""
    count = len(problem.taps)
    taps = [
        replace(tap, student=s, teacher=t) for tap, s, t in zip(problem.taps, sides[:count], sides[count:], strict=True)
    ]
    return replace(problem, taps=taps)


def _masks(problem: FeatureProblem) -> list[Tensor]:
    """Saved with the features, so that autograd notices if they change before they are read again."""
    return [tap.mask for tap in problem.taps if tap.mask is not None]


def _differentiable_gradients(
    problem: FeatureProblem,
    sides: Sequence[Tensor],
    outputs_of: Callable[[FeatureProblem], Sequence[Tensor]],
    grad_outputs: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """backward(create_graph=True): the same gradients as differentiable expressions, by the reference."""
    # One alias per role: a tensor that serves in two of them gets each role's gradient once.
    sides = [x.view_as(x) for x in sides]
    ends = zip(outputs_of(_with_sides(problem, sides)), grad_outputs, strict=True)
    outputs, upstream = zip(*[(v, g) for v, g in ends if v.requires_grad], strict=True)
    wanted = [x for x, need in zip(sides, needs, strict=True) if need]
    found = iter(torch.autograd.grad(outputs, wanted, upstream, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


# ------------------------------------------------------------------------------------------------ scalar loss


class _ScalarLoss(torch.autograd.Function):
    """loss over all taps with its gradient to the students, handed to the first backward without a copy."""

    @staticmethod
    def forward(ctx: Any, problem: FeatureProblem, backend: str, recorded: bool, *students: Tensor) -> Tensor:
        # Under no_grad (`recorded` is False) autograd still says that a leaf needs its gradient.
        needs = [recorded and need for need in ctx.needs_input_grad[3:]]
        loss, gradients = implementation(backend, "feature_loss").scalar(problem, needs)
        if any(needs):
            ctx.gradients = gradients
            ctx.call = (problem, backend)
            ctx.save_for_backward(*students, *(tap.teacher for tap in problem.taps), *_masks(problem))
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        problem, backend = ctx.call
        needs = ctx.needs_input_grad[3:]
        sides = ctx.saved_tensors[: 2 * len(needs)]
        if torch.is_grad_enabled():

            def loss_of(p: FeatureProblem) -> list[Tensor]:
                return [_combined(p, _reference_distances(p))]

            both = [*needs, *(False,) * len(needs)]
            found = _differentiable_gradients(problem, sides, loss_of, [grad_loss], both)
            return (None, None, None, *found[: len(needs)])
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # a second backward: the buffers were given away, so the pass is run again
            _, gradients = implementation(backend, "feature_loss").scalar(_with_sides(problem, sides), needs)
        scale_gradients_([g for g in gradients if g is not None], grad_loss, backend)
        return (None, None, None, *gradients)


# -------------------------------------------------------------------------------------------------- per row


class _Distances(torch.autograd.Function):
    """Distances of every tap, differentiable to both sides."""

    @staticmethod
    def forward(ctx: Any, problem: FeatureProblem, backend: str, *sides: Tensor) -> tuple[Tensor, ...]:
        ctx.call = (problem, backend)
        ctx.save_for_backward(*sides, *_masks(problem))
        return tuple(implementation(backend, "feature_loss").distances(problem))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        problem, backend = ctx.call
        needs = ctx.needs_input_grad[2:]
        sides = ctx.saved_tensors[: len(needs)]
        if torch.is_grad_enabled():
            return (None, None, *_differentiable_gradients(problem, sides, _reference_distances, grads, needs))
        upstream = [contract.upstream(grad) for grad in grads]
        found = implementation(backend, "feature_loss").distances_backward(_with_sides(problem, sides), upstream, needs)
        return (None, None, *found)


def distances(problem: FeatureProblem, backend: str) -> Sequence[Tensor]:
    """``[...]`` distances of each tap without projectors, 0 on masked rows; differentiable to both sides."""
    if contract.is_recorded():
        return contract.by_pytorch("feature_loss", problem.tensors(), lambda: registered.distances(problem, backend))
    sides = (*(tap.student for tap in problem.taps), *(tap.teacher for tap in problem.taps))
    found: tuple[Tensor, ...] = _Distances.apply(problem, backend, *sides)
    return found


def _gradients_fit_one_pass(problem: FeatureProblem) -> bool:
    """The scalar pass differentiates the loss to the students, and to nothing else."""
    others = [v for tap in problem.taps for v in (tap.teacher, tap.weight)]
    if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in others):
        return False
    # float16 gradients would underflow before a loss scale reaches them.
    return all(tap.student.dtype != torch.float16 for tap in problem.taps)


# ------------------------------------------------------------------------------------------- public function


def feature_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    kind: str = "mse",
    mask: Tensor | Sequence[Tensor | None] | None = None,
    weight: float | Tensor | Sequence[float | Tensor] | None = None,
    projector: Tensor | Sequence[Tensor | None] | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Distance between student and teacher features, over one tap or a list of taps of unequal shapes.

    Args:
        student, teacher: ``[..., D]`` tensors or equally long lists of them; any floating dtypes and strides.
        kind: "mse", "smooth_l1" (threshold 1) or "cosine" (1 − cos; a zero vector has cosine 0 and zero
            gradient).
        mask: bool ``[...]`` or one per tap; rows that are False do not exist.
        weight: number, or one per tap (a sequence or a ``[taps]`` tensor, which may require grad).
        projector: ``[D_teacher, D_student]`` or one per tap (None where the widths agree).
        reduction: "mean": weighted sum over taps of each tap's mean over the existing elements (mse,
            smooth_l1) or rows (cosine), 0 where there are none; "sum"; "none": weighted sum over taps per
            row ``[...]`` of the mean over D (mse, smooth_l1) or of 1 − cos, 0 on masked rows.
        backend: "reference", "cpu", "triton", "cuda" or None for the fastest that can run.

    Returns:
        float32 tensor (float64 if a side is float64), differentiable to every floating tensor.

    Raises:
        TypeError, ValueError: an argument breaks the contract. BackendError: the backend cannot run.

    Source: Romero et al., FitNets, arXiv:1412.6550.

    >>> import torch, mfd_fast as mfd
    >>> mfd.feature_loss(torch.zeros(2, 3), torch.ones(2, 3)).item()
    1.0
    """
    check_not_traced("feature_loss", backend)
    problem = check_feature_loss(
        "feature_loss",
        student,
        teacher,
        kind=kind,
        mask=mask,
        weight=weight,
        projector=projector,
        reduction=reduction,
    )
    compiling = contract.is_recorded()
    # Under torch.compile the registered op chooses when it runs: no choice is baked into the graph.
    name = backend or "" if compiling else choose("feature_loss", problem, backend)
    if name == "reference":
        return contract.by_pytorch(
            "feature_loss", problem.tensors(), lambda: _combined(problem, _reference_distances(problem))
        )
    problem = _projected(problem)
    if compiling or reduction == "none" or not _gradients_fit_one_pass(problem):
        return _combined(problem, distances(problem, name))
    loss: Tensor = _ScalarLoss.apply(problem, name, torch.is_grad_enabled(), *(tap.student for tap in problem.taps))
    return loss
