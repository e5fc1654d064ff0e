"""The checked mfd_loss problem that every backend receives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import contract
from ..reference.feature_loss import KINDS
from ..rows import Rows, is_used
from .pool_problem import PoolProblem, check_pool, check_vector


@dataclass
class MFDProblem:
    """A checked mfd_loss call. ``rows.student`` has the shape of the logits that are still to be computed."""

    rows: Rows
    pool: PoolProblem
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

    def tensors(self) -> dict[str, Tensor | None]:
        """Every tensor by the name of its argument."""
        found = self.pool.tensors()
        found["pool_temperature"] = found.pop("temperature")
        rows = self.rows.tensors()
        del rows["student"]
        found |= {{"teacher": "teacher_logits"}.get(name, name): t for name, t in rows.items()}
        names = ("head_weight", "head_bias", "teacher_features", "teacher_pool_weights", "soft_weight", "hard_weight")
        for name in (*names, "feature_weight", "pool_weight", "weight", "normalizer"):
            value = getattr(self, name)
            found[name] = value if isinstance(value, Tensor) else None
        return found


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
    leading, device, width = pool.leading, pool.device, pool.width
    head_weight = contract.check_floating(op, "head_weight", head_weight)
    if head_weight.dim() != 2 or head_weight.shape[1] != width or head_weight.shape[0] < 1:
        raise contract.value_error(op, "head_weight", head_weight, f"of shape [C, {width}] with C >= 1")
    contract.check_device(op, "head_weight", head_weight, device)
    classes = head_weight.shape[0]
    head_bias = check_vector(op, "head_bias", head_bias, classes, device)
    teacher_logits = contract.check_floating(op, "teacher_logits", teacher_logits)
    contract.check_device(op, "teacher_logits", teacher_logits, device)
    if teacher_logits.shape != (*leading, classes):
        raise contract.value_error(op, "teacher_logits", teacher_logits, f"of shape {[*leading, classes]}")

    # Anything of the logits' shape, dtype and device.
    logits = teacher_logits
    if logits.dtype != pool.dtype:
        logits = head_weight.detach().new_zeros(()).to(pool.dtype).expand(*leading, classes)
    rows = contract.check_rows(op, logits, teacher_logits, labels, **options)
    rows.student = teacher_logits
    pool.dtype = pool.out_dtype = rows.dtype
    soft_weight, hard_weight, feature_weight, pool_weight = (
        contract.check_scalar(op, name, value, dtype=rows.dtype)
        for name, value in (
            ("soft_weight", soft_weight),
            ("hard_weight", hard_weight),
            ("feature_weight", feature_weight),
            ("pool_weight", pool_weight),
        )
    )
    if labels is None and is_used(hard_weight):
        raise contract.value_error(op, "labels", labels, "given when hard_weight is not 0")
    contract.check_choice(op, "feature_kind", feature_kind, KINDS)
    if is_used(feature_weight) and teacher_features is None:
        raise contract.value_error(op, "teacher_features", None, "given when feature_weight is not 0")
    if teacher_features is not None:
        teacher_features = contract.check_floating(op, "teacher_features", teacher_features)
        if teacher_features.shape != (*leading, width):
            raise contract.value_error(op, "teacher_features", teacher_features, f"of shape {[*leading, width]}")
        contract.check_device(op, "teacher_features", teacher_features, device)
    if is_used(pool_weight) and teacher_pool_weights is None:
        raise contract.value_error(op, "teacher_pool_weights", None, "given when pool_weight is not 0")
    if teacher_pool_weights is not None:
        shape = torch.Size([*leading, pool.modalities])
        teacher_pool_weights = contract.check_row_tensor(
            op, "teacher_pool_weights", teacher_pool_weights, shape, device, None
        )
    weight = contract.check_weight(op, weight, leading, device, rows.dtype)
    normalizer = contract.check_reduction(op, reduction, normalizer, rows.dtype)
    return MFDProblem(
        rows,
        pool,
        head_weight,
        head_bias,
        teacher_features,
        teacher_pool_weights,
        feature_kind,
        soft_weight,
        hard_weight,
        feature_weight,
        pool_weight,
        weight,
        reduction,
        normalizer,
        leading,
        device,
    )
