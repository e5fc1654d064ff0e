"""The checked feature_loss problem that every backend receives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import contract
from ..reference.feature_loss import KINDS


@dataclass
class Tap:
    """One checked pair of features."""

    student: Tensor
    teacher: Tensor
    projector: Tensor | None
    mask: Tensor | None
    weight: float | Tensor


@dataclass
class FeatureProblem:
    """A checked feature_loss call."""

    taps: list[Tap]
    kind: str
    reduction: str
    dtype: torch.dtype
    device: torch.device

    def tensors(self) -> dict[str, Tensor | None]:
        """Every tensor by the name of its argument."""
        found: dict[str, Tensor | None] = {}
        for k, tap in enumerate(self.taps):
            weight = tap.weight if isinstance(tap.weight, Tensor) else None
            found |= {f"student[{k}]": tap.student, f"teacher[{k}]": tap.teacher, f"projector[{k}]": tap.projector}
            found |= {f"mask[{k}]": tap.mask, f"weight[{k}]": weight}
        return found


def _per_tap(op: str, argument: str, value: Any, count: int, *, many: bool) -> list[Any]:
    """One value per tap: a sequence as it is, anything else repeated."""
    if isinstance(value, (list, tuple)):
        if not many or len(value) != count:
            raise contract.value_error(op, argument, value, f"one value or a sequence of {count} (one per tap)")
        return list(value)
    return [value] * count


def _check_tap(op: str, k: int, tap: Tap) -> None:
    student = contract.check_floating(op, f"student[{k}]", tap.student)
    teacher = contract.check_floating(op, f"teacher[{k}]", tap.teacher)
    if student.dim() < 1 or student.shape[-1] < 1:
        raise contract.value_error(op, f"student[{k}]", student, "of shape [..., D] with D >= 1")
    leading, width, device = student.shape[:-1], student.shape[-1], student.device
    contract.check_device(op, f"teacher[{k}]", teacher, device)
    tap.student, tap.teacher = student, teacher
    if tap.projector is not None:
        projector = contract.check_floating(op, f"projector[{k}]", tap.projector)
        if projector.dim() != 2 or projector.shape[1] != width:
            raise contract.value_error(op, f"projector[{k}]", projector, f"of shape [D_teacher, {width}]")
        contract.check_device(op, f"projector[{k}]", projector, device)
        width = projector.shape[0]
        tap.projector = projector
    if teacher.shape != (*leading, width):
        raise contract.value_error(op, f"teacher[{k}]", teacher, f"of shape {[*leading, width]}")
    if tap.mask is not None:
        tap.mask = contract.check_row_tensor(op, f"mask[{k}]", tap.mask, leading, device, torch.bool)
    tap.weight = contract.check_scalar(op, f"weight[{k}]", tap.weight)


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
    contract.check_choice(op, "kind", kind, KINDS)
    contract.check_choice(op, "reduction", reduction, contract.REDUCTIONS)
    many = isinstance(student, (list, tuple))
    students = list(student) if many else [student]
    if isinstance(teacher, (list, tuple)) != many or (many and len(teacher) != len(students)):
        raise contract.value_error(op, "teacher", teacher, f"like student: {len(students)} tap(s)")
    if not students:
        raise contract.value_error(op, "student", student, "at least one tap")
    teachers = list(teacher) if many else [teacher]
    count = len(students)
    if isinstance(weight, Tensor) and (weight := contract.check_dense(op, "weight", weight)).dim() == 1:
        if weight.shape[0] != count:
            raise contract.value_error(op, "weight", weight, f"a number or {count} values (one per tap)")
        weight = list(weight.unbind())
    taps = [
        Tap(*parts)  # type: ignore[arg-type]
        for parts in zip(
            students,
            teachers,
            _per_tap(op, "projector", projector, count, many=many),
            _per_tap(op, "mask", mask, count, many=many),
            _per_tap(op, "weight", 1.0 if weight is None else weight, count, many=many or isinstance(weight, list)),
            strict=True,
        )
    ]
    for k, tap in enumerate(taps):
        _check_tap(op, k, tap)
        contract.check_device(op, f"student[{k}]", tap.student, taps[0].student.device)
        if reduction == "none" and tap.student.shape[:-1] != taps[0].student.shape[:-1]:
            raise contract.value_error(
                op, f"student[{k}]", tap.student, "of the same leading shape in every tap for reduction='none'"
            )
    dtype = contract.compute_dtype(*(t for tap in taps for t in (tap.student, tap.teacher)))
    return FeatureProblem(taps, kind, reduction, dtype, taps[0].student.device)
