"""The feature_loss entry points in plain PyTorch, with the gradients of ``numerics`` written out.

The public function with ``backend="reference"`` runs the differentiable :mod:`mfd_fast.reference.feature_loss`
directly; these entry points serve the registered ops, inside which autograd does not record.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...problems.features import FeatureProblem
from ...reference.feature_loss import tap_rows
from ..protocol import FeatureGradients, FeatureNeeds

__all__ = ["can_run", "distances", "distances_backward"]


def can_run(problem: FeatureProblem) -> str | None:  # noqa: ARG001
    """Every call can run."""
    return None


def distances(problem: FeatureProblem) -> list[Tensor]:
    """``[...]`` distances of each tap, 0 on masked rows."""
    p = problem
    return [tap_rows(tap.student, tap.teacher, None, tap.mask, p.feature_kind, p.dtype).clone() for tap in p.taps]


def distances_backward(
    problem: FeatureProblem, grad_distances: Sequence[Tensor], needs: FeatureNeeds
) -> FeatureGradients:
    """Gradients of ``Σ_k sum(grad_k·distances_k)``."""
    p = problem
    students: list[Tensor | None] = []
    teachers: list[Tensor | None] = []
    for tap, grad in zip(p.taps, grad_distances, strict=True):
        s, t, up = tap.student.to(p.dtype), tap.teacher.to(p.dtype), grad.to(p.dtype)[..., None]
        if tap.mask is not None:
            zero = torch.zeros((), dtype=p.dtype, device=s.device)
            s, t, up = (torch.where(tap.mask[..., None], x, zero) for x in (s, t, up))
        if p.feature_kind == "cosine":
            ss, tt = s.square().sum(-1, keepdim=True), t.square().sum(-1, keepdim=True)
            nothing = (ss == 0) | (tt == 0)
            ss, tt = torch.where(nothing, torch.ones_like(ss), ss), torch.where(nothing, torch.ones_like(tt), tt)
            norms = ss.sqrt() * tt.sqrt()
            cosine = (s * t).sum(-1, keepdim=True) / norms
            up = torch.where(nothing, torch.zeros_like(up), up)
            ds, dt = up * (cosine / ss * s - t / norms), up * (cosine / tt * t - s / norms)
        else:
            error = s - t
            ds = up / s.shape[-1] * (2 * error if p.feature_kind == "mse" else error.clamp(-1, 1))
            dt = -ds
        students.append(ds.to(tap.student.dtype))
        teachers.append(dt.to(tap.teacher.dtype))
    return FeatureGradients(
        [g if need else None for g, need in zip(students, needs.students, strict=True)],
        [g if need else None for g, need in zip(teachers, needs.teachers, strict=True)],
    )
