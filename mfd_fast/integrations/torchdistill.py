"""torchdistill: importing this registers ``MfdKDLoss``, ``MfdLogitStdKDLoss`` and ``MfdFeatureLoss``.

    dependencies: [{name: mfd_fast.integrations.torchdistill}]
    criterion: {key: MfdKDLoss, kwargs: {...as of KDLoss...}}

``MfdKDLoss`` and ``MfdLogitStdKDLoss`` take the arguments of torchdistill's classes without the prefix, and are the
same functions: α·CE + β·T²·KL with β = 1 − α by default, and KL alone, *without* T² and β, where alpha is None or 0
or there are no targets. Classes are on dimension 1. "batchmean" divides the KL by the first dimension only, for
``[N, C, H, W]`` by N; the cross-entropy is a mean over the labelled positions. Both are one call here; a cross-entropy
with class weights or soft targets stays torch's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import FeatureLoss
from ..ops.distill_loss import distill_loss
from ..types import LogitTransform
from .shared import check_signature, require

require("torchdistill", "1.1.5", "2")

from torchdistill.losses.mid_level import KDLoss, LogitStdKDLoss  # noqa: E402
from torchdistill.losses.registry import register_mid_level_loss  # noqa: E402

__all__ = ["MfdFeatureLoss", "MfdKDLoss", "MfdLogitStdKDLoss"]

_PATHS = "self, student_module_path, student_module_io, teacher_module_path, teacher_module_io, temperature"
_FORWARD = "self, student_io_dict, teacher_io_dict, targets, *args, **kwargs"
check_signature(KDLoss.__init__, f"{_PATHS}, alpha, beta, reduction, **kwargs")
check_signature(LogitStdKDLoss.__init__, f"{_PATHS}, eps, alpha, beta, reduction, **kwargs")
check_signature(KDLoss.forward, _FORWARD)
check_signature(LogitStdKDLoss.forward, _FORWARD)

IO = Mapping[str, Mapping[str, Any]]


def _classes_last(logits: Tensor) -> Tensor:
    """``[N, C, ...]`` as ``[N, ..., C]``; what is so already costs no view and no node of autograd."""
    return logits if logits.dim() == 2 else logits.movedim(1, -1)


class _Distillation:
    """The forward of both losses; the constructors are torchdistill's."""

    standardize = False
    student_module_path: str
    student_module_io: str
    teacher_module_path: str
    teacher_module_io: str
    temperature: float
    alpha: float | None
    beta: float
    reduction: str
    cross_entropy_loss: nn.CrossEntropyLoss

    def forward(self, student_io_dict: IO, teacher_io_dict: IO, targets: Any = None, *_: Any, **__: Any) -> Tensor:
        logits = student_io_dict[self.student_module_path][self.student_module_io]
        student = _classes_last(logits)
        teacher = _classes_last(teacher_io_dict[self.teacher_module_path][self.teacher_module_io])
        if not self.alpha or targets is None:
            return distill_loss(student, teacher, **self._options(student, combined=False))
        options, hard = self._options(student, combined=True), self.cross_entropy_loss
        if not self._folds(student, targets):
            return self.alpha * hard(logits, targets) + distill_loss(student, teacher, **options)
        options |= {"hard_weight": self.alpha, "label_smoothing": hard.label_smoothing}
        # The cross-entropy is a mean over the labels, the KL is not.
        options |= {"ignore_index": hard.ignore_index, "ignored_labels": "term"}
        return distill_loss(student, teacher, targets, **options)

    def _options(self, student: Tensor, combined: bool) -> dict[str, Any]:
        """The soft term, of ``[..., C]`` logits."""
        transform = LogitTransform(standardize=True) if self.standardize else None
        rows = student.shape[:-1].numel()
        divisors = {"batchmean": student.shape[0], "mean": student.numel(), "sum": 1}
        if self.reduction not in divisors:
            raise ValueError(f"{type(self).__name__}: reduction must be batchmean, mean or sum, got {self.reduction!r}")
        return {
            "temperature": self.temperature,
            "soft_weight": (self.beta if combined else 1.0) * rows / max(divisors[self.reduction], 1),
            "scale_by_temperature": combined,
            "student_transform": transform,
            "teacher_transform": transform,
        }

    def _folds(self, student: Tensor, targets: Any) -> bool:
        """Whether the cross-entropy is the hard term of the same logits."""
        hard = self.cross_entropy_loss
        plain = type(hard) is nn.CrossEntropyLoss and hard.weight is None and hard.reduction == "mean"
        classes = isinstance(targets, Tensor) and targets.dtype == torch.int64 and targets.shape == student.shape[:-1]
        return plain and classes and not self.standardize


@register_mid_level_loss
class MfdKDLoss(_Distillation, KDLoss):  # type: ignore[misc]
    """``KDLoss``; arguments are its own. A reduction per element ("none") is refused."""


@register_mid_level_loss
class MfdLogitStdKDLoss(_Distillation, LogitStdKDLoss):  # type: ignore[misc]
    """``LogitStdKDLoss``; arguments are its own. ``eps`` must be its default, 1e-7, and logits ``[N, C]``: with more
    dimensions it standardises the last of them.
    """

    standardize = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.eps != 1e-7:
            raise ValueError(f"MfdLogitStdKDLoss: eps must be 1e-7, got {self.eps}")

    def _options(self, student: Tensor, combined: bool) -> dict[str, Any]:
        if student.dim() != 2:
            raise ValueError(f"MfdLogitStdKDLoss: logits must be [N, C], got {list(student.shape)}")
        return super()._options(student, combined)


@register_mid_level_loss
class MfdFeatureLoss(nn.Module):
    """:func:`mfd_fast.feature_loss` over pairs of modules: all taps in one pass.

    Args:
        taps: a list of ``{student_module_path, student_module_io, teacher_module_path, teacher_module_io}``; each
            module's value is ``[..., D]``, or ``[N, D, ...]`` with ``channels_first``.
        channels_first: the width is on dimension 1, as in convolutional networks.
        options: ``kind`` ("mse", "smooth_l1", "cosine"), ``weight`` (one, or one per tap) and ``projections``, the
            (student, teacher) widths of taps that need a learned projector.
    """

    def __init__(self, taps: list[dict[str, str]], channels_first: bool = False, **options: Any) -> None:
        super().__init__()
        if not taps:
            raise ValueError("MfdFeatureLoss: taps must name at least one pair of modules")
        projections = options.pop("projections", None)
        if projections is not None:  # YAML has no tuples
            options["projections"] = [None if pair is None else tuple(pair) for pair in projections]
        self.taps, self.channels_first = taps, channels_first
        self.loss = FeatureLoss(**options)

    def forward(self, student_io_dict: IO, teacher_io_dict: IO, *_: Any, **__: Any) -> Tensor:
        student = [self._value(student_io_dict, tap, "student") for tap in self.taps]
        teacher = [self._value(teacher_io_dict, tap, "teacher").detach() for tap in self.taps]
        loss: Tensor = self.loss(student, teacher)
        return loss

    def _value(self, modules: IO, tap: dict[str, str], side: str) -> Tensor:
        value: Tensor = modules[tap[f"{side}_module_path"]][tap[f"{side}_module_io"]]
        return value.movedim(1, -1) if self.channels_first else value
