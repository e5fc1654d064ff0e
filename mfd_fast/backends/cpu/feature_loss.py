"""feature_loss on the native CPU kernels: every tap of a call in one native call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...reference.feature_loss import KINDS
from .. import allocate
from . import native
from .rows import address, dense, rows_argument, streams


def can_run(problem: Any) -> str | None:
    """Why the native kernels cannot take this call, None if they can."""
    return None if problem.device.type == "cpu" else f"the tensors are on {problem.device}"


def _tap(
    module: Any,
    tap: Any,
    weight: float,
    grad_rows: Tensor | None,
    d_student: Tensor | None,
    d_teacher: Tensor | None,
    distances: Tensor | None,
    stream: bool,
    keep: list[Tensor],
) -> Any:
    return module.Tap(
        tap.student.shape[:-1].numel(),
        tap.student.shape[-1],
        rows_argument(tap.student, keep),
        rows_argument(tap.teacher, keep),
        dense(tap.mask, torch.bool, keep),
        weight,
        address(grad_rows),
        1,
        address(d_student),
        address(d_teacher),
        address(distances),
        stream,
    )


def scalar(problem: Any, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
    """The scalar loss and, from the same pass, its gradient with respect to each student that needs one."""
    module = native()
    keep: list[Tensor] = []
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
        KINDS.index(problem.kind),
        problem.dtype is torch.float64,
        problem.reduction == "mean",
        loss.data_ptr(),
        torch.get_num_threads(),
    )
    return loss, gradients


def distances(problem: Any) -> list[Tensor]:
    """``[...]`` distances of each tap, 0 on masked rows."""
    module = native()
    keep: list[Tensor] = []
    found = [allocate.empty(tap.student.shape[:-1], problem.dtype, problem.device) for tap in problem.taps]
    taps = [
        _tap(module, tap, 0.0, None, None, None, out, False, keep) for tap, out in zip(problem.taps, found, strict=True)
    ]
    module.tap_rows(taps, KINDS.index(problem.kind), problem.dtype is torch.float64, False, 0, torch.get_num_threads())
    return found


def distances_backward(problem: Any, grad_distances: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of ``Σ_k sum(grad_k·distances_k)`` to the students, then to the teachers."""
    module = native()
    keep: list[Tensor] = []
    sides = [*(tap.student for tap in problem.taps), *(tap.teacher for tap in problem.taps)]
    found = [allocate.empty_gradient(x) if need else None for x, need in zip(sides, needs, strict=True)]
    stream = streams(*found)
    count = len(problem.taps)
    taps = []
    for k, (tap, grad) in enumerate(zip(problem.taps, grad_distances, strict=True)):
        upstream = grad.to(problem.dtype).reshape(-1).contiguous()
        keep.append(upstream)
        taps.append(_tap(module, tap, 0.0, upstream, found[k], found[count + k], None, stream, keep))
    module.tap_rows(taps, KINDS.index(problem.kind), problem.dtype is torch.float64, False, 0, torch.get_num_threads())
    return found
