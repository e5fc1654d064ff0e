"""timm: ``LogitDistillationTask`` and ``FeatureDistillationTask`` with their distillation term computed here.

    task = LogitDistillationTask(student, teacher, task_loss_weight=0.3, temperature=4.0)

Arguments, results and definition are timm's: task weight · criterion + distillation weight · (T²·KL, a mean over rows;
or the mean squared error of the features). A criterion that is the (smoothed) cross-entropy of classes is computed in
the same pass, and task_loss and kd_loss are then detached: ``loss`` alone is differentiable. Others, and the soft
targets of mixup, stay timm's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.distill_loss import distill_loss
from ..ops.feature_loss import feature_loss
from .shared import check_signature, require

require("timm", "1.0.31", "2")

from timm.loss import LabelSmoothingCrossEntropy  # noqa: E402
from timm.task import FeatureDistillationTask as TimmFeatureDistillationTask  # noqa: E402
from timm.task import LogitDistillationTask as TimmLogitDistillationTask  # noqa: E402
from timm.task.distillation import DistillationTeacher  # noqa: E402

__all__ = ["FeatureDistillationTask", "LogitDistillationTask"]

for _task in (TimmLogitDistillationTask, TimmFeatureDistillationTask):
    check_signature(_task.forward, "self, input, target")
check_signature(DistillationTeacher.forward, "self, input, return_features")
check_signature(DistillationTeacher.normalize_input, "self, input, student_mean, student_std")


class _Task:
    task_loss_weight: float
    distill_loss_weight: float

    def _teacher(self, images: Tensor, features: bool) -> Tensor:
        with torch.no_grad():
            images = self.teacher.normalize_input(images, self.student_mean, self.student_std)  # type: ignore[attr-defined]
            return self.teacher(images.detach(), return_features=features)  # type: ignore[attr-defined, no-any-return]

    def _result(self, output: Tensor, task_loss: Tensor, kd_loss: Tensor) -> dict[str, Tensor]:
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        return {"loss": loss, "output": output, "task_loss": task_loss, "kd_loss": kd_loss}


def _hard_term(criterion: Any) -> dict[str, Any] | None:
    """The criterion as options of distill_loss, None for one that is not the cross-entropy of classes."""
    if type(criterion) is LabelSmoothingCrossEntropy:
        return {"label_smoothing": criterion.smoothing}
    if type(criterion) is nn.CrossEntropyLoss and criterion.weight is None and criterion.reduction == "mean":
        return {"label_smoothing": criterion.label_smoothing, "ignore_index": criterion.ignore_index}
    return None


class LogitDistillationTask(_Task, TimmLogitDistillationTask):  # type: ignore[misc]
    """``timm.task.LogitDistillationTask``."""

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: A002
        student = self.trainable_module(input)
        hard = _hard_term(self.criterion)
        classes = target.dtype == torch.int64 and target.shape == student.shape[:-1]
        if hard is None or not classes or not (self.task_loss_weight and self.distill_loss_weight):
            task_loss = self.criterion(student, target)
            kd_loss = distill_loss(student, self._teacher(input, False), temperature=self.temperature)
            return self._result(student, task_loss, kd_loss)
        found: Any = distill_loss(
            student,
            self._teacher(input, False),
            target,
            temperature=self.temperature,
            soft_weight=self.distill_loss_weight,
            hard_weight=self.task_loss_weight,
            ignored_labels="term",
            return_parts=True,
            **hard,
        )
        return {"loss": found.loss, "output": student, "task_loss": found.hard, "kd_loss": found.soft}


class FeatureDistillationTask(_Task, TimmFeatureDistillationTask):  # type: ignore[misc]
    """``timm.task.FeatureDistillationTask``."""

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: A002
        student, features = self.trainable_module(input)
        task_loss = self.criterion(student, target)
        return self._result(student, task_loss, feature_loss(features, self._teacher(input, True)))
