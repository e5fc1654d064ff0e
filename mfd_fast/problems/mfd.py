"""The problem of mfd_loss: a pool, a head, row losses of the logits to come, and two more terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..codes import FEATURE_KINDS
from ..divergences import ForwardKL
from .checks import (
    by_pytorch,
    check_choice,
    check_device,
    check_divergence,
    check_floating,
    check_row_tensor,
    check_scalar,
    check_temperature,
    is_used,
    value_error,
)
from .pool import PoolProblem, check_pool, check_vector
from .problem import Problem
from .rows import (
    Normalizer,
    RowLoss,
    RowProblem,
    Scalar,
    check_absent_teacher,
    check_row_loss,
    check_rows,
)

#: KL(teacher_pool_weights ‖ weights) where a teacher gives weight to a modality that is absent: +inf, or what it gives
#: to those that are present, divided by its sum.
ABSENT_POOL_WEIGHTS = ("infinite", "renormalize")


class MFDProblem(Problem):
    """A checked mfd_loss call.

    Attributes:
        pool: of the features; its arithmetic has the dtype of ``rows``.
        rows: ``rows.student`` only has the shape of the logits that are still to be computed.
        loss: what becomes of soft and hard term, and of the two others.
        head_weight, head_bias: ``[C, D]``, ``[C]`` or None.
        teacher_features, teacher_pool_weights: ``[..., D]`` and ``[..., M]`` or None.
        feature_weight, pool_weight: number or 0-d tensor.
        feature_kind: of the feature term.
    """

    OPTIONS: ClassVar = {"feature_kind": "str"}
    TENSORS = (
        "head_weight",
        "head_bias",
        "teacher_features",
        "teacher_pool_weights",
        "feature_weight",
        "pool_weight",
    )
    PARTS = ("pool", "rows", "loss")

    feature_kind: str
    head_weight: Tensor
    head_bias: Tensor | None
    teacher_features: Tensor | None
    teacher_pool_weights: Tensor | None
    feature_weight: Scalar
    pool_weight: Scalar
    pool: PoolProblem
    rows: RowProblem
    loss: RowLoss

    @property
    def leading(self) -> torch.Size:
        return self.pool.leading

    @property
    def device(self) -> torch.device:
        return self.pool.device

    @property
    def elements(self) -> int | None:
        pool, rows = self.pool.elements, self.rows.elements
        if pool is None or rows is None or self.head_weight.dtype != torch.float32:
            return None
        classes, width = self.head_weight.shape
        return pool + classes * width + rows // 2

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        own = super().named_tensors()
        first = len(own) - len(self.rows.named_tensors()) - len(self.loss.named_tensors())
        names = {"student": "teacher_logits", "teacher": "teacher_logits"}
        pooled = {"temperature": "pool_temperature"}
        return [((pooled if k < first else names).get(name, name), t) for k, (name, t) in enumerate(own)]


def check_mfd_loss(
    op: str,
    features: Sequence[Tensor] | Tensor,
    query: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    *,
    teacher_features: Tensor | None,
    present: Tensor | None,
    bias: Tensor | None,
    pool_temperature: float | Tensor,
    pool_scale: float | None,
    soft_weight: Scalar,
    hard_weight: Scalar,
    feature_weight: Scalar,
    feature_kind: str,
    teacher_pool_weights: Tensor | None,
    absent_pool_weights: str,
    pool_weight: Scalar,
    weight: Tensor | None,
    reduction: str,
    normalizer: Normalizer,
    **options: Any,
) -> MFDProblem:
    """The whole contract of mfd_loss; ``options`` are those of :func:`check_rows`."""
    pool = check_pool(op, features, query, bias=bias, present=present, scale=pool_scale, scale_name="pool_scale")
    leading, device, width = pool.leading, pool.device, pool.width
    head_weight = check_floating(op, "head_weight", head_weight)
    if head_weight.dim() != 2 or head_weight.shape[1] != width or head_weight.shape[0] < 1:
        raise value_error(op, "head_weight", head_weight, f"of shape [C, {width}] with C >= 1")
    check_device(op, "head_weight", head_weight, device)
    classes = head_weight.shape[0]
    head_bias = check_vector(op, "head_bias", head_bias, classes, device)
    if teacher_logits is None:
        check_absent_teacher(op, "teacher_logits", soft_weight)
        # Of the shape of logits, with next to no memory: no kernel reads it.
        teacher_logits = _no_logits(op, head_weight, leading, pool.dtype)
        check_divergence(op, options["divergence"], labels)
        options["divergence"] = ForwardKL()
    teacher_logits = check_floating(op, "teacher_logits", teacher_logits)
    check_device(op, "teacher_logits", teacher_logits, device)
    if teacher_logits.shape != (*leading, classes):
        raise value_error(op, "teacher_logits", teacher_logits, f"of shape {[*leading, classes]}")

    # Anything of the logits' shape, dtype and device.
    logits = teacher_logits
    if logits.dtype != pool.dtype:
        logits = _no_logits(op, head_weight, leading, pool.dtype)
    rows = check_rows(op, logits, teacher_logits, labels, **options)
    rows.student = teacher_logits
    pool.dtype = pool.out_dtype = rows.dtype
    pool.temperature = _pool_temperature(rows, pool_temperature, leading)
    loss = check_row_loss(rows, soft_weight, hard_weight, weight, reduction, normalizer)
    if rows.ignored_labels == "term" and not loss.use_hard:
        rows = rows.replace(ignored_labels="row", labels=None)
    feature_weight = check_scalar(op, "feature_weight", feature_weight, dtype=rows.dtype)
    pool_weight = check_scalar(op, "pool_weight", pool_weight, dtype=rows.dtype)
    check_choice(op, "feature_kind", feature_kind, tuple(FEATURE_KINDS))
    check_choice(op, "absent_pool_weights", absent_pool_weights, ABSENT_POOL_WEIGHTS)
    if is_used(feature_weight) and teacher_features is None:
        raise value_error(op, "teacher_features", None, "given when feature_weight is not 0")
    if teacher_features is not None:
        teacher_features = check_floating(op, "teacher_features", teacher_features)
        if teacher_features.shape != (*leading, width):
            wanted = f"of shape {[*leading, width]} (feature_loss has a projector for other widths)"
            raise value_error(op, "teacher_features", teacher_features, wanted)
        check_device(op, "teacher_features", teacher_features, device)
    if is_used(pool_weight) and teacher_pool_weights is None:
        raise value_error(op, "teacher_pool_weights", None, "given when pool_weight is not 0")
    if teacher_pool_weights is not None:
        shape = torch.Size([*leading, pool.modalities])
        teacher_pool_weights = check_row_tensor(op, "teacher_pool_weights", teacher_pool_weights, shape, device, None)
        if absent_pool_weights == "renormalize" and pool.present is not None:
            given, present = teacher_pool_weights, pool.present
            named = [("teacher_pool_weights", given), ("present", present)]
            teacher_pool_weights = by_pytorch(op, lambda: named, lambda: _of_present(given, present, rows))
    return MFDProblem(
        feature_kind=feature_kind,
        head_weight=head_weight,
        head_bias=head_bias,
        teacher_features=teacher_features,
        teacher_pool_weights=teacher_pool_weights,
        feature_weight=feature_weight,
        pool_weight=pool_weight,
        pool=pool,
        rows=rows,
        loss=loss,
    )


def _no_logits(op: str, head_weight: Tensor, leading: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros ``[..., C]`` of the kind of ``head_weight``, without memory for each of them."""
    shape, like = (*leading, head_weight.shape[0]), head_weight.detach()
    return by_pytorch(op, lambda: [("head_weight", head_weight)], lambda: like.new_zeros((), dtype=dtype).expand(shape))


def _of_present(weights: Tensor, present: Tensor, rows: RowProblem) -> Tensor:
    """``[..., M]``, 0 where absent, divided by the sum over the modalities that are present unless that is 0."""
    counted = rows.counted()
    here = present if counted is None else present & counted.reshape(present.shape[:-1])[..., None]
    kept = torch.where(here, weights.to(rows.dtype), 0.0)
    total = kept.sum(-1, keepdim=True)
    return kept / torch.where(total == 0, torch.ones_like(total), total)


def _pool_temperature(rows: RowProblem, value: float | Tensor, leading: torch.Size) -> float | Tensor:
    """In the shape of the rows, and 1 in those that do not exist: whatever stands there has no effect."""
    exists = (rows.mask, None if rows.ignored_labels == "term" else rows.labels, rows.ignore_index)
    tau = check_temperature(rows.op, "pool_temperature", value, leading, rows.device, rows.dtype, *exists)
    if not isinstance(tau, Tensor) or tau.dim() == 0:
        return tau
    counted = rows.counted()
    return (tau if counted is None else torch.where(counted, tau, torch.ones_like(tau))).reshape(leading)
