"""Options and results that cross the public API: logit transforms, sparse teachers, named results."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .number import is_integer, is_real, plain

__all__ = [
    "DistillOutput",
    "DistillTerms",
    "LinearDistillOutput",
    "LogitTransform",
    "MFDOutput",
    "ModalPoolOutput",
    "TopK",
]

TAILS = ("bucket", "renormalize", "zero")
VALUES = ("logprobs", "logits")
MAX_TOPK = 1024


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
        def finite_positive(value: Any) -> bool:
            return is_real(value) and 0 < value < math.inf

        if not finite_positive(self.scale):
            raise ValueError(f"LogitTransform: scale must be a finite number > 0, got {self.scale!r}")
        if self.softcap is not None and not finite_positive(self.softcap):
            raise ValueError(f"LogitTransform: softcap must be None or a finite number > 0, got {self.softcap!r}")
        if not isinstance(self.standardize, bool):
            raise TypeError(f"LogitTransform: standardize must be a bool, got {self.standardize!r}")
        if self.classes is not None and (not is_integer(self.classes) or self.classes < 1):
            raise ValueError(f"LogitTransform: classes must be None or an integer >= 1, got {self.classes!r}")
        # NumPy's numbers, too, reach the kernels as Python's.
        for name in ("scale", "softcap", "classes"):
            object.__setattr__(self, name, plain(getattr(self, name)))

    @property
    def changes_values(self) -> bool:
        """False when the transform only selects columns."""
        return self.scale != 1.0 or self.softcap is not None or self.standardize


@dataclass(frozen=True, eq=False)
class TopK:
    """A teacher of which K classes per row are known, e.g. stored offline.

    With the given log-probabilities ℓ and r = log(1 − Σ exp ℓ) of everything else, the teacher at temperature
    T_t is softmax([ℓ_1, …, ℓ_K, r] / T_t): the rest is one class, also when it is softened. Given logits are
    complete: softmax(ℓ / T_t), nothing left for the rest. Against the softened student q of all C classes:

    - ``"bucket"``: K + 1 classes; the last holds the rest of the teacher and Σ q over the classes not listed.
    - ``"renormalize"``: K classes; teacher and student restricted to them, softmax(ℓ / T_t) and softmax of the
      K student logits / T.
    - ``"zero"``: C classes; the teacher of above is 0 where nothing is listed and its rest is dropped, so that
      it sums to less than 1 and a KL may be below 0. ValueError for DKD and NKD: they need a whole distribution.

    Reverse KL, and AlphaBeta with α ≤ 0 or α+β ≤ 0, are infinite where the teacher is 0 by construction, which is
    outside the listed classes for "zero" and for "bucket" with logits: ValueError.
    With all C classes listed nothing is left. DKD and NKD need the label among those listed.

    Args:
        values: ``[..., K]`` floating, 1 <= K <= 1024; ``-inf`` is a class of probability 0. May require grad.
        indices: ``[..., K]`` int64 or int32 classes in [0, C), different within a row. On a CPU others raise when
            the op runs; on a GPU an index out of range and a class listed twice give NaN for their row.
        tail: what becomes of the other classes.
        values_are: "logprobs" (natural, at temperature 1, over all classes) or "logits".
        mask: bool ``[..., K]``, False where a candidate only pads a shorter list: its value and index are not read
            (they may be -inf, NaN, -1, any class again), its class counts as not listed, its gradient is 0. A row
            without candidates has the rest alone, and no distribution where there is none ("renormalize", "logits").
            None: all K are listed.

    Raises:
        TypeError, ValueError: an argument breaks the contract.
    """

    values: Tensor
    indices: Tensor
    tail: str = "bucket"
    values_are: str = "logprobs"
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if not _is_dense(self.values) or not self.values.is_floating_point():
            raise TypeError(f"TopK: values must be a dense floating-point tensor, got {_kind(self.values)}")
        if not _is_dense(self.indices) or self.indices.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"TopK: indices must be a dense int64 or int32 tensor, got {_kind(self.indices)}")
        if self.values.dim() < 1 or self.indices.shape != self.values.shape:
            shapes = f"{list(self.values.shape)} and {list(self.indices.shape)}"
            raise ValueError(f"TopK: values and indices must have one shape [..., K], got {shapes}")
        if not 1 <= self.values.shape[-1] <= MAX_TOPK:
            raise ValueError(f"TopK: K must be in [1, {MAX_TOPK}], got {self.values.shape[-1]}")
        if self.tail not in TAILS:
            raise ValueError(f"TopK: tail must be one of {', '.join(map(repr, TAILS))}, got {self.tail!r}")
        if self.values_are not in VALUES:
            raise ValueError(f"TopK: values_are must be one of {', '.join(map(repr, VALUES))}, got {self.values_are!r}")
        if self.mask is not None:
            if not _is_dense(self.mask) or self.mask.dtype != torch.bool:
                raise TypeError(f"TopK: mask must be None or a dense bool tensor, got {_kind(self.mask)}")
            if self.mask.shape != self.values.shape:
                shapes = f"{list(self.values.shape)} (that of values), got {list(self.mask.shape)}"
                raise ValueError(f"TopK: mask must be of shape {shapes}")


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return str(value.dtype) if _is_dense(value) else f"{value.dtype} {'nested' if value.is_nested else value.layout}"


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


class DistillOutput(NamedTuple):
    """Result of :func:`mfd_fast.distill_loss` with ``return_parts=True``.

    ``loss`` is differentiable. The others are detached and reduced as the loss is (row weights included): ``soft`` and
    ``hard`` before their weights, and the entropies (nats) of the softened distributions q (student) and p (teacher).
    A term whose weight is the number 0 is 0, and with the soft term so are the entropies.
    """

    loss: Tensor
    soft: Tensor
    hard: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor


class LinearDistillOutput(NamedTuple):
    """Result of :func:`mfd_fast.linear_distill_loss`.

    ``loss`` is differentiable. ``soft`` and ``hard`` are the detached terms before their weights (0 if not computed),
    reduced as the loss is, row weights included. ``student_entropy`` is the sum over the counted rows of the softened
    student's entropy in nats, ``rows`` their number (int64); both 0-d and detached.
    """

    loss: Tensor
    soft: Tensor
    hard: Tensor
    student_entropy: Tensor
    rows: Tensor


class ModalPoolOutput(NamedTuple):
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
