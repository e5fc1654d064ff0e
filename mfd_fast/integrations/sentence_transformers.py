"""Sentence Transformers: ``DistillKLDivLoss`` and ``EmbedDistillLoss``.

    loss = DistillKLDivLoss(model, temperature=2.0)     # instead of sentence_transformers' own

Definitions, checks and columns are theirs: T²·KL of similarity scores, T the student's temperature; the mean over the
columns of the mean squared error or 1 − cosine of embeddings. The distance "l2" stays theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.distill_loss import distill_loss
from ..ops.feature_loss import feature_loss
from .shared import check_signature, require

require("sentence-transformers", "6.2", "7")

from sentence_transformers.sentence_transformer import losses  # noqa: E402
from sentence_transformers.util import check_teacher_targets  # noqa: E402

__all__ = ["DistillKLDivLoss", "EmbedDistillLoss"]

check_signature(losses.DistillKLDivLoss.compute_loss_from_embeddings, "self, embeddings, labels")
check_signature(losses.EmbedDistillLoss.compute_loss_from_embeddings, "self, embeddings, teacher_embeddings")


class DistillKLDivLoss(losses.DistillKLDivLoss):  # type: ignore[misc]
    """``sentence_transformers``' ``DistillKLDivLoss``."""

    _checked_teacher_scale: bool

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        query, *candidates = embeddings
        if len(candidates) < 2:
            raise ValueError(f"{type(self).__name__} needs a query and at least two candidates, got {len(embeddings)}")
        if labels.shape != (query.shape[0], len(candidates)):
            raise ValueError(
                f"{type(self).__name__}: the teacher's scores must be [{query.shape[0]}, {len(candidates)}], "
                f"got {list(labels.shape)}"
            )
        if not self._checked_teacher_scale:  # once, as they do
            self._checked_teacher_scale = True
            probabilities = torch.softmax(labels.detach() / self.teacher_temperature, dim=1)
            check_teacher_targets(probabilities, labels, self.teacher_temperature, type(self).__name__)
        scores = torch.stack([self.similarity_fct(query, candidate) for candidate in candidates], dim=1)
        return distill_loss(
            scores,
            labels.detach(),
            temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
        )


class EmbedDistillLoss(losses.EmbedDistillLoss):  # type: ignore[misc]
    """``sentence_transformers``' ``EmbedDistillLoss``: all columns in one pass."""

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], teacher_embeddings: list[Tensor]) -> Tensor:
        if self.distance_metric == "l2":
            loss: Tensor = super().compute_loss_from_embeddings(embeddings, teacher_embeddings)
            return loss
        teacher = [t.to(device=s.device, dtype=s.dtype) for s, t in zip(embeddings, teacher_embeddings, strict=True)]
        student = embeddings if self.projection is None else [self.projection(s) for s in embeddings]
        return feature_loss(student, teacher, kind=self.distance_metric, weight=[1 / len(student)] * len(student))
