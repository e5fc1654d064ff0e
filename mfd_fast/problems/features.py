"""The problem of feature_loss: taps of student and teacher features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..codes import FEATURE_KINDS
from .checks import (
    REDUCTIONS,
    check_choice,
    check_dense,
    check_device,
    check_floating,
    check_row_tensor,
    check_scalar,
    compute_dtype,
    value_error,
)
from .problem import Problem


class Tap(NamedTuple):
    """One checked pair of features."""

    student: Tensor
    teacher: Tensor
    projector: Tensor | None
    mask: Tensor | None
    weight: float | Tensor


class FeatureProblem(Problem):
    """A checked feature_loss call; each list has one entry per tap.

    Attributes:
        students, teachers: ``[..., D]``; where a tap has a projector ``[D_teacher, D_student]``, of unequal D.
        masks: bool ``[...]`` or None. weights: number or 0-d tensor.
        dtype: of the arithmetic and of the losses.
    """

    OPTIONS: ClassVar = {"feature_kind": "str", "reduction": "str", "dtype": "ScalarType"}
    LISTS = ("students", "teachers", "projectors", "masks", "weights")
    ARGUMENTS: ClassVar = {
        "students": "student",
        "teachers": "teacher",
        "projectors": "projector",
        "masks": "mask",
        "weights": "weight",
    }

    feature_kind: str
    reduction: str
    dtype: torch.dtype
    students: Sequence[Tensor]
    teachers: Sequence[Tensor]
    projectors: Sequence[Tensor | None]
    masks: Sequence[Tensor | None]
    weights: Sequence[float | Tensor]

    @property
    def taps(self) -> list[Tap]:
        return list(map(Tap, self.students, self.teachers, self.projectors, self.masks, self.weights))

    @property
    def device(self) -> torch.device:
        return self.students[0].device

    @property
    def elements(self) -> int | None:
        both = (*self.students, *self.teachers)
        if any(x.dtype != torch.float32 for x in both) or any(p is not None for p in self.projectors):
            return None
        return sum(math.prod(x.shape) for x in both)


def distances_of(students: Sequence[Tensor], teachers: Sequence[Tensor], feature_kind: str) -> FeatureProblem:
    """The per-row distances of checked features without projectors, masks and weights."""
    count = len(students)
    return FeatureProblem(
        feature_kind=feature_kind,
        reduction="none",
        dtype=compute_dtype(*students, *teachers),
        students=students,
        teachers=teachers,
        projectors=[None] * count,
        masks=[None] * count,
        weights=[1.0] * count,
    )


def _per_tap(op: str, argument: str, value: Any, count: int, *, many: bool) -> list[Any]:
    """One value per tap: a sequence as it is, anything else repeated."""
    if isinstance(value, (list, tuple)):
        if not many or len(value) != count:
            raise value_error(op, argument, value, f"one value or a sequence of {count} (one per tap)")
        return list(value)
    return [value] * count


def _check_tap(op: str, k: int, tap: Tap) -> Tap:
    student = check_floating(op, f"student[{k}]", tap.student)
    teacher = check_floating(op, f"teacher[{k}]", tap.teacher)
    if student.dim() < 1 or student.shape[-1] < 1:
        raise value_error(op, f"student[{k}]", student, "of shape [..., D] with D >= 1")
    leading, width, device = student.shape[:-1], student.shape[-1], student.device
    check_device(op, f"teacher[{k}]", teacher, device)
    projector, mask = tap.projector, tap.mask
    if projector is not None:
        projector = check_floating(op, f"projector[{k}]", projector)
        if projector.dim() != 2 or projector.shape[1] != width:
            raise value_error(op, f"projector[{k}]", projector, f"of shape [D_teacher, {width}]")
        check_device(op, f"projector[{k}]", projector, device)
        width = projector.shape[0]
    if teacher.shape != (*leading, width):
        raise value_error(op, f"teacher[{k}]", teacher, f"of shape {[*leading, width]}")
    if mask is not None:
        mask = check_row_tensor(op, f"mask[{k}]", mask, leading, device, torch.bool)
    return Tap(student, teacher, projector, mask, check_scalar(op, f"weight[{k}]", tap.weight))


def check_feature_loss(
    op: str,
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    kind: str = "mse",
    mask: Tensor | Sequence[Tensor | None] | None = None,
    weight: float | Tensor | Sequence[float | Tensor] | None = None,
    projector: Tensor | Sequence[Tensor | None] | None = None,
    reduction: str = "mean",
) -> FeatureProblem:
    """The whole contract of feature_loss."""
    check_choice(op, "kind", kind, tuple(FEATURE_KINDS))
    check_choice(op, "reduction", reduction, REDUCTIONS)
    many = isinstance(student, (list, tuple))
    students = list(student) if many else [student]
    if isinstance(teacher, (list, tuple)) != many or (many and len(teacher) != len(students)):
        raise value_error(op, "teacher", teacher, f"like student: {len(students)} tap(s)")
    if not students:
        raise value_error(op, "student", student, "at least one tap")
    teachers = list(teacher) if many else [teacher]
    count = len(students)
    if isinstance(weight, Tensor) and (weight := check_dense(op, "weight", weight)).dim() == 1:
        if weight.shape[0] != count:
            raise value_error(op, "weight", weight, f"a number or {count} values (one per tap)")
        weight = list(weight.unbind())
    columns = (
        students,
        teachers,
        _per_tap(op, "projector", projector, count, many=many),
        _per_tap(op, "mask", mask, count, many=many),
        _per_tap(op, "weight", 1.0 if weight is None else weight, count, many=many or isinstance(weight, list)),
    )
    taps: list[Tap] = []
    for k, parts in enumerate(zip(*columns, strict=True)):
        tap = _check_tap(op, k, Tap(*parts))  # type: ignore[arg-type]
        first = taps[0].student if taps else tap.student
        check_device(op, f"student[{k}]", tap.student, first.device)
        if reduction == "none" and tap.student.shape[:-1] != first.shape[:-1]:
            need = "of the same leading shape in every tap for reduction='none'"
            raise value_error(op, f"student[{k}]", tap.student, need)
        taps.append(tap)
    of_students, of_teachers, projectors, masks, weights = map(list, zip(*taps, strict=True))
    return FeatureProblem(
        feature_kind=kind,
        reduction=reduction,
        dtype=compute_dtype(*of_students, *of_teachers),  # type: ignore[arg-type]
        students=of_students,
        teachers=of_teachers,
        projectors=projectors,
        masks=masks,
        weights=weights,
    )
