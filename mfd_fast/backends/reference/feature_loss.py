"""The feature_loss entry points in plain PyTorch, with the gradients of ``numerics`` written out.

The public function with ``backend="reference"`` runs the differentiable :mod:`mfd_fast.reference.feature_loss`
directly; these entry points serve the registered ops, inside which autograd does not record.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...reference.feature_loss import tap_rows


def can_run(problem: Any) -> str | None:  # noqa: ARG001
    """Every call can run."""
    return None


def distances(problem: Any) -> list[Tensor]:
    """``[...]`` distances of each tap, 0 on masked rows."""
    p = problem
    return [tap_rows(tap.student, tap.teacher, None, tap.mask, p.kind, p.dtype).clone() for tap in p.taps]


def distances_backward(problem: Any, grad_distances: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of ``Σ_k sum(grad_k·distances_k)`` to the students, then to the teachers."""
    p = problem
    students: list[Tensor | None] = []
    teachers: list[Tensor | None] = []
    for tap, grad in zip(p.taps, grad_distances, strict=True):
        s, t, up = tap.student.to(p.dtype), tap.teacher.to(p.dtype), grad.to(p.dtype)[..., None]
        if tap.mask is not None:
            zero = torch.zeros((), dtype=p.dtype, device=s.device)
            s, t, up = (torch.where(tap.mask[..., None], x, zero) for x in (s, t, up))
        if p.kind == "cosine":
            ss, tt = s.square().sum(-1, keepdim=True), t.square().sum(-1, keepdim=True)
            nothing = (ss == 0) | (tt == 0)
            ss, tt = torch.where(nothing, torch.ones_like(ss), ss), torch.where(nothing, torch.ones_like(tt), tt)
            norms = ss.sqrt() * tt.sqrt()
            cosine = (s * t).sum(-1, keepdim=True) / norms
            up = torch.where(nothing, torch.zeros_like(up), up)
            ds, dt = up * (cosine / ss * s - t / norms), up * (cosine / tt * t - s / norms)
        else:
            error = s - t
            ds = up / s.shape[-1] * (2 * error if p.kind == "mse" else error.clamp(-1, 1))
            dt = -ds
        students.append(ds.to(tap.student.dtype))
        teachers.append(dt.to(tap.teacher.dtype))
    return [g if need else None for g, need in zip([*students, *teachers], needs, strict=True)]
