"""Feature matching in plain PyTorch: per-row distances between student and teacher features.

mse:       mean_d (s_d − t_d)²                Romero et al., FitNets, arXiv:1412.6550
smooth_l1: mean_d h(s_d − t_d), h(e) = ½e² for |e| < 1, |e| − ½ beyond      Girshick, arXiv:1504.08083
cosine:    1 − ⟨s, t⟩/(max(|s|, ε) max(|t|, ε)), ε = 1e-8 as in torch.nn.functional.cosine_similarity, so that no
           gradient is longer than 1/ε; a zero vector has cosine 0 and zero gradient. The squares of a row whose
           norm is far from 1 leave the dtype's range: rows are scaled before they are squared, which the cosine
           does not notice.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Least norm in the cosine's denominator.
EPSILON = 1e-8


def _unit(x: Tensor) -> Tensor:
    """``x/max(|x|, EPSILON)`` along the last dimension, whatever the norm."""
    size = x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_ones((*x.shape[:-1], 1))
    size = torch.where(size.isinf(), torch.ones_like(size), size.clamp_min(torch.finfo(x.dtype).tiny))
    x = x / size
    norm = x.square().sum(-1, keepdim=True).sqrt()
    return x / torch.where(norm < EPSILON / size, EPSILON / size, norm)


def row_distance(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """``[...]`` distance of each row of two ``[..., D]`` tensors of one dtype."""
    if kind == "cosine":
        zero = (student == 0).all(-1) | (teacher == 0).all(-1)
        student, teacher = (torch.where(zero[..., None], torch.ones_like(x), x) for x in (student, teacher))
        return 1 - torch.where(zero, torch.zeros_like(student[..., 0]), (_unit(student) * _unit(teacher)).sum(-1))
    error = student - teacher
    if kind == "smooth_l1":
        size = error.abs()
        return torch.where(size < 1, 0.5 * error.square(), size - 0.5).mean(-1)
    return error.square().mean(-1)


def tap_rows(
    student: Tensor, teacher: Tensor, projector: Tensor | None, mask: Tensor | None, kind: str, dtype: torch.dtype
) -> Tensor:
    """``[...]`` distances of one tap, 0 on masked rows, which are replaced before anything is computed."""
    student, teacher = student.to(dtype), teacher.to(dtype)
    if mask is not None:
        zero = torch.zeros((), dtype=dtype, device=mask.device)
        student = torch.where(mask[..., None], student, zero)
        teacher = torch.where(mask[..., None], teacher, zero)
    if projector is not None:
        student = student @ projector.to(dtype).T
    rows = row_distance(student, teacher, kind)
    return rows if mask is None else torch.where(mask, rows, zero)


def reduce_tap(rows: Tensor, mask: Tensor | None, width: int, kind: str, reduction: str) -> Tensor:
    """mean: over the elements (mse, smooth_l1) or rows (cosine) of the rows that exist; sum: likewise."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum() if kind == "cosine" else rows.sum() * width
    if mask is None:
        return rows.sum() / max(rows.numel(), 1)
    return rows.sum() / mask.sum().clamp_min(1)
