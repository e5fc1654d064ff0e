"""feature_loss: matching of intermediate features over one tap or many.

    loss = Σ_taps weight_k · mean(distance(projector_k · student_k, teacher_k))
Romero et al., FitNets, arXiv:1412.6550 (mse with a projector).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import check_not_traced, choose, choose_recorded, feature_backend
from ..backends.plans import Done, Plans
from ..backends.protocol import FeatureGradients, FeatureNeeds
from ..problems.checks import by_pytorch, is_recorded, upstream
from ..problems.features import FeatureProblem, check_feature_loss
from ..reference.feature_loss import reduce_tap, tap_rows
from .autograd import (
    apply_of_plans,
    needs_reference,
    planned_gradients,
    ready_gradients,
    reference_gradients,
    requires_grad,
    save,
    saved,
)
from .registration import define, define_backward, differentiate, flatten, unflatten

# --------------------------------------------------------------------------------------- projector, reference


def _projected(problem: FeatureProblem) -> FeatureProblem:
    """The same problem with the students behind their projectors, by a library GEMM that autograd knows."""
    if all(projector is None for projector in problem.projectors):
        return problem
    students = []
    for tap in problem.taps:
        student = tap.student
        if tap.projector is not None:
            student = student.to(problem.dtype)
            if tap.mask is not None:  # a row that does not exist must not reach the projector's gradient
                student = torch.where(tap.mask[..., None], student, student.new_zeros(()))
            student = student @ tap.projector.to(problem.dtype).T
        students.append(student)
    return problem.replace(students=students, projectors=[None] * len(students))


def _combined(problem: FeatureProblem, distances: Sequence[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=problem.dtype, device=problem.device)
    for tap, rows in zip(problem.taps, distances, strict=True):
        width = tap.teacher.shape[-1]
        total = total + tap.weight * reduce_tap(rows, tap.mask, width, problem.feature_kind, problem.reduction)
    return total


def _reference_distances(p: FeatureProblem) -> list[Tensor]:
    return [tap_rows(tap.student, tap.teacher, tap.projector, tap.mask, p.feature_kind, p.dtype) for tap in p.taps]


def _sides(problem: FeatureProblem) -> tuple[Tensor, ...]:
    """The students, then the teachers."""
    return *problem.students, *problem.teachers


def _with_sides(problem: FeatureProblem, sides: Sequence[Tensor]) -> FeatureProblem:
    count = len(problem.students)
    return problem.replace(students=sides[:count], teachers=sides[count:])


# ------------------------------------------------------------------------------------------------ scalar loss


class _ScalarLoss(torch.autograd.Function):
    """A computed loss over all taps, whose gradients the first backward hands to the students without a copy."""

    @staticmethod
    def forward(ctx: Any, done: Done, *students: Tensor) -> Tensor:  # noqa: ARG004
        (loss, gradients), backend, tensors, rest, plan = done
        ctx.save_for_backward(*tensors, *gradients)
        ctx.call = backend, rest, -len(gradients), plan
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        backend, rest, place, plan = ctx.call
        kept = ctx.saved_tensors
        if (gradients := planned_gradients(ctx, kept, grad_loss, place, plan)) is not None:
            return (None, *gradients)
        needs = ctx.needs_input_grad[1:]

        def problem() -> FeatureProblem:
            return _PLANS.problem(rest, iter(kept))

        if needs_reference(grad_loss):
            p = problem()

            def loss_of(sides: list[Tensor]) -> list[Tensor]:
                changed = _with_sides(p, sides)
                return [_combined(changed, _reference_distances(changed))]

            both = (*needs, *(False for _ in needs))
            found = reference_gradients(_sides(p), loss_of, [grad_loss], both)
            return (None, *found[: len(needs)])

        def again() -> list[Tensor | None]:
            return feature_backend(backend).scalar(problem(), needs)[1]

        return (None, *ready_gradients(ctx, kept[place:], grad_loss, backend, again))


# -------------------------------------------------------------------------------------------------- per row


class _Distances(torch.autograd.Function):
    """Distances of every tap, differentiable to both sides."""

    @staticmethod
    def forward(ctx: Any, problem: FeatureProblem, backend: str, *sides: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        save(ctx, (problem,))
        ctx.backend = backend
        return tuple(feature_backend(backend).distances(problem))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (problem,), _ = saved(ctx)
        needs = ctx.needs_input_grad[2:]
        if needs_reference(*grads):

            def values(sides: list[Tensor]) -> list[Tensor]:
                return _reference_distances(_with_sides(problem, sides))

            return (None, None, *reference_gradients(_sides(problem), values, grads, needs))
        wanted = unflatten(FeatureNeeds, needs, *(len(problem.students),) * 2)
        found = feature_backend(ctx.backend).distances_backward(problem, [upstream(g) for g in grads], wanted)
        return (None, None, *flatten(found))


def distances(problem: FeatureProblem, backend: str) -> Sequence[Tensor]:
    """``[...]`` distances of each tap without projectors, 0 on masked rows; differentiable to both sides."""
    if is_recorded():
        # The weights have no part in it.
        plain = problem.replace(weights=[None] * len(problem.students), reduction="none")
        return by_pytorch("feature_loss", problem.named_tensors, lambda: _op(backend, [plain]))
    found: tuple[Tensor, ...] = _Distances.apply(problem, backend, *_sides(problem))
    return found


def _gradients_fit_one_pass(problem: FeatureProblem) -> bool:
    """The scalar pass differentiates the loss to the students, and to nothing else."""
    if requires_grad(*problem.teachers, *problem.weights):
        return False
    # float16 gradients would underflow before a loss scale reaches them.
    return all(student.dtype != torch.float16 for student in problem.students)


# -------------------------------------------------------------------------------------------- registered ops


def _chosen(backend: str | None, problem: FeatureProblem) -> Any:
    return feature_backend(choose("feature_loss", problem, backend))


def _run(backend: str | None, problem: FeatureProblem) -> list[Tensor]:
    found: list[Tensor] = _chosen(backend, problem).distances(problem)
    return found


def _fake(p: FeatureProblem) -> list[Tensor]:
    return [student.new_empty(student.shape[:-1], dtype=p.dtype) for student in p.students]


def _run_backward(
    backend: str | None, problem: FeatureProblem, grads: list[Tensor], needs: list[bool]
) -> FeatureGradients:
    wanted = unflatten(FeatureNeeds, needs, *(len(problem.students),) * 2)
    found: FeatureGradients = _chosen(backend, problem).distances_backward(problem, grads, wanted)
    return found


def _like(p: FeatureProblem) -> FeatureGradients:
    return FeatureGradients(list(p.students), list(p.teachers))


def _backward(
    backend: str, problems: list[FeatureProblem], _: list[Tensor], grads: tuple[Any, ...], need: Callable[..., Any]
) -> dict[tuple[int, str], Any]:
    (problem,) = problems
    needs = [*need(0, "students"), *need(0, "teachers")]
    flat = _op_backward(backend, [problem], list(grads[0]), needs)
    wanted = [g if need else None for g, need in zip(flat, needs, strict=True)]
    students, teachers = unflatten(FeatureGradients, wanted, *(len(problem.students),) * 2)
    return {(0, "students"): students, (0, "teachers"): teachers}


_op = define("feature_distances", (FeatureProblem,), "", "Tensor[]", _run, _fake)
_op_backward = define_backward("feature_distances", (FeatureProblem,), "Tensor[] grads", _run_backward, _like)
differentiate("feature_distances", (FeatureProblem,), lambda _: (), lambda _: (), _backward)


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
    arguments = (student, teacher, kind, mask, weight, projector, reduction, backend)
    if not torch.compiler.is_compiling() and (done := _PLANS.run(arguments)) is not None:
        if done[2] is None:
            return done[0][0]
        return _apply(done, *student) if isinstance(student, (list, tuple)) else _apply(done, student)

    check_not_traced("feature_loss", backend)
    problem = _PLANS.check(arguments)
    recorded = is_recorded()
    name = (choose_recorded if recorded else choose)("feature_loss", problem, backend)
    if name == "reference":

        def value() -> Tensor:
            return _combined(problem, _reference_distances(problem))

        return by_pytorch("feature_loss", problem.named_tensors, value)
    problem = _projected(problem)
    if recorded or reduction == "none" or not _gradients_fit_one_pass(problem):
        return _combined(problem, distances(problem, name))
    needs = [requires_grad(student) for student in problem.students]
    with torch.no_grad():
        results = feature_backend(name).scalar(problem, needs)
    plan = getattr(feature_backend(name), "call_plan", None)
    done = _PLANS.computed(results, name, problem, arguments, plan, problem)
    return _ScalarLoss.apply(done, *problem.students) if any(needs) else results[0]


_apply = apply_of_plans(_ScalarLoss)
_PLANS = Plans(feature_loss, check_feature_loss, numbers=("weight",))
