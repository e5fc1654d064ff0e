"""feature_loss on the CUDA C++ kernels: every tap in one launch, 16 of them at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...codes import FEATURE_KINDS
from ...problems.features import FeatureProblem, Tap
from .. import allocate
from ..native import address, reads_taps, row_matrix
from ..plans import Places
from ..protocol import FeatureGradients, FeatureNeeds
from . import native, why_not_device
from .launch import number, where, workspace
from .modal_pool import contiguous

COUNT_ROWS = 1 << 15  # masked rows of a tap that every one of its blocks counts for itself


def can_run(problem: FeatureProblem) -> str | None:
    """None if the kernels cover this call, else the reason."""
    return why_not_device(problem.device)


class _Taps:
    """The native taps of a call, those without rows left out."""

    def __init__(self, problem: FeatureProblem) -> None:
        self.problem = problem
        self.module = native()
        self.keep: list[Any] = []
        self.taps: list[Any] = []
        self.weights: list[int] = []
        self.counts: list[int] = []

    def add(
        self,
        tap: Tap,
        *,
        weight: tuple[int, float] = (0, 0.0),
        count: int = 0,
        grad_rows: Tensor | None = None,
        d_student: Tensor | None = None,
        d_teacher: Tensor | None = None,
        distances: Tensor | None = None,
    ) -> None:
        rows = tap.student.shape[:-1].numel()
        if rows == 0:
            return
        self.taps.append(
            self.module.Tap(
                rows,
                tap.student.shape[-1],
                row_matrix(tap.student, self.keep),
                row_matrix(tap.teacher, self.keep),
                contiguous(tap.mask, self.keep),
                weight[1],
                address(grad_rows),
                1,
                address(d_student),
                address(d_teacher),
                address(distances),
                False,
            )
        )
        self.weights.append(weight[0])
        self.counts.append(count)

    def launch(self, loss: Tensor | None = None) -> None:
        if not self.taps:
            return
        p, device = self.problem, self.problem.device
        scratch = None if loss is None else workspace(device, self.module.cuda.scalar_workspace)
        self.module.cuda.match_taps(
            self.taps,
            self.weights,
            self.counts,
            FEATURE_KINDS[p.feature_kind],
            p.dtype is torch.float64,
            p.reduction == "mean",
            address(scratch),
            address(loss),
            *where(device),
        )


def scalar(problem: FeatureProblem, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
    """The scalar loss and, from the same launch, its gradient with respect to each student that needs one.

    Of masks over many rows, a library kernel before it counts those that exist.
    """
    dtype, device = problem.dtype, problem.device
    loss = allocate.empty((), dtype, device)
    found: list[Tensor | None] = []
    taps = _Taps(problem)
    for tap, need in zip(problem.taps, needs, strict=True):
        gradient = allocate.empty_gradient(tap.student) if need else None
        found.append(gradient)
        count = 0
        if tap.mask is not None and _is_counted_first(problem, tap):
            counted = tap.mask.sum()
            taps.keep.append(counted)
            count = counted.data_ptr()
        taps.add(tap, weight=number(tap.weight, dtype, device, taps.keep), count=count, d_student=gradient)
    if not taps.taps:
        loss.zero_()
    taps.launch(loss)
    return loss, found


def call_plan(problem: FeatureProblem, places: Places) -> Any:
    """The native plan of :func:`scalar` for calls like this one; None where :func:`reads_taps` says so, where a tap has
    no rows, and where a library kernel counts them.
    """
    module, of_taps = native(), reads_taps(problem, places)
    if of_taps is None or not hasattr(module.cuda, "FeaturePlan"):
        return None
    if any(_is_counted_first(problem, tap) or not tap.student.shape[:-1].numel() for tap in problem.taps):
        return None
    taps = _Taps(problem)
    for tap in problem.taps:
        taps.add(tap, weight=(0, float(tap.weight)))
    kind, is_double = FEATURE_KINDS[problem.feature_kind], problem.dtype is torch.float64
    return module.cuda.FeaturePlan(taps.taps, kind, is_double, problem.reduction == "mean", *of_taps)


def _is_counted_first(problem: FeatureProblem, tap: Tap) -> bool:
    return problem.reduction == "mean" and tap.mask is not None and tap.mask.numel() > COUNT_ROWS


def distances(problem: FeatureProblem) -> list[Tensor]:
    """``[...]`` distances of each tap, 0 on masked rows."""
    found = [allocate.empty(tuple(tap.student.shape[:-1]), problem.dtype, problem.device) for tap in problem.taps]
    taps = _Taps(problem)
    for tap, out in zip(problem.taps, found, strict=True):
        taps.add(tap, distances=out)
    taps.launch()
    return found


def distances_backward(
    problem: FeatureProblem, grad_distances: Sequence[Tensor], needs: FeatureNeeds
) -> FeatureGradients:
    """Gradients of ``Σ_k sum(grad_k·distances_k)``."""
    found = FeatureGradients(
        *(
            [allocate.empty_gradient(x) if need else None for x, need in zip(side, wanted, strict=True)]
            for side, wanted in ((problem.students, needs.students), (problem.teachers, needs.teachers))
        )
    )
    taps = _Taps(problem)
    for tap, grad, d_student, d_teacher in zip(problem.taps, grad_distances, *found, strict=True):
        upstream = grad.to(problem.dtype).reshape(-1).contiguous()
        taps.keep.append(upstream)
        taps.add(tap, grad_rows=upstream, d_student=d_student, d_teacher=d_teacher)
    taps.launch()
    return found
