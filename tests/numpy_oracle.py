"""Second oracle: values and analytic gradients in float64 NumPy, from formulas and not from the reference.

Sources: Hinton et al. arXiv:1503.02531 (soft term, T²); Szegedy et al. arXiv:1512.00567 (label smoothing).
Per row: x, y student and teacher logits after their transform; u = x/Ts, v = y/Tt; q, p their softmax;
r = log p − log q; K = KL(p‖q).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Transform:
    """x -> scale*x -> softcap*tanh(x/softcap) -> the first ``classes`` columns."""

    scale: float = 1.0
    softcap: float | None = None
    classes: int | None = None

    def forward(self, z: Array) -> Array:
        x = self.scale * z[..., : self.classes]
        return x if self.softcap is None else self.softcap * np.tanh(x / self.softcap)

    def backward(self, z: Array, dx: Array) -> Array:
        slope = np.full_like(dx, self.scale)
        if self.softcap is not None:
            slope *= 1 - np.tanh(self.scale * z[..., : self.classes] / self.softcap) ** 2
        dz = np.zeros_like(z)
        dz[..., : self.classes] = dx * slope
        return dz


def softmax(u: Array) -> Array:
    e = np.exp(u - u.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_sum_exp(u: Array) -> Array:
    m = u.max(-1)
    return m + np.log(np.exp(u - m[..., None]).sum(-1))


def _p_log_p(p: Array) -> Array:
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0)


@dataclass(frozen=True)
class Rows:
    """Everything the gradients need, per row."""

    z: Array
    t: Array
    x: Array
    y: Array
    q: Array
    p: Array
    r: Array
    kl: Array
    ts: Array
    tt: Array
    keep: Array
    soft: Array
    hard: Array


def distill_rows(
    student: Array,
    teacher: Array,
    labels: Array | None = None,
    *,
    temperature: float | Array = 1.0,
    teacher_temperature: float | Array | None = None,
    label_smoothing: float = 0.0,
    mask: Array | None = None,
    ignore_index: int = -100,
    student_transform: Transform = Transform(),
    teacher_transform: Transform = Transform(),
    scale_by_temperature: bool = True,
) -> Rows:
    lead = student.shape[:-1]
    z, t = (
        student.reshape(-1, student.shape[-1]).astype(np.float64),
        teacher.reshape(-1, teacher.shape[-1]).astype(np.float64),
    )
    n = len(z)
    ts = np.broadcast_to(np.asarray(temperature, np.float64), lead).reshape(-1)
    tt = (
        ts
        if teacher_temperature is None
        else np.broadcast_to(np.asarray(teacher_temperature, np.float64), lead).reshape(-1)
    )
    keep = np.ones(n, bool) if mask is None else mask.reshape(-1).copy()
    if labels is not None:
        keep &= labels.reshape(-1) != ignore_index
    z, t = np.where(keep[:, None], z, 0.0), np.where(keep[:, None], t, 0.0)
    x, y = student_transform.forward(z), teacher_transform.forward(t)
    u, v = x / ts[:, None], y / tt[:, None]
    lu, lv = log_sum_exp(u), log_sum_exp(v)
    q, p = softmax(u), softmax(v)
    r = (v - lv[:, None]) - (u - lu[:, None])
    kl = (p * r).sum(-1)
    soft = kl * (ts**2 if scale_by_temperature else 1.0)
    hard = np.zeros(n)
    if labels is not None:
        label = np.where(keep, labels.reshape(-1), 0)
        eps = label_smoothing
        hard = log_sum_exp(x) - (1 - eps) * x[np.arange(n), label] - eps * x.mean(-1)
    return Rows(z, t, x, y, q, p, r, kl, ts, tt, keep, np.where(keep, soft, 0.0), np.where(keep, hard, 0.0))


def distill_terms(
    student: Array, teacher: Array, labels: Array | None = None, **options: Any
) -> dict[str, Array | None]:
    """The fields of DistillTerms."""
    rows = distill_rows(student, teacher, labels, **options)
    lead, keep = student.shape[:-1], rows.keep

    def shaped(value: Array) -> Array:
        return np.where(keep, value, np.zeros((), value.dtype)).reshape(lead)

    at_label: dict[str, Array | None] = {"student_label_prob": None, "teacher_label_prob": None, "hard": None}
    if labels is not None:
        label = np.where(keep, labels.reshape(-1), 0)
        index = np.arange(len(label))
        at_label = {
            "student_label_prob": shaped(rows.q[index, label]),
            "teacher_label_prob": shaped(rows.p[index, label]),
            "hard": shaped(rows.hard),
        }
    return {
        "soft": shaped(rows.soft),
        "student_entropy": shaped(-_p_log_p(rows.q).sum(-1)),
        "teacher_entropy": shaped(-_p_log_p(rows.p).sum(-1)),
        "agreement": shaped(rows.x.argmax(-1) == rows.y.argmax(-1)),
        **at_label,
    }


def distill_backward(
    grad_soft: Array,
    grad_hard: Array,
    student: Array,
    teacher: Array,
    labels: Array | None = None,
    *,
    student_transform: Transform = Transform(),
    teacher_transform: Transform = Transform(),
    scale_by_temperature: bool = True,
    label_smoothing: float = 0.0,
    **options: Any,
) -> dict[str, Array]:
    """Gradients of Σ_i grad_soft_i·soft_i + grad_hard_i·hard_i; the temperatures' are per row, ``[...]``."""
    rows = distill_rows(
        student,
        teacher,
        labels,
        student_transform=student_transform,
        teacher_transform=teacher_transform,
        scale_by_temperature=scale_by_temperature,
        label_smoothing=label_smoothing,
        **options,
    )
    x, y, q, p, ts, tt = rows.x, rows.y, rows.q, rows.p, rows.ts, rows.tt
    r, kl = rows.r, rows.kl[:, None]
    gs, gh = np.where(rows.keep, grad_soft.reshape(-1), 0.0), np.where(rows.keep, grad_hard.reshape(-1), 0.0)
    f = ts**2 if scale_by_temperature else np.ones_like(ts)
    dx = (gs * f / ts)[:, None] * (q - p)
    if labels is not None:
        classes = x.shape[-1]
        onehot = np.eye(classes)[np.where(rows.keep, labels.reshape(-1), 0)]
        target = (1 - label_smoothing) * onehot + label_smoothing / classes
        dx = dx + gh[:, None] * (softmax(x) - target)
    dy = (gs * f / tt)[:, None] * p * (r - kl)
    eq_x, ep_x, ep_y = (q * x).sum(-1), (p * x).sum(-1), (p * y).sum(-1)
    dts = -f * (eq_x - ep_x) / ts**2
    if scale_by_temperature:
        dts = dts + 2 * ts * rows.kl
    dtt = -f * ((p * y * r).sum(-1) - rows.kl * ep_y) / tt**2
    lead = student.shape[:-1]
    return {
        "student": student_transform.backward(rows.z, dx).reshape(student.shape),
        "teacher": teacher_transform.backward(rows.t, dy).reshape(teacher.shape),
        "temperature": (gs * dts).reshape(lead),
        "teacher_temperature": (gs * dtt).reshape(lead),
    }


def _row_factors(keep: Array, weight: Array | None, reduction: str, normalizer: float | None) -> Array:
    """What each row's loss is multiplied by before the sum."""
    factor = keep.astype(np.float64)
    if weight is not None:
        factor = np.where(keep, weight.reshape(-1), 0.0)
    if reduction == "mean":
        factor = factor / (max(int(keep.sum()), 1) if normalizer is None else normalizer)
    return factor


def distill_loss(
    student: Array,
    teacher: Array,
    labels: Array | None = None,
    *,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    weight: Array | None = None,
    reduction: str = "mean",
    normalizer: float | None = None,
    grad_output: Array | float = 1.0,
    **options: Any,
) -> tuple[Array, dict[str, Array]]:
    """The loss and its gradients; ``temperature`` holds the sum of both sides' where they share it."""
    rows = distill_rows(student, teacher, labels, **options)
    lead = student.shape[:-1]
    factor = _row_factors(rows.keep, weight, reduction, normalizer)
    terms = soft_weight * rows.soft + hard_weight * rows.hard
    loss = (factor * terms).reshape(lead) if reduction == "none" else np.asarray((factor * terms).sum())
    upstream = np.broadcast_to(np.asarray(grad_output, np.float64), lead if reduction == "none" else ()).reshape(-1)
    scaled = factor * upstream
    grads = distill_backward(soft_weight * scaled, hard_weight * scaled, student, teacher, labels, **options)
    if options.get("teacher_temperature") is None:
        grads["temperature"] = grads["temperature"] + grads.pop("teacher_temperature")
    for side in ("temperature", "teacher_temperature"):
        if side in grads and np.ndim(options.get(side, 1.0)) == 0:
            grads[side] = np.asarray(grads[side].sum())
    grads["weight"] = (_row_factors(rows.keep, None, reduction, normalizer) * upstream * terms).reshape(lead)
    grads["soft_weight"] = np.asarray((scaled * rows.soft).sum())
    grads["hard_weight"] = np.asarray((scaled * rows.hard).sum())
    if normalizer is not None:
        grads["normalizer"] = np.asarray(-(scaled * terms).sum() / normalizer)
    return loss, grads


def modal_pool(
    features: list[Array],
    query: Array | None = None,
    *,
    scores: Array | None = None,
    bias: Array | None = None,
    temperature: float | Array = 1.0,
    present: Array | None = None,
    scale: float | None = None,
    grad_pooled: Array | float = 1.0,
    grad_weights: Array | float = 0.0,
) -> tuple[Array, Array, dict[str, Any]]:
    """pooled, weights, and the gradients of ⟨grad_pooled, pooled⟩ + ⟨grad_weights, weights⟩."""
    x = np.stack(features, -2)
    width = x.shape[-1]
    factor = width**-0.5 if scale is None else scale
    raw = np.zeros(x.shape[:-1])
    if query is not None:
        raw = factor * (x @ query)
    elif scores is not None:
        raw = scores
    here = np.ones(x.shape[:-1], bool) if present is None else present
    x = np.where(here[..., None], x, 0.0)
    raw = np.where(here, raw, 0.0)
    tau = np.asarray(temperature, np.float64)[..., None]  # 0-d or one per row
    logits = (raw + (0.0 if bias is None else bias)) / tau
    top = np.where(here, logits, -np.inf).max(-1, keepdims=True, initial=-np.inf)
    e = np.where(here, np.exp(np.where(here, logits - np.where(np.isfinite(top), top, 0.0), 0.0)), 0.0)
    total = e.sum(-1, keepdims=True)
    a = np.where(total > 0, e / np.where(total > 0, total, 1.0), 0.0)
    pooled = (a[..., None] * x).sum(-2)

    dy = np.broadcast_to(np.asarray(grad_pooled, np.float64), pooled.shape)
    da = np.broadcast_to(np.asarray(grad_weights, np.float64), a.shape)
    pm = (dy[..., None, :] * x).sum(-1) + da
    ds = a * (pm - (a * pm).sum(-1, keepdims=True))
    dscore = ds / tau
    dtau = -(dscore * logits).sum(-1)
    dx = a[..., None] * dy[..., None, :]
    grads: dict[str, Any] = {
        "bias": dscore.reshape(-1, a.shape[-1]).sum(0),
        "temperature": dtau if np.ndim(temperature) else np.asarray(dtau.sum()),
    }
    if query is not None:
        dx = dx + dscore[..., None] * factor * query
        grads["query"] = factor * (dscore[..., None] * x).reshape(-1, width).sum(0)
    if scores is not None:
        grads["scores"] = dscore
    dx = np.where(here[..., None], dx, 0.0)
    grads["features"] = [dx[..., m, :] for m in range(x.shape[-2])]
    return pooled, a, grads


def feature_rows(a: Array, b: Array, kind: str) -> tuple[Array, Array]:
    """Per row: the mean over D of the (a, b) loss, or 1 − cos; and its derivative with respect to ``a``."""
    width, d = a.shape[-1], a - b
    if kind == "mse":
        return (d**2).mean(-1), 2 * d / width
    if kind == "smooth_l1":
        small = np.abs(d) < 1
        return np.where(small, d**2 / 2, np.abs(d) - 0.5).mean(-1), np.where(small, d, np.sign(d)) / width
    if kind == "cosine":
        na, nb = (np.sqrt((v**2).sum(-1, keepdims=True)) for v in (a, b))
        zero = (na == 0) | (nb == 0)  # a zero vector has cosine 0 and no gradient
        na, nb = np.where(zero, 1.0, na), np.where(zero, 1.0, nb)
        cos = np.where(zero, 0.0, (a * b).sum(-1, keepdims=True) / (na * nb))
        return 1 - cos[..., 0], np.where(zero, 0.0, -(b / (na * nb) - cos * a / na**2))
    raise ValueError(kind)


def feature_loss(
    student: list[Array],
    teacher: list[Array],
    *,
    kind: str = "mse",
    mask: Array | None = None,
    weight: float | list[float] = 1.0,
    projector: list[Array | None] | None = None,
    reduction: str = "mean",
) -> tuple[Array, dict[str, list[Array]]]:
    """The loss and its gradients to student, teacher and projectors, one of each per tap."""
    taps = len(student)
    weights = weight if isinstance(weight, list) else [weight] * taps
    projectors = projector if projector is not None else [None] * taps
    loss: Array | float = 0.0
    grads: dict[str, list[Array]] = {"student": [], "teacher": [], "projector": []}
    for s, t, w, proj in zip(student, teacher, weights, projectors, strict=True):
        a = s if proj is None else s @ proj.T
        keep = np.ones(a.shape[:-1], bool) if mask is None else mask
        a, t = np.where(keep[..., None], a, 0.0), np.where(keep[..., None], t, 0.0)
        (value, da), (_, db) = feature_rows(a, t, kind), feature_rows(t, a, kind)
        if reduction == "sum" and kind != "cosine":  # a sum over elements
            value, da, db = (a.shape[-1] * v for v in (value, da, db))
        count = max(int(keep.sum()), 1) if reduction == "mean" else 1
        value = w * np.where(keep, value, 0.0) / count
        loss = loss + (value if reduction == "none" else value.sum())
        da, db = (np.where(keep[..., None], w * g / count, 0.0) for g in (da, db))
        grads["teacher"].append(db)
        if proj is None:
            grads["student"].append(da)
        else:
            grads["student"].append(da @ proj)
            flat = np.where(keep[..., None], s, 0.0).reshape(-1, s.shape[-1])
            grads["projector"].append(da.reshape(-1, a.shape[-1]).T @ flat)
    return np.asarray(loss), grads


def mfd_loss(
    features: list[Array],
    query: Array | None,
    head_weight: Array,
    head_bias: Array | None,
    teacher_logits: Array,
    labels: Array | None = None,
    *,
    teacher_features: Array | None = None,
    present: Array | None = None,
    bias: Array | None = None,
    pool_temperature: float = 1.0,
    pool_scale: float | None = None,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    feature_weight: float = 0.0,
    feature_kind: str = "mse",
    teacher_pool_weights: Array | None = None,
    pool_weight: float = 0.0,
    mask: Array | None = None,
    weight: Array | None = None,
    reduction: str = "mean",
    normalizer: float | None = None,
    **options: Any,
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The fields of MFDOutput, and the gradients of (the sum of) ``loss``."""
    pool = {"bias": bias, "temperature": pool_temperature, "present": present, "scale": pool_scale}
    pooled, a, _ = modal_pool(features, query, **pool)
    logits = pooled @ head_weight.T + (0.0 if head_bias is None else head_bias)
    rows = distill_rows(logits, teacher_logits, labels, mask=mask, **options)
    keep = rows.keep
    factor = _row_factors(keep, weight, reduction, normalizer)

    feature, dfeature = np.zeros(len(keep)), np.zeros_like(pooled)
    if teacher_features is not None:
        safe = np.where(keep[:, None], teacher_features, 1.0)
        feature, dfeature = feature_rows(pooled, safe, feature_kind)
        feature = np.where(keep, feature, 0.0)
    modality, da = np.zeros(len(keep)), np.zeros_like(a)
    if teacher_pool_weights is not None:
        target = np.where(keep[:, None], teacher_pool_weights, 0.0)
        on = target > 0
        safe_a = np.where(on, a, 1.0)
        modality = (target * (np.log(np.where(on, target, 1.0)) - np.log(safe_a))).sum(-1)
        da = np.where(on, -target / safe_a, 0.0)
    per_row = factor * (
        soft_weight * rows.soft
        + hard_weight * rows.hard
        + feature_weight * feature
        + pool_weight * np.where(keep, modality, 0.0)
    )

    def reduced(value: Array) -> Array:
        return value if reduction == "none" else np.asarray(value.sum())

    out = {
        "loss": reduced(per_row),
        "soft": reduced(factor * rows.soft),
        "hard": reduced(factor * rows.hard),
        "feature": reduced(factor * feature),
        "weights": np.where(keep[:, None], a, 0.0),
        "predictions": np.where(keep, logits.argmax(-1), -1),
    }
    dz = distill_backward(
        soft_weight * factor, hard_weight * factor, logits, teacher_logits, labels, mask=mask, **options
    )["student"]
    dy = dz @ head_weight + (factor * feature_weight)[:, None] * dfeature
    _, _, grads = modal_pool(features, query, grad_pooled=dy, grad_weights=(factor * pool_weight)[:, None] * da, **pool)
    grads["head_weight"], grads["head_bias"] = dz.T @ pooled, dz.sum(0)
    return out, grads
