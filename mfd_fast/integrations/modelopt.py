"""NVIDIA ModelOpt: :class:`LogitsDistillationLoss` for ``mtd.convert`` and :class:`KDTrainer`.

    mtd.convert(model, mode=[("kd_loss", {"teacher_model": t, "criterion": LogitsDistillationLoss(temperature=2.0)})])

The definition is ModelOpt's: T²·KL(p‖q); reduction "mean" divides by rows *and classes*, "batchmean" by the first
dimension, "none" is per row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from torch.nn.modules.loss import _Loss

from ..ops.distill_loss import distill_loss
from ..types import LogitTransform
from .shared import align_vocabulary as aligned_transforms
from .shared import check_signature, item_count, require, shift_labels

require("nvidia-modelopt", "0.47", "0.48")

from modelopt.torch.distill import LogitsDistillationLoss as ModelOptLoss  # noqa: E402
from modelopt.torch.distill.plugins.huggingface import KDTrainer as ModelOptKDTrainer  # noqa: E402

check_signature(ModelOptLoss.__init__, "self, temperature, reduction")
check_signature(ModelOptLoss.forward, "self, logits_s, logits_t")
check_signature(ModelOptKDTrainer.compute_loss, "self, model, inputs, return_outputs, **kwargs")
check_signature(ModelOptKDTrainer._standard_kd_loss, "self, outputs, labels, **kwargs")

__all__ = ["KDTrainer", "LogitsDistillationLoss"]


class LogitsDistillationLoss(_Loss):
    """``modelopt.torch.distill.LogitsDistillationLoss`` with more to choose.

    Args:
        temperature: of both sides.
        reduction: "mean" (over rows and classes), "batchmean", "sum", "none".
        shift: drop the last position's row of ``[B, S, C]``, which predicts a token that is not there.
        align_vocabulary: compare the classes that both sides have (vocabularies padded at the end).
        options: further keyword arguments of :func:`mfd_fast.distill_loss` (divergence, ...).

    Raises:
        ValueError: another reduction; at the first call, class counts that differ without ``align_vocabulary``.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        reduction: str = "mean",
        *,
        shift: bool = False,
        align_vocabulary: bool = False,
        **options: Any,
    ) -> None:
        reductions = ("mean", "batchmean", "sum", "none")
        if reduction not in reductions:
            raise ValueError(f"LogitsDistillationLoss: reduction must be one of {reductions}, got {reduction!r}")
        super().__init__(reduction=reduction)
        self.temperature, self.shift, self.align_vocabulary = temperature, shift, align_vocabulary
        self.options = options

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        if self.shift:
            logits_s, logits_t = logits_s[..., :-1, :], logits_t[..., :-1, :]
        options = self.options | self._transforms(logits_s.shape[-1], logits_t.shape[-1])
        if self.reduction in ("mean", "batchmean"):
            transform = options.get("student_transform")
            classes = (transform.classes if transform else None) or logits_s.shape[-1]
            rows = logits_s.shape[:-1].numel()
            options["normalizer"] = max(logits_s.shape[0] if self.reduction == "batchmean" else rows * classes, 1)
        reduction = self.reduction if self.reduction in ("none", "sum") else "mean"
        return distill_loss(logits_s, logits_t.detach(), temperature=self.temperature, reduction=reduction, **options)

    def _transforms(self, student: int, teacher: int) -> dict[str, LogitTransform]:
        if student == teacher:
            return {}
        if not self.align_vocabulary:
            raise ValueError(
                f"LogitsDistillationLoss: the student has {student} classes and the teacher {teacher}; "
                "align_vocabulary=True compares the first that both have"
            )
        sides = zip(("student_transform", "teacher_transform"), aligned_transforms(student, teacher), strict=True)
        return {
            name: dataclasses.replace(self.options.get(name) or LogitTransform(), classes=aligned.classes)
            for name, aligned in sides
        }

    def extra_repr(self) -> str:
        values = {"temperature": self.temperature, "reduction": self.reduction, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in values.items())


class KDTrainer(ModelOptKDTrainer):  # type: ignore[misc]
    """``modelopt.torch.distill.plugins.huggingface.KDTrainer``.

    Args:
        normalize_by_items: divide by the Trainer's count of labels over the accumulated batch. ModelOpt divides by
            each micro-batch's own and the Trainer takes that for divided already, so that its gradient grows with the
            number of accumulated micro-batches; False keeps that.
    """

    _last_teacher_outputs: Any

    def __init__(self, *args: Any, normalize_by_items: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.normalize_by_items = normalize_by_items

    def _standard_kd_loss(self, outputs: Any, labels: Tensor | None, **kwargs: Any) -> Tensor:
        student, teacher = outputs.logits, self._last_teacher_outputs.logits
        self._last_teacher_outputs = None
        temperature = self._kd_criterion._temperature
        if labels is None:  # the last position predicts nothing
            return distill_loss(student[..., :-1, :], teacher[..., :-1, :], temperature=temperature)
        count = kwargs.get("num_items_in_batch") if self.normalize_by_items else None
        # Labels say which rows count.
        mask = shift_labels(labels) != -100
        loss = distill_loss(student, teacher, mask=mask, temperature=temperature, normalizer=item_count(count))
        if count is not None and self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return loss
