"""linear_distill_loss in NumPy: the heads around the row losses of :mod:`numpy_oracle`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy_oracle import Array, distill_loss, distill_rows, distill_terms


def linear_distill_loss(
    student_hidden: Array,
    student_weight: Array,
    teacher_hidden: Any,
    teacher_weight: Array | None,
    labels: Array | None = None,
    *,
    student_bias: Array | None = None,
    teacher_bias: Array | None = None,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    chunk_rows: int | None = None,
    **options: Any,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The fields of LinearDistillOutput, and the gradients of (the sum of) ``loss``; chunks change nothing."""
    del chunk_rows
    z = student_hidden @ student_weight.T + (0.0 if student_bias is None else student_bias)
    t = teacher_hidden
    if teacher_weight is not None:
        t = teacher_hidden @ teacher_weight.T + (0.0 if teacher_bias is None else teacher_bias)
    elif t is None:
        t = z

    def loss(soft: float, hard: float) -> tuple[Array, dict[str, Array]]:
        return distill_loss(z, t, labels, soft_weight=soft, hard_weight=hard, **options)

    value, grads = loss(soft_weight, hard_weight)
    outer = ("weight", "reduction", "normalizer")
    rows = distill_terms(z, t, labels, **{k: v for k, v in options.items() if k not in outer})
    keep = distill_rows(z, t, labels, **{k: v for k, v in options.items() if k not in outer}).keep
    out = {
        "loss": value,
        "soft": loss(1.0, 0.0)[0] if soft_weight else np.zeros_like(value),
        "hard": loss(0.0, 1.0)[0] if hard_weight else np.zeros_like(value),
        "student_entropy": np.asarray(np.where(keep, rows["student_entropy"].reshape(-1), 0.0).sum()),
        "rows": np.asarray(keep.sum()),
    }
    for side, hidden, weight in (
        ("student", student_hidden, student_weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        dz = grads.pop(side, None) if side in grads else grads.pop("teacher.values", None)
        if weight is None:
            grads["teacher_hidden"] = dz
            continue
        flat = dz.reshape(-1, dz.shape[-1])
        grads[f"{side}_hidden"] = dz @ weight
        grads[f"{side}_weight"] = flat.T @ hidden.reshape(-1, hidden.shape[-1])
        grads[f"{side}_bias"] = flat.sum(0)
    return out, grads
