"""Options and results that cross the public API: divergences, logit transforms, named results."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = ["Divergence", "DistillTerms", "ForwardKL", "LogitTransform", "MFDOutput", "ModalPool"]


@dataclass(frozen=True)
class Divergence:
    """Base of the row divergences D(p, q) between teacher p and student q, both softened.

    A divergence is a value: compare, hash, print and pickle it freely.
    """

    @property
    def name(self) -> str:
        """The string that selects this divergence with its default parameters."""
        raise NotImplementedError


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p‖q) = Σ p (log p − log q). Gradient with respect to the softened student logits: q − p.

    Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv:1503.02531.
    """

    @property
    def name(self) -> str:
        return "forward_kl"


DIVERGENCES: dict[str, Divergence] = {"forward_kl": ForwardKL()}


@dataclass(frozen=True)
class LogitTransform:
    """What happens to one side's raw logits before the temperature, in this order.

    Args:
        scale: factor, finite and > 0.
        softcap: ``softcap * tanh(x / softcap)``, finite and > 0; None leaves the logits uncapped.
        standardize: per row, subtract the mean and divide by the unbiased standard deviation + 1e-7
            (Sun et al., Logit Standardization in Knowledge Distillation, arXiv:2403.01427).
        classes: use the first ``classes`` columns only (padded vocabularies). The other columns are not
            read and receive a zero gradient.
    """

    scale: float = 1.0
    softcap: float | None = None
    standardize: bool = False
    classes: int | None = None

    def __post_init__(self) -> None:
        def finite_positive(value: object) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf

        if not finite_positive(self.scale):
            raise ValueError(f"LogitTransform: scale must be a finite number > 0, got {self.scale!r}")
        if self.softcap is not None and not finite_positive(self.softcap):
            raise ValueError(f"LogitTransform: softcap must be None or a finite number > 0, got {self.softcap!r}")
        if not isinstance(self.standardize, bool):
            raise TypeError(f"LogitTransform: standardize must be a bool, got {self.standardize!r}")
        if self.classes is not None and (
            not isinstance(self.classes, int) or isinstance(self.classes, bool) or self.classes < 1
        ):
            raise ValueError(f"LogitTransform: classes must be None or an integer >= 1, got {self.classes!r}")

    @property
    def changes_values(self) -> bool:
        """False when the transform only selects columns."""
        return self.scale != 1.0 or self.softcap is not None or self.standardize


class DistillTerms(NamedTuple):
    """Per-row terms and by-products of one pass; each has the logits' leading shape ``[...]``.

    ``soft`` and ``hard`` are differentiable. The other fields are not, and speak of the softened
    distributions q (student) and p (teacher). Fields that need labels are None without labels.
    Rows that are masked or ignored hold 0 (False in ``agreement``).
    """

    soft: Tensor
    hard: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_label_prob: Tensor | None
    teacher_label_prob: Tensor | None
    agreement: Tensor


class ModalPool(NamedTuple):
    """Fused features ``pooled [..., D]`` and the modality ``weights [..., M]``, both differentiable."""

    pooled: Tensor
    weights: Tensor


class MFDOutput(NamedTuple):
    """Result of :func:`mfd_fast.mfd_loss`.

    ``loss`` is differentiable. ``soft``, ``hard`` and ``feature`` are the detached terms before
    weighting, reduced as the loss is; ``weights [..., M]`` and ``predictions [...]`` (int64 argmax of
    the student logits) are detached.
    """

    loss: Tensor
    soft: Tensor
    hard: Tensor
    feature: Tensor
    weights: Tensor
    predictions: Tensor
