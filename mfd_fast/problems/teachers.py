"""What may stand as the teacher of row losses: a tensor, several with weights, or a sparse one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import DKD, NKD, AlphaBeta, Divergence, ReverseKL
from ..types import TopK
from .checks import can_read, check_device, check_floating, counted_rows, extremes, value_error


class TopKRows(NamedTuple):
    """How the K values of a sparse teacher are meant; see :class:`mfd_fast.TopK`.

    ``tail``: "bucket", "renormalize" or "zero". ``logprobs``: the values are log-probabilities, else logits.
    ``padded``: candidates whose index is PADDING are none.
    """

    tail: str
    logprobs: bool
    padded: bool


def check_topk(op: str, topk: TopK, divergence: Divergence, transform: object, classes: int) -> TopKRows:
    """How the values are meant. The indices are left to :func:`check_indices`, which reads them."""
    if transform is not None:
        raise ValueError(f"{op}: teacher_transform needs the whole row of teacher logits, got a TopK teacher")
    width = topk.values.shape[-1]
    if width > classes:
        raise ValueError(f"{op}: teacher must list at most {classes} classes (the student's), got K = {width}")
    tail = "renormalize" if width == classes and topk.mask is None else topk.tail
    logprobs = topk.values_are == "logprobs"
    if tail == "zero" and isinstance(divergence, (DKD, NKD)):
        raise ValueError(f"{op}: {divergence.name} needs a whole teacher distribution, got TopK(tail='zero')")
    alpha, beta = divergence.parameters
    if (tail == "zero" or (tail == "bucket" and not logprobs)) and (
        isinstance(divergence, ReverseKL) or (isinstance(divergence, AlphaBeta) and (alpha <= 0 or alpha + beta <= 0))
    ):
        got = f"TopK(tail={tail!r}, values_are={topk.values_are!r})"
        raise ValueError(f"{op}: {divergence} is infinite where the teacher is 0, got {got}")
    return TopKRows(tail, logprobs, topk.mask is not None)


def check_log_probabilities(op: str, topk: TopK, counted: Tensor | None) -> None:
    """None of those of a counted row is above 0, beyond rounding; on a CPU only, where the check is free.

    +inf is left to the arithmetic, which gives NaN for its row.
    """
    if topk.values_are != "logprobs" or not can_read(topk.values):
        return
    values = topk.values.detach()
    positive = (values > 64 * torch.finfo(values.dtype).eps) & (values < math.inf)
    if topk.mask is not None:
        positive &= topk.mask
    positive = positive.reshape(-1, values.shape[-1])
    if counted is not None and positive.any():
        positive &= counted[:, None]
    if positive.any():
        row = int(positive.any(-1).nonzero()[0])
        found = float(values.reshape(positive.shape)[row][positive[row]][0])
        raise ValueError(
            f"{op}: teacher.values must be log-probabilities <= 0, got {found:g} in row {row}; "
            "for logits pass TopK(values_are='logits')"
        )


def check_teacher_weights(
    op: str,
    value: object,
    count: int,
    leading: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
    mask: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
) -> Tensor | None:
    """``[count]`` or ``[N, count]`` summing to 1 in each row, still in the graph; equal in rows that do not exist."""
    if value is None:
        return None
    weights = check_floating(op, "teacher_weights", value)
    if weights.shape not in ((count,), (*leading, count)):
        need = f"of shape [{count}] or {[*leading, count]} (one value per teacher)"
        raise value_error(op, "teacher_weights", weights, need)
    check_device(op, "teacher_weights", weights, device)
    weights = weights.to(dtype)
    per_row = weights.dim() > 1 or len(leading) == 0
    weights = weights.reshape(-1, count) if per_row else weights
    exists = counted_rows(mask, labels, ignore_index) if per_row else None
    if exists is not None:
        weights = torch.where(exists[:, None], weights, torch.ones_like(weights))
    total = weights.sum(-1, keepdim=True)
    if can_read(weights):
        low, high = extremes(weights)
        least, most = extremes(total)
        if not (0 <= low <= high < math.inf and 0 < least <= most < math.inf):  # NaN too
            raise ValueError(
                f"{op}: teacher_weights must be finite and >= 0 with a finite sum > 0, "
                f"got values from {low} to {high} and sums from {least} to {most}"
            )
    return (weights / total).contiguous()


def check_teachers(op: str, teacher: object, leading: torch.Size, device: torch.device) -> list[Tensor]:
    """The teachers' tensors: one, or those of a sequence."""
    several = not isinstance(teacher, Tensor) and isinstance(teacher, Sequence)
    given: tuple[object, ...] = tuple(teacher) if several else (teacher,)  # type: ignore[arg-type]
    if not given:
        raise value_error(op, "teacher", teacher, "a tensor, a TopK or a non-empty sequence of tensors")
    teachers = []
    for k, value in enumerate(given):
        name = f"teacher[{k}]" if several else "teacher"
        tensor = check_floating(op, name, value)
        if tensor.dim() < 1 or tensor.shape[:-1] != leading:
            raise value_error(op, name, tensor, f"of shape {[*leading, 'C']} (the student's leading dimensions)")
        check_device(op, name, tensor, device)
        teachers.append(tensor)
    return teachers
