"""The problem of linear_distill_loss: two heads, and the row losses of the logits to come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..types import TopK
from .checks import (
    check_device,
    check_floating,
    compute_dtype,
    is_used,
    type_error,
    value_error,
)
from .problem import Problem
from .rows import Normalizer, RowLoss, RowProblem, Scalar, check_row_loss, check_rows

#: Bytes of one side's logits in a chunk, where ``chunk_rows`` is not given: on a CPU what the caches still help with
#: (1024x(512, 512)x32000 float32: chunks of 1024, 512, 256, 128 rows take 1.27, 1.13, 1.08, 1.14 times the products).
CHUNK_BYTES = 32 << 20
#: The same on a GPU, whose library wants more rows at a time. No GPU has measured it.
CHUNK_BYTES_OFF_CPU = 256 << 20
#: Rows of a chunk at least: fewer would leave the products waiting for the weight.
MIN_CHUNK_ROWS = 256


class HeadProblem(Problem):
    """The heads of both sides, and how many rows' logits are in memory at a time.

    Attributes:
        student_hidden, student_weight, student_bias: ``[..., Hs]``, ``[C, Hs]``, ``[C]`` or None.
        teacher_hidden, teacher_weight, teacher_bias: the teacher's, or all None: then its logits or the values of a
            sparse teacher are given.
        chunk_rows: >= 1.
    """

    OPTIONS: ClassVar = {"chunk_rows": "SymInt"}
    TENSORS = (
        "student_hidden",
        "student_weight",
        "student_bias",
        "teacher_hidden",
        "teacher_weight",
        "teacher_bias",
    )

    chunk_rows: int
    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None

    @property
    def device(self) -> torch.device:
        return self.student_hidden.device


class LinearProblem(Problem):
    """A checked linear_distill_loss call.

    ``rows.student`` only has the shape of the logits that are still to be computed, and so has its teacher where
    there is a head.
    """

    PARTS = ("rows", "loss", "heads")

    rows: RowProblem
    loss: RowLoss
    heads: HeadProblem

    @property
    def widths(self) -> tuple[int, int]:
        """Classes of either side's head or logits."""
        teacher = self.heads.teacher_weight
        return self.heads.student_weight.shape[0], self.rows.teacher.shape[-1] if teacher is None else teacher.shape[0]

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        names = {"student": "student_hidden", "teacher": "teacher_hidden"}
        return [(names.get(name, name), value) for name, value in super().named_tensors()]


def default_chunk_rows(classes: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of one chunk of logits."""
    budget = CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES_OFF_CPU
    return max(budget // (classes * dtype.itemsize), MIN_CHUNK_ROWS)


def check_chunk_rows(op: str, argument: str, value: object) -> None:
    """None, or an int >= 1."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise value_error(op, argument, value, "None or an int >= 1")


def _check_head(op: str, side: str, hidden: object, weight: object, bias: object) -> tuple[Tensor, Tensor, Any]:
    h = check_floating(op, f"{side}_hidden", hidden)
    if h.dim() < 1 or h.shape[-1] < 1:
        raise value_error(op, f"{side}_hidden", h, "of shape [..., H] with H >= 1")
    w = check_floating(op, f"{side}_weight", weight)
    if w.dim() != 2 or w.shape[1] != h.shape[-1] or w.shape[0] < 1:
        raise value_error(op, f"{side}_weight", w, f"of shape [C, {h.shape[-1]}] with C >= 1")
    check_device(op, f"{side}_weight", w, h.device)
    if bias is None:
        return h, w, None
    b = check_floating(op, f"{side}_bias", bias)
    if b.shape != (w.shape[0],):
        raise value_error(op, f"{side}_bias", b, f"of shape [{w.shape[0]}]")
    check_device(op, f"{side}_bias", b, h.device)
    return h, w, b


def _check_teacher(
    op: str, hidden: object, weight: object, bias: object, leading: torch.Size, device: torch.device
) -> tuple[tuple[Any, Any, Any], Tensor | TopK | None]:
    """The teacher's head, and what is given in place of its logits."""
    if isinstance(hidden, Sequence):
        raise type_error(op, "teacher_hidden", hidden, "one teacher's tensor (several are not supported)")
    if weight is not None:
        head = _check_head(op, "teacher", hidden, weight, bias)
        if head[0].shape[:-1] != leading:
            need = f"of shape {[*leading, 'H']} (the student's leading dimensions)"
            raise value_error(op, "teacher_hidden", head[0], need)
        check_device(op, "teacher_hidden", head[0], device)
        return head, None
    if bias is not None:
        raise value_error(op, "teacher_bias", bias, "None where teacher_weight is None")
    if hidden is None or isinstance(hidden, TopK):
        return (None, None, None), hidden
    return (None, None, None), check_floating(op, "teacher_hidden", hidden)


def check_linear_distill_loss(
    op: str,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | TopK | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None,
    *,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    soft_weight: Scalar,
    hard_weight: Scalar,
    weight: Tensor | None,
    reduction: str,
    normalizer: Normalizer,
    chunk_rows: int | None,
    **options: Any,
) -> LinearProblem:
    """The whole contract; ``options`` are those of :func:`check_rows`. Raises before any product."""
    student = _check_head(op, "student", student_hidden, student_weight, student_bias)
    leading, device = student[0].shape[:-1], student[0].device
    teacher, given = _check_teacher(op, teacher_hidden, teacher_weight, teacher_bias, leading, device)
    if teacher[0] is None and given is None and is_used(soft_weight):
        need = "a tensor or a TopK where soft_weight is not the number 0"
        raise type_error(op, "teacher_hidden", None, need)
    check_chunk_rows(op, "chunk_rows", chunk_rows)

    logits = given.values if isinstance(given, TopK) else given
    dtype = compute_dtype(*(t for t in (*student, *teacher, logits) if t is not None))

    def logits_of(head: tuple[Tensor, Tensor, Any]) -> Tensor:
        """What checks need of logits that are still to be computed, in one number's memory."""
        return torch.zeros((), dtype=dtype, device=device).expand(*leading, head[1].shape[0])

    probe = logits_of(student)
    against = logits_of(teacher) if teacher[0] is not None else probe if given is None else given
    rows = check_rows(op, probe, against, labels, **options)
    loss = check_row_loss(rows, soft_weight, hard_weight, weight, reduction, normalizer)
    if not loss.use_soft:
        rows, teacher = rows.without_teacher(), (None, None, None)
    heads = HeadProblem(
        chunk_rows=default_chunk_rows(rows.classes, dtype, device) if chunk_rows is None else chunk_rows,
        student_hidden=student[0],
        student_weight=student[1],
        student_bias=student[2],
        teacher_hidden=teacher[0],
        teacher_weight=teacher[1],
        teacher_bias=teacher[2],
    )
    return LinearProblem(rows=rows, loss=loss, heads=heads)
