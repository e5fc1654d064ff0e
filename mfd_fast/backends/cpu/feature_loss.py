"""feature_loss on the native CPU kernels: every tap of a call in one native call."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...codes import FEATURE_KINDS
from ...problems.features import FeatureProblem, Tap
from .. import allocate
from ..native import address, dense, reads_taps, row_matrix
from ..plans import Places
from ..protocol import FeatureGradients, FeatureNeeds
from . import native, streams

__all__ = ["call_plan", "can_run", "distances", "distances_backward", "scalar"]


def can_run(problem: FeatureProblem) -> str | None:
    """Why the native kernels cannot take this call, None if they can."""
    return None if problem.device.type == "cpu" else f"the tensors are on {problem.device}"


def _tap(
    module: ModuleType,
    tap: Tap,
    weight: float,
    grad_rows: Tensor | None,
    d_student: Tensor | None,
    d_teacher: Tensor | None,
    distances: Tensor | None,
    stream: bool,
    keep: list[Any],
) -> Any:
    return module.Tap(
        tap.student.shape[:-1].numel(),
        tap.student.shape[-1],
        row_matrix(tap.student, keep),
        row_matrix(tap.teacher, keep),
        dense(tap.mask, torch.bool, keep),
        weight,
        address(grad_rows),
        1,
        address(d_student),
        address(d_teacher),
        address(distances),
        stream,
    )


def scalar(problem: FeatureProblem, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
    """The scalar loss and, from the same pass, its gradient with respect to each student that needs one."""
    module = native()
    keep: list[Any] = []
    gradients = [
        allocate.empty_gradient(tap.student) if need else None for tap, need in zip(problem.taps, needs, strict=True)
    ]
    stream = streams(*gradients)
    loss = allocate.empty((), problem.dtype, problem.device)
    taps = [
        _tap(module, tap, float(tap.weight), None, gradient, None, None, stream, keep)
        for tap, gradient in zip(problem.taps, gradients, strict=True)
    ]
    module.tap_rows(
        taps,
        FEATURE_KINDS[problem.feature_kind],
        problem.dtype is torch.float64,
        problem.reduction == "mean",
        loss.data_ptr(),
        torch.get_num_threads(),
    )
    return loss, gradients


def call_plan(problem: FeatureProblem, places: Places) -> Any:
    """The native plan of :func:`scalar` for calls like this one; None where :func:`reads_taps` says so."""
    of_taps = reads_taps(problem, places)
    if of_taps is None:
        return None
    module, keep = native(), list[Any]()
    taps = [_tap(module, tap, float(tap.weight), None, None, None, None, False, keep) for tap in problem.taps]
    kind, is_double = FEATURE_KINDS[problem.feature_kind], problem.dtype is torch.float64
    return module.FeaturePlan(taps, kind, is_double, problem.reduction == "mean", *of_taps)


def distances(problem: FeatureProblem) -> list[Tensor]:
    """``[...]`` distances of each tap, 0 on masked rows."""
    module = native()
    keep: list[Any] = []
    found = [allocate.empty(tap.student.shape[:-1], problem.dtype, problem.device) for tap in problem.taps]
    taps = [
        _tap(module, tap, 0.0, None, None, None, out, False, keep) for tap, out in zip(problem.taps, found, strict=True)
    ]
    module.tap_rows(
        taps, FEATURE_KINDS[problem.feature_kind], problem.dtype is torch.float64, False, 0, torch.get_num_threads()
    )
    return found


def distances_backward(
    problem: FeatureProblem, grad_distances: Sequence[Tensor], needs: FeatureNeeds
) -> FeatureGradients:
    """Gradients of ``Σ_k sum(grad_k·distances_k)``."""
    module = native()
    keep: list[Any] = []
    found = FeatureGradients(
        *(
            [allocate.empty_gradient(x) if need else None for x, need in zip(side, wanted, strict=True)]
            for side, wanted in ((problem.students, needs.students), (problem.teachers, needs.teachers))
        )
    )
    stream = streams(*found.students, *found.teachers)
    taps = []
    for tap, grad, d_student, d_teacher in zip(problem.taps, grad_distances, *found, strict=True):
        upstream = grad.to(problem.dtype).reshape(-1).contiguous()
        keep.append(upstream)
        taps.append(_tap(module, tap, 0.0, upstream, d_student, d_teacher, None, stream, keep))
    module.tap_rows(
        taps, FEATURE_KINDS[problem.feature_kind], problem.dtype is torch.float64, False, 0, torch.get_num_threads()
    )
    return found
