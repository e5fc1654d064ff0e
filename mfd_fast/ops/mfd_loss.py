"""mfd_loss: the whole multimodal distillation step of the student's head in one call.

Per row: pooled = modal_pool(features), z = pooled·Wᵀ + b, and
    loss = weight·(soft_weight·soft + hard_weight·hard + feature_weight·feature + pool_weight·pool)
with soft and hard of distill_loss(z, teacher_logits), feature the distance of pooled to the teacher's
features, pool = KL(teacher_pool_weights ‖ weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import contract
from ..backends import choose
from ..divergences import Divergence
from ..reference.feature_loss import KINDS
from ..reference.mfd_loss import is_used
from ..reference.mfd_loss import mfd_loss as reference_loss
from ..rows import Rows
from ..types import MFDOutput
from .modal_pool import check_pool, check_vector


@dataclass
class MFDProblem:
    """A checked mfd_loss call. ``rows.student`` stands for the logits that are still to be computed."""

    rows: Rows
    features: list[Tensor]
    query: Tensor | None
    bias: Tensor | None
    present: Tensor | None
    pool_temperature: float | Tensor
    pool_scale: float
    head_weight: Tensor
    head_bias: Tensor | None
    teacher_features: Tensor | None
    teacher_pool_weights: Tensor | None
    feature_kind: str
    soft_weight: float | Tensor
    hard_weight: float | Tensor
    feature_weight: float | Tensor
    pool_weight: float | Tensor
    weight: Tensor | None
    reduction: str
    normalizer: float | Tensor | None
    leading: torch.Size
    device: torch.device


def check_mfd_loss(
    op: str,
    features: Sequence[Tensor] | Tensor,
    query: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    teacher_logits: Tensor,
    labels: Tensor | None,
    *,
    teacher_features: Tensor | None,
    present: Tensor | None,
    bias: Tensor | None,
    pool_temperature: float | Tensor,
    pool_scale: float | None,
    soft_weight: float | Tensor,
    hard_weight: float | Tensor,
    feature_weight: float | Tensor,
    feature_kind: str,
    teacher_pool_weights: Tensor | None,
    pool_weight: float | Tensor,
    weight: Tensor | None,
    reduction: str,
    normalizer: float | Tensor | None,
    **options: Any,
) -> MFDProblem:
    """The whole contract of mfd_loss; ``options`` are those of :func:`contract.check_rows`."""
    pool = check_pool(
        op,
        features,
        query,
        bias=bias,
        temperature=pool_temperature,
        present=present,
        scale=pool_scale,
        temperature_name="pool_temperature",
        scale_name="pool_scale",
    )
    leading, device, width = pool.leading, pool.device, pool.features[0].shape[-1]
    contract.check_floating(op, "head_weight", head_weight)
    if head_weight.dim() != 2 or head_weight.shape[1] != width or head_weight.shape[0] < 1:
        raise contract.value_error(op, "head_weight", head_weight, f"of shape [C, {width}] with C >= 1")
    contract.check_device(op, "head_weight", head_weight, device)
    classes = head_weight.shape[0]
    check_vector(op, "head_bias", head_bias, classes, device)
    contract.check_floating(op, "teacher_logits", teacher_logits)
    if teacher_logits.shape != (*leading, classes):
        raise contract.value_error(op, "teacher_logits", teacher_logits, f"of shape {[*leading, classes]}")

    # The logits' shape, dtype and device, without memory behind them.
    logits = pool.features[0].detach().new_zeros(()).to(pool.dtype).expand(*leading, classes)
    rows = contract.check_rows(op, logits, teacher_logits, labels, **options)
    for name, value in (
        ("soft_weight", soft_weight),
        ("hard_weight", hard_weight),
        ("feature_weight", feature_weight),
        ("pool_weight", pool_weight),
    ):
        contract.check_scalar(op, name, value)
    if labels is None and is_used(hard_weight):
        raise contract.value_error(op, "labels", labels, "given when hard_weight is not 0")
    contract.check_choice(op, "feature_kind", feature_kind, KINDS)
    if is_used(feature_weight) and teacher_features is None:
        raise contract.value_error(op, "teacher_features", None, "given when feature_weight is not 0")
    if teacher_features is not None:
        contract.check_floating(op, "teacher_features", teacher_features)
        if teacher_features.shape != (*leading, width):
            raise contract.value_error(op, "teacher_features", teacher_features, f"of shape {[*leading, width]}")
        contract.check_device(op, "teacher_features", teacher_features, device)
    if is_used(pool_weight) and teacher_pool_weights is None:
        raise contract.value_error(op, "teacher_pool_weights", None, "given when pool_weight is not 0")
    if teacher_pool_weights is not None:
        shape = torch.Size([*leading, len(pool.features)])
        contract.check_row_tensor(op, "teacher_pool_weights", teacher_pool_weights, shape, device, None)
    contract.check_weight(op, weight, leading, device)
    contract.check_reduction(op, reduction, normalizer)
    return MFDProblem(
        rows,
        pool.features,
        query,
        bias,
        present,
        pool.temperature,
        pool.scale,
        head_weight,
        head_bias,
        teacher_features,
        teacher_pool_weights,
        feature_kind,
        soft_weight,
        hard_weight,
        feature_weight,
        pool_weight,
        None if weight is None else contract.flat(weight.to(rows.dtype)),
        reduction,
        normalizer,
        leading,
        device,
    )


def mfd_loss(
    features: Sequence[Tensor] | Tensor,
    query: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    teacher_features: Tensor | None = None,
    present: Tensor | None = None,
    bias: Tensor | None = None,
    pool_temperature: float | Tensor = 1.0,
    pool_scale: float | None = None,
    divergence: str | Divergence = "forward_kl",
    temperature: float | Tensor = 1.0,
    soft_weight: float | Tensor = 1.0,
    hard_weight: float | Tensor = 0.0,
    feature_weight: float | Tensor = 0.0,
    feature_kind: str = "mse",
    teacher_pool_weights: Tensor | None = None,
    pool_weight: float | Tensor = 0.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    scale_by_temperature: bool = True,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> MFDOutput:
    """Fusion, classification head and all distillation terms in one call.

    Args:
        features, query, bias, present, pool_temperature, pool_scale: as in :func:`mfd_fast.modal_pool`
            (``query`` None: a weighted average by ``bias``).
        head_weight, head_bias: ``[C, D]`` and ``[C]`` or None.
        teacher_logits: ``[..., C]``; labels: int64 ``[...]``.
        teacher_features: ``[..., D]``, matched to the pooled features by ``feature_kind``.
        teacher_pool_weights: ``[..., M]``, each row a distribution over the modalities; adds
            ``pool_weight·KL(teacher_pool_weights ‖ weights)`` (+inf where it gives weight to an absent modality).
        soft_weight, hard_weight, feature_weight, pool_weight: number or 0-d tensor; a term whose weight is
            the number 0 is not computed.
        divergence, temperature, mask, weight, ignore_index, label_smoothing, scale_by_temperature,
            reduction, normalizer: as in :func:`mfd_fast.distill_loss`. A row that is masked or ignored
            contributes nothing to any term.
        backend: "reference" or None.

    Returns:
        :class:`~mfd_fast.types.MFDOutput`. ``loss`` is differentiable to every floating input; ``soft``,
        ``hard`` and ``feature`` are the detached terms before their weights (0 if not computed), reduced
        like the loss (row ``weight`` included); on rows that are not counted ``weights`` is 0 and
        ``predictions`` is -1.

    Raises:
        TypeError, ValueError: an argument breaks the contract. BackendError: the backend cannot run.

    >>> import torch, mfd_fast as mfd
    >>> image, text = torch.randn(4, 8), torch.randn(4, 8)
    >>> out = mfd.mfd_loss([image, text], torch.randn(8), torch.randn(5, 8), None, torch.randn(4, 5))
    >>> out.loss.shape, out.weights.shape, out.predictions.shape
    (torch.Size([]), torch.Size([4, 2]), torch.Size([4]))
    """
    problem = check_mfd_loss(
        "mfd_loss",
        features,
        query,
        head_weight,
        head_bias,
        teacher_logits,
        labels,
        teacher_features=teacher_features,
        present=present,
        bias=bias,
        pool_temperature=pool_temperature,
        pool_scale=pool_scale,
        divergence=divergence,
        temperature=temperature,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        feature_weight=feature_weight,
        feature_kind=feature_kind,
        teacher_pool_weights=teacher_pool_weights,
        pool_weight=pool_weight,
        mask=mask,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        scale_by_temperature=scale_by_temperature,
        reduction=reduction,
        normalizer=normalizer,
    )
    choose("mfd_loss", problem, backend)
    return reference_loss(problem)
