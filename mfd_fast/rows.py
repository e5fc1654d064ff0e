"""The checked ``distill_loss`` problem that every backend receives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import Divergence
from .types import LogitTransform


class TopKRows(NamedTuple):
    """How the K values of a sparse teacher are meant; see :class:`mfd_fast.TopK`.

    ``indices``: contiguous int64 ``[N, K]``, unchecked. ``tail``: "bucket", "renormalize" or "zero".
    ``logprobs``: the values are log-probabilities, else logits.
    """

    indices: Tensor
    tail: str
    logprobs: bool


class Rows:
    """N rows of C classes of student and teacher logits with everything the row losses depend on.

    Built by :func:`mfd_fast.contract.check_rows`; backends trust it.

    Attributes:
        student, teacher: ``[..., Cs]``, ``[..., Ct]`` raw logits, any strides, one device.
        teachers: all teachers' logits; ``teacher`` is the first of them and almost always the only one.
        teacher_weights: ``[len(teachers)]`` or ``[N, len(teachers)]`` of ``dtype``, contiguous, >= 0 and summing to 1
            (``check_rows`` has normalised them, still in the graph); None: equal weights.
        topk: None, or ``teacher`` holds ``[..., K]`` values of a sparse teacher. Its ``tail`` is "renormalize"
            where K = C.
        divergence: canonical, so JSD has 0 < beta < 1 and the skewed ones 0 < lam < 1.
        labels, mask: ``[N]`` int64 / bool, contiguous, or None.
        temperature, teacher_temperature: float, or a tensor (0-d or contiguous ``[N]``) of ``dtype``.
        n_rows, classes: N, and the C columns used on both sides.
        dtype: dtype of the arithmetic and of the losses: float64 if either side is, else float32.
        op: name of the public function, for messages.
        student_transform, teacher_transform: None where the values are used as they are.
    """

    __slots__ = (
        "classes",
        "divergence",
        "dtype",
        "ignore_index",
        "label_smoothing",
        "labels",
        "mask",
        "n_rows",
        "op",
        "scale_by_temperature",
        "student",
        "student_transform",
        "teacher_temperature",
        "teacher_transform",
        "teacher_weights",
        "teachers",
        "temperature",
        "topk",
    )

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        mask: Tensor | None,
        temperature: float | Tensor,
        teacher_temperature: float | Tensor,
        divergence: Divergence,
        label_smoothing: float,
        ignore_index: int,
        student_transform: LogitTransform | None,
        teacher_transform: LogitTransform | None,
        scale_by_temperature: bool,
        n_rows: int,
        classes: int,
        dtype: torch.dtype,
        op: str = "distill_loss",
        topk: TopKRows | None = None,
        more_teachers: tuple[Tensor, ...] = (),
        teacher_weights: Tensor | None = None,
    ) -> None:
        self.student = student
        self.teachers = (teacher, *more_teachers)
        self.labels = labels
        self.mask = mask
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.divergence = divergence
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.student_transform = student_transform
        self.teacher_transform = teacher_transform
        self.scale_by_temperature = scale_by_temperature
        self.n_rows = n_rows
        self.classes = classes
        self.dtype = dtype
        self.op = op
        self.topk = topk
        self.teacher_weights = teacher_weights

    @property
    def teacher(self) -> Tensor:
        return self.teachers[0]

    def tensors(self) -> dict[str, Tensor | None]:
        """Every tensor by the name of its argument."""
        several = len(self.teachers) > 1
        teachers = {f"teacher[{k}]" if several else "teacher": t for k, t in enumerate(self.teachers)}
        named = {
            "labels": self.labels,
            "mask": self.mask,
            "temperature": self.temperature,
            "teacher_temperature": self.teacher_temperature,
            "teacher_weights": self.teacher_weights,
            "teacher.indices": None if self.topk is None else self.topk.indices,
        }
        found: dict[str, Tensor | None] = {"student": self.student, **teachers}
        return found | {k: v for k, v in named.items() if isinstance(v, Tensor)}

    @property
    def device(self) -> torch.device:
        return self.student.device

    def replace(self, **changes: object) -> Rows:
        """A copy with some attributes exchanged."""
        values = {name: getattr(self, name) for name in self.__slots__ if name != "teachers"}
        values |= {"teacher": self.teachers[0], "more_teachers": self.teachers[1:]} | changes
        return Rows(**values)

    def counted(self) -> Tensor | None:
        """Bool ``[N]``, True where a row exists; None when all do."""
        return counted_rows(self.mask, self.labels, self.ignore_index)


def counted_rows(mask: Tensor | None, labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """Bool ``[N]``, True where a row exists; None when all do."""
    if labels is None:
        return mask
    not_ignored = labels != ignore_index
    return not_ignored if mask is None else mask & not_ignored


def is_used(weight: float | Tensor) -> bool:
    """A term whose weight is the number 0 is not computed."""
    return isinstance(weight, Tensor) or weight != 0
