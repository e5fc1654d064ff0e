"""Hugging Face Transformers: :class:`DistillTrainer`, or :class:`DistillMixin` before a Trainer of yours.

    trainer = DistillTrainer(model, args, train_dataset=data, teacher_model=teacher, distill={"temperature": 2.0})

The loss is :func:`mfd_fast.distill_loss` of the student's logits, the teacher's and the labels, summed over the rows
(tokens) whose label is not −100 and divided by ``num_items_in_batch``: the Trainer's own count over all accumulated
micro-batches and, with ``average_tokens_across_devices``, over all processes. Neither model computes a loss of its
own: labels are not passed on, except to encoder-decoders, which make their inputs from them.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.distill_loss import distill_loss
from ..types import LogitTransform, TopK
from .shared import align_vocabulary as aligned_transforms
from .shared import check_signature, item_count, require, shift_labels

require("transformers", "5.24", "6")

from transformers import Trainer  # noqa: E402

check_signature(Trainer.compute_loss, "self, model, inputs, return_outputs, num_items_in_batch")
check_signature(Trainer.training_step, "self, model, inputs, num_items_in_batch")
check_signature(Trainer._get_num_items_in_batch, "self, batch_samples, device")
check_signature(Trainer._set_signature_columns_if_needed, "self")

__all__ = ["DistillMixin", "DistillTrainer"]

#: Those of a TopK of which a batch has columns.
TENSORS = ("values", "indices", "mask")


class DistillMixin:
    """Makes a ``transformers.Trainer`` distil; put it before the Trainer among the bases.

    Args:
        teacher_model: a module whose output has ``logits`` (or is the logits). It is frozen, in evaluation mode, runs
            without autograd on the inputs that its ``forward`` names, and is not saved with the student.
        distill: keyword arguments of :func:`mfd_fast.distill_loss` (divergence, temperature, soft_weight,
            hard_weight, ...). Not those that the trainer sets from the batch (labels, mask, normalizer, ...), nor
            ``ignore_index``, for the Trainer counts the labels that are not −100, nor ``return_parts``, for the hook
            returns one loss, nor ``process_group``: a sharded head's logits are gathered by the model.
        teacher_column: instead of a model, the batch's column of the teacher's logits ``[..., C]``, or of
            :class:`~mfd_fast.TopK` objects; or a mapping ``{"values": column, "indices": column}`` of a TopK's
            columns, which may name one of its ``mask`` too and hold ``tail`` and ``values_are``. Row i belongs to the
            student's logits i.
        shift: labels belong to the next token, as in causal language models; so they are counted. None asks the
            Trainer.
        align_vocabulary: compare the classes that both sides have (vocabularies padded at the end) of logits; a
            :class:`~mfd_fast.TopK` must list classes of the student.

    Raises:
        ValueError: a teacher model and a teacher column, or neither; a ``compute_loss_func`` as well; and at the first
            batch: vocabularies that differ without ``align_vocabulary``, ``hard_weight`` without labels, no teacher
            column.
    """

    accelerator: Any
    args: Any
    model: Any
    _signature_columns: list[str] | None
    _loss_shifts_labels: bool

    def __init__(
        self,
        *args: Any,
        teacher_model: torch.nn.Module | None = None,
        distill: Mapping[str, Any] | None = None,
        teacher_column: str | Mapping[str, str] | None = None,
        shift: bool | None = None,
        align_vocabulary: bool = False,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        if (teacher_model is None) == (teacher_column is None):
            given = "neither" if teacher_model is None else "both"
            raise ValueError(f"{name}: exactly one of teacher_model and teacher_column must be given, got {given}")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(f"{name}: compute_loss_func and the distillation loss exclude each other")
        self.teacher_column = teacher_column
        self.distill = dict(distill or {})
        unknown = set(self.distill) - _OPTIONS
        if unknown:
            raise ValueError(
                f"{name}: distill must hold keyword arguments of distill_loss, got {', '.join(sorted(unknown))}"
            )
        self.align_vocabulary = align_vocabulary
        super().__init__(*args, **kwargs)
        self.distill.setdefault("label_smoothing", self.args.label_smoothing_factor)
        if shift is not None:  # the Trainer leaves the first label of a row out of its count, or does not
            self._loss_shifts_labels = shift
        self.shift = bool(self._loss_shifts_labels)
        # So that the labels are counted over the accumulated batch also for a model that takes no **kwargs: the
        # count is for the loss below, no model sees it.
        self.model_accepts_loss_kwargs = True
        self.teacher_model = None
        if teacher_model is not None:
            teacher_model.requires_grad_(False).eval()
            self.teacher_model = self.accelerator.prepare_model(teacher_model, evaluation_mode=True)

    def _teacher_columns(self) -> tuple[str, ...]:
        column = self.teacher_column
        if column is None or isinstance(column, str):
            return () if column is None else (column,)
        return tuple(column[name] for name in TENSORS if name in column)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        columns = self._signature_columns
        if columns is not None:  # what is not listed the Trainer takes out of the data set
            columns += [name for name in self._teacher_columns() if name not in columns]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's hook."""
        inputs = dict(inputs)
        labels, next_labels = inputs.get("labels"), inputs.pop("shift_labels", None)
        inputs.pop("skip_logits", None)
        columns = self._teacher_columns()
        missing = [name for name in columns if name not in inputs]
        if missing:
            raise ValueError(
                f"{type(self).__name__}: teacher_column {', '.join(missing)} is not in the batch, which has "
                f"{', '.join(inputs)}"
            )
        stored = [inputs.pop(name) for name in columns]
        config = getattr(self.accelerator.unwrap_model(model), "config", None)  # a plain module has none
        if not getattr(config, "is_encoder_decoder", False):
            inputs.pop("labels", None)
        outputs = model(**inputs)
        loss = self._distill(outputs, self._teacher(inputs, stored), labels, next_labels, inputs, num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The count is of all processes, whose gradients are averaged; tensor parallel ones see the same rows.
            processes = self.accelerator.num_processes // self.get_tp_size()  # type: ignore[attr-defined]
            loss = loss * (processes if self.args.n_gpu <= 1 else self.args.n_gpu)
        return (loss, outputs) if return_outputs else loss

    def _teacher(self, inputs: dict[str, Any], stored: list[Any]) -> Tensor | TopK:
        if self.teacher_model is not None:
            with torch.no_grad():
                bare = self.accelerator.unwrap_model(self.teacher_model)
                return _logits(self.teacher_model(**_accepted(bare, inputs)))
        if isinstance(self.teacher_column, Mapping):
            names = [name for name in TENSORS if name in self.teacher_column]
            return TopK(**dict(self.teacher_column) | dict(zip(names, stored, strict=True)))  # type: ignore[arg-type]
        (teacher,) = stored
        if isinstance(teacher, TopK):  # the Trainer moves tensors only
            device = self.args.device
            mask = None if teacher.mask is None else teacher.mask.to(device)
            values, indices = teacher.values.to(device), teacher.indices.to(device)
            return dataclasses.replace(teacher, values=values, indices=indices, mask=mask)
        return teacher  # type: ignore[no-any-return]

    def _distill(
        self,
        outputs: Any,
        teacher: Tensor | TopK,
        labels: Tensor | None,
        next_labels: Tensor | None,
        inputs: Mapping[str, Any],
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        student = _logits(outputs)
        options = dict(self.distill)
        if isinstance(teacher, Tensor) and teacher.shape[-1] != student.shape[-1]:
            options |= self._aligned(student.shape[-1], teacher.shape[-1])
        if isinstance(teacher, TopK) and self.align_vocabulary:
            self._check_listed(teacher, student.shape[-1])
        if labels is None and next_labels is None:
            if options.get("hard_weight", 0.0) != 0.0:
                raise ValueError(f"{type(self).__name__}: hard_weight needs labels, the batch has none")
            padding = inputs.get("attention_mask")
            if padding is not None and padding.shape == student.shape[:-1]:
                options.setdefault("mask", padding.bool())
        elif next_labels is not None:
            labels = next_labels
        elif self.shift and labels is not None:
            labels = shift_labels(labels)
        return distill_loss(student, teacher, labels, normalizer=item_count(num_items_in_batch), **options)

    def _check_listed(self, teacher: TopK, classes: int) -> None:
        listed = teacher.indices if teacher.mask is None else teacher.indices.masked_fill(~teacher.mask, 0)
        # A GPU would have to be waited for.
        if listed.device.type == "cpu" and listed.numel() and int(listed.max()) >= classes:
            raise ValueError(
                f"{type(self).__name__}: align_vocabulary restricts logits only, and the TopK teacher lists class "
                f"{int(listed.max())} of a student of {classes}; TopK(mask=indices < {classes}) leaves such classes out"
            )

    def _aligned(self, student: int, teacher: int) -> dict[str, LogitTransform]:
        """The transforms of ``distill``, restricted to the classes that both sides have."""
        if not self.align_vocabulary:
            raise ValueError(
                f"{type(self).__name__}: the student has {student} classes and the teacher {teacher}; "
                "align_vocabulary=True compares the first that both have"
            )
        sides = zip(("student_transform", "teacher_transform"), aligned_transforms(student, teacher), strict=True)
        return {
            name: dataclasses.replace(self.distill.get(name) or LogitTransform(), classes=aligned.classes)
            for name, aligned in sides
        }


#: A call's tensors are the trainer's business.
_OPTIONS = set(inspect.signature(distill_loss).parameters) - {
    "student",
    "teacher",
    "labels",
    "teacher_weights",
    "mask",
    "weight",
    "ignore_index",
    "reduction",
    "normalizer",
    "return_parts",
    "process_group",
}


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]  # type: ignore[no-any-return]


def _accepted(model: torch.nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that the model's forward names; all of them where it takes ``**kwargs``."""
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name in parameters}


class DistillTrainer(DistillMixin, Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` with the arguments of :class:`DistillMixin`."""
