"""Second oracle: values and analytic gradients in float64 NumPy, from formulas and not from the reference.

Sources: Hinton et al. arXiv:1503.02531 (soft term, T²); Szegedy et al. arXiv:1512.00567 (label smoothing).
Per row: x, y transformed logits of both; u = x/Ts, v = y/Tt; q, p softmax. Divergences: numpy_oracle_divergences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy_oracle_divergences import Pair, TopK, back_to_student, back_to_teachers, compare, evaluate, first_of_nkd

from mfd_fast.divergences import DIVERGENCES, Divergence

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Transform:
    """x -> scale*x -> softcap*tanh(x/softcap) -> standardise -> the first ``classes`` columns."""

    scale: float = 1.0
    softcap: float | None = None
    classes: int | None = None
    standardize: bool = False

    def capped(self, z: Array) -> Array:
        x = self.scale * z[..., : self.classes]
        return x if self.softcap is None else self.softcap * np.tanh(x / self.softcap)

    def forward(self, z: Array) -> Array:
        x = self.capped(z)
        if self.standardize:
            x = (x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-7)
        return x

    def backward(self, z: Array, dx: Array) -> Array:
        x = self.capped(z)
        if self.standardize:
            sigma = x.std(-1, ddof=1, keepdims=True)
            s, centred, degrees = sigma + 1e-7, x - x.mean(-1, keepdims=True), x.shape[-1] - 1
            dot = (dx * centred / s).sum(-1, keepdims=True)
            dx = (dx - dx.mean(-1, keepdims=True)) / s - dot / s * centred / (degrees * sigma)
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
    """All that gradients need. soft is 0 where it does not ``keep`` a row, hard where that is not ``labelled``."""

    z: Array
    teachers: list[Array]
    x: Array
    ys: list[Array]
    weights: Array
    ts: Array
    tt: Array
    keep: Array
    labelled: Array
    label: Array | None
    soft: Array
    hard: Array
    topk: TopK | None

    def pair(self, ts: Array, tt: Array) -> Pair:
        return compare(self.x, self.ys, ts, tt, self.weights, self.topk, self.label)


def named(divergence: str | Divergence) -> Any:
    return DIVERGENCES[divergence] if isinstance(divergence, str) else divergence


def distill_rows(
    student: Array,
    teacher: Array | TopK | list[Array],
    labels: Array | None = None,
    *,
    teacher_weights: Array | None = None,
    divergence: str | Divergence = "forward_kl",
    temperature: float | Array = 1.0,
    teacher_temperature: float | Array | None = None,
    label_smoothing: float = 0.0,
    mask: Array | None = None,
    ignore_index: int = -100,
    ignored_labels: str = "row",
    student_transform: Transform = Transform(),
    teacher_transform: Transform = Transform(),
    scale_by_temperature: bool = True,
) -> Rows:
    divergence = named(divergence)
    lead = student.shape[:-1]
    topk = teacher if isinstance(teacher, TopK) else None
    given = [topk.known] if topk else teacher if isinstance(teacher, list) else [teacher]
    z, *ts_ = (t.reshape(-1, t.shape[-1]).astype(np.float64) for t in (student, *given))
    n, count = len(z), len(given)
    weights = np.full((n, count), 1 / count)
    if teacher_weights is not None:
        weights = np.broadcast_to(teacher_weights, (*lead, count)).reshape(n, count)
        weights = weights / weights.sum(-1, keepdims=True)
    ts = np.broadcast_to(np.asarray(temperature, np.float64), lead).reshape(-1)
    tt = (
        ts
        if teacher_temperature is None
        else np.broadcast_to(np.asarray(teacher_temperature, np.float64), lead).reshape(-1)
    )
    keep = np.ones(n, bool) if mask is None else mask.reshape(-1).copy()
    label, labelled = None, keep
    if labels is not None:
        labelled = keep & (labels.reshape(-1) != ignore_index)
        label = np.where(labelled, labels.reshape(-1), 0)
        keep = keep if ignored_labels == "term" else labelled
    z = np.where(keep[:, None], z, np.arange(z.shape[-1]))
    teachers = [t if topk else np.where(keep[:, None], t, np.arange(t.shape[-1])) for t in ts_]
    x, ys = student_transform.forward(z), [teacher_transform.forward(t) for t in teachers]
    rows = Rows(z, teachers, x, ys, weights, ts, tt, keep, labelled, label, np.zeros(n), np.zeros(n), topk)
    pair = rows.pair(ts, tt)
    soft = evaluate(divergence, pair.p, pair.q, pair.label)[0] * (ts**2 if scale_by_temperature else 1.0)
    if divergence.name == "nkd":
        ones = np.ones(n)
        pair = rows.pair(ones, ones)
        soft = divergence.gamma * soft + first_of_nkd(pair.p, pair.q, pair.label)[0]
    hard = np.zeros(n)
    if label is not None:
        eps = label_smoothing
        hard = log_sum_exp(x) - (1 - eps) * x[np.arange(n), label] - eps * x.mean(-1)
    return replace(rows, soft=np.where(keep, soft, 0.0), hard=np.where(labelled, hard, 0.0))


def distill_terms(student: Array, teacher: Any, labels: Array | None = None, **options: Any) -> dict[str, Array | None]:
    """The fields of DistillTerms."""
    rows = distill_rows(student, teacher, labels, **options)
    lead, keep = student.shape[:-1], rows.keep
    pair = rows.pair(rows.ts, rows.tt)

    def shaped(value: Array, keep: Array = keep) -> Array:
        return np.where(keep, value, np.zeros((), value.dtype)).reshape(lead)

    # What the teacher says of all classes: of a sparse one the listed classes, and its rest for the entropy.
    dense, own = pair.p, pair.p
    if rows.topk is not None:
        indices = rows.topk.columns(*pair.full_q.shape)
        own, dense = pair.each[0], np.zeros((len(keep), pair.full_q.shape[-1] + 1))
        np.put_along_axis(dense, indices, own[:, : indices.shape[-1]], -1)
        dense = dense[:, :-1]
    at_label: dict[str, Array | None] = {"student_label_prob": None, "teacher_label_prob": None, "hard": None}
    if rows.label is not None:
        index = np.arange(len(keep))
        at_label = {
            "student_label_prob": shaped(pair.full_q[index, rows.label], rows.labelled),
            "teacher_label_prob": shaped(dense[index, rows.label], rows.labelled),
            "hard": shaped(rows.hard, rows.labelled),
        }
    return {
        "soft": shaped(rows.soft),
        "student_entropy": shaped(-_p_log_p(pair.full_q).sum(-1)),
        "teacher_entropy": shaped(-_p_log_p(own).sum(-1)),
        "agreement": shaped(rows.x.argmax(-1) == dense.argmax(-1)),
        **at_label,
    }


def distill_backward(
    grad_soft: Array,
    grad_hard: Array,
    student: Array,
    teacher: Any,
    labels: Array | None = None,
    *,
    divergence: str | Divergence = "forward_kl",
    student_transform: Transform = Transform(),
    teacher_transform: Transform = Transform(),
    scale_by_temperature: bool = True,
    label_smoothing: float = 0.0,
    **options: Any,
) -> dict[str, Array]:
    """Gradients of Σ_i grad_soft_i·soft_i + grad_hard_i·hard_i; those of temperatures and weights per row."""
    divergence = named(divergence)
    rows = distill_rows(
        student,
        teacher,
        labels,
        divergence=divergence,
        student_transform=student_transform,
        teacher_transform=teacher_transform,
        scale_by_temperature=scale_by_temperature,
        label_smoothing=label_smoothing,
        **options,
    )
    x, ts, tt, lead = rows.x, rows.ts, rows.tt, student.shape[:-1]
    gs, gh = np.where(rows.keep, grad_soft.reshape(-1), 0.0), np.where(rows.labelled, grad_hard.reshape(-1), 0.0)
    pair = rows.pair(ts, tt)
    value, du, h = evaluate(divergence, pair.p, pair.q, pair.label)
    nkd = divergence.name == "nkd"
    f = gs * (ts**2 if scale_by_temperature else np.ones_like(ts)) * (divergence.gamma if nkd else 1.0)
    du = back_to_student(pair, du, rows.topk)
    dys, slope, dws = back_to_teachers(pair, h, rows.ys, tt, rows.weights, rows.topk)
    dx, dys, dws = (f / ts)[:, None] * du, [f[:, None] * dy for dy in dys], f[:, None] * dws
    dts, dtt = -f * (du * x).sum(-1) / ts**2, f * slope
    if scale_by_temperature:
        dts = dts + 2 / ts * f * value
    if nkd:
        ones = np.ones_like(ts)
        pair = rows.pair(ones, ones)
        _, du, h = first_of_nkd(pair.p, pair.q, pair.label)
        dx = dx + gs[:, None] * back_to_student(pair, du, rows.topk)
        more, _, more_w = back_to_teachers(pair, h, rows.ys, ones, rows.weights, rows.topk)
        dys, dws = [a + gs[:, None] * b for a, b in zip(dys, more, strict=True)], dws + gs[:, None] * more_w
    if rows.label is not None:
        classes = x.shape[-1]
        target = (1 - label_smoothing) * np.eye(classes)[rows.label] + label_smoothing / classes
        dx = dx + gh[:, None] * (softmax(x) - target)
    grads = {
        "student": student_transform.backward(rows.z, dx).reshape(student.shape),
        "temperature": dts.reshape(lead),
        "teacher_temperature": dtt.reshape(lead),
    }
    shaped = [
        teacher_transform.backward(t, dy).reshape(*lead, t.shape[-1]) for t, dy in zip(rows.teachers, dys, strict=True)
    ]
    if isinstance(teacher, list):
        grads.update({f"teacher[{k}]": g for k, g in enumerate(shaped)})
    else:
        grads["teacher" if rows.topk is None else "teacher.values"] = shaped[0]
    given = options.get("teacher_weights")
    if given is not None:  # w = given / Σ given
        total = np.broadcast_to(given, (*lead, len(dys))).reshape(dws.shape).sum(-1, keepdims=True)
        dgiven = (dws - (rows.weights * dws).sum(-1, keepdims=True)) / total
        grads["teacher_weights"] = dgiven.sum(0) if given.ndim == 1 else dgiven.reshape(given.shape)
    return grads


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
    teacher: Array | None,
    labels: Array | None = None,
    *,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    weight: Array | None = None,
    reduction: str = "mean",
    normalizer: Any = None,
    return_parts: bool = False,
    grad_output: Array | float = 1.0,
    **options: Any,
) -> tuple[Any, dict[str, Array]]:
    """The loss (or a dict of it and its parts) and its gradients; ``temperature`` has that of both sides in one."""
    if teacher is None:  # any, of weight 0
        teacher, options["teacher_transform"] = student, options.get("student_transform", Transform())
    rows = distill_rows(student, teacher, labels, **options)
    lead = student.shape[:-1]
    of_soft, of_hard = _both_factors(rows, weight, reduction, normalizer)

    def reduced(per_row: Array) -> Array:
        return per_row.reshape(lead) if reduction == "none" else np.asarray(per_row.sum())

    loss: Any = reduced(soft_weight * of_soft * rows.soft + hard_weight * of_hard * rows.hard)
    if return_parts:
        values = distill_terms(student, teacher, labels, **options)
        parts = {name: values[name] for name in ("soft", "student_entropy", "teacher_entropy") if soft_weight != 0}
        loss = {"loss": loss, **{name: reduced(of_soft * np.reshape(v, -1)) for name, v in parts.items()}}
        loss["hard"] = reduced(of_hard * rows.hard) if hard_weight != 0 else np.zeros_like(loss["loss"])
    upstream = np.broadcast_to(np.asarray(grad_output, np.float64), lead if reduction == "none" else ()).reshape(-1)
    soft_up, hard_up = of_soft * upstream, of_hard * upstream
    grads = distill_backward(soft_weight * soft_up, hard_weight * hard_up, student, teacher, labels, **options)
    if options.get("teacher_temperature") is None:
        grads["temperature"] = grads["temperature"] + grads.pop("teacher_temperature")
    for side in ("temperature", "teacher_temperature"):
        if side in grads and np.ndim(options.get(side, 1.0)) == 0:
            grads[side] = np.asarray(grads[side].sum())
    one_soft, one_hard = _both_factors(rows, None, reduction, normalizer)
    of_weight = soft_weight * one_soft * rows.soft + hard_weight * one_hard * rows.hard
    grads["weight"] = (of_weight * upstream).reshape(lead)
    grads["soft_weight"] = np.asarray((soft_up * rows.soft).sum())
    grads["hard_weight"] = np.asarray((hard_up * rows.hard).sum())
    totals = soft_weight * grads["soft_weight"], hard_weight * grads["hard_weight"]
    if isinstance(normalizer, tuple):
        for k, (total, by) in enumerate(zip(totals, normalizer, strict=True)):
            grads[f"normalizer[{k}]"] = np.asarray(-total / by)
    elif normalizer is not None:
        grads["normalizer"] = np.asarray(-sum(totals) / normalizer)
    return loss, grads


def _both_factors(rows: Rows, weight: Array | None, reduction: str, normalizer: Any) -> tuple[Array, Array]:
    soft, hard = normalizer if isinstance(normalizer, tuple) else (normalizer, normalizer)
    of_soft = _row_factors(rows.keep, weight, reduction, soft)
    return of_soft, _row_factors(rows.labelled, weight, reduction, hard)


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
    teacher_logits: Array | None,
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
    absent_pool_weights: str = "infinite",
    pool_weight: float = 0.0,
    mask: Array | None = None,
    weight: Array | None = None,
    reduction: str = "mean",
    normalizer: Any = None,
    **options: Any,
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The fields of MFDOutput, and the gradients of (the sum of) ``loss``."""
    pool = {"bias": bias, "temperature": pool_temperature, "present": present, "scale": pool_scale}
    pooled, a, _ = modal_pool(features, query, **pool)
    logits = pooled @ head_weight.T + (0.0 if head_bias is None else head_bias)
    teacher_logits = logits if teacher_logits is None else teacher_logits
    rows = distill_rows(logits, teacher_logits, labels, mask=mask, **options)
    keep = rows.keep
    factor, of_hard = _both_factors(rows, weight, reduction, normalizer)

    feature, dfeature = np.zeros(len(keep)), np.zeros_like(pooled)
    if teacher_features is not None:
        safe = np.where(keep[:, None], teacher_features, 1.0)
        feature, dfeature = feature_rows(pooled, safe, feature_kind)
        feature = np.where(keep, feature, 0.0)
    modality, da = np.zeros(len(keep)), np.zeros_like(a)
    if teacher_pool_weights is not None:
        target = np.where(keep[:, None], teacher_pool_weights, 0.0)
        if absent_pool_weights == "renormalize" and present is not None:
            target = np.where(present, target, 0.0)
            total = target.sum(-1, keepdims=True)
            target = target / np.where(total == 0, 1.0, total)
        on = target > 0
        safe_a = np.where(on, a, 1.0)
        modality = (target * (np.log(np.where(on, target, 1.0)) - np.log(safe_a))).sum(-1)
        da = np.where(on, -target / safe_a, 0.0)
    others = soft_weight * rows.soft + feature_weight * feature + pool_weight * np.where(keep, modality, 0.0)
    per_row = factor * others + of_hard * hard_weight * rows.hard

    def reduced(value: Array) -> Array:
        return value if reduction == "none" else np.asarray(value.sum())

    out = {
        "loss": reduced(per_row),
        "soft": reduced(factor * rows.soft * (soft_weight != 0)),
        "hard": reduced(of_hard * rows.hard),
        "feature": reduced(factor * feature),
        "weights": np.where(keep[:, None], a, 0.0),
        "predictions": np.where(keep, logits.argmax(-1), -1),
    }
    dz = distill_backward(
        soft_weight * factor, hard_weight * of_hard, logits, teacher_logits, labels, mask=mask, **options
    )["student"]
    dy = dz @ head_weight + (factor * feature_weight)[:, None] * dfeature
    _, _, grads = modal_pool(features, query, grad_pooled=dy, grad_weights=(factor * pool_weight)[:, None] * da, **pool)
    grads["head_weight"], grads["head_bias"] = dz.T @ pooled, dz.sum(0)
    return out, grads
