"""What a user writes today, in the dtype of the inputs: the yardstick of the tolerance rule and nothing else."""

import eager_divergences as divergences
import torch
import torch.nn.functional as F

import mfd_fast as mfd
from mfd_fast.divergences import DIVERGENCES


def _transform(logits, transform):
    if transform is None:
        return logits
    logits = logits[..., : transform.classes] * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    if transform.standardize:
        logits = (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-7)
    return logits


def _per_row(temperature):
    return temperature.unsqueeze(-1) if isinstance(temperature, torch.Tensor) and temperature.dim() else temperature


def _compared(x, teacher, transform, teacher_weights, temperature, teacher_temperature):
    """log p and log q over the classes that are compared."""
    t, tt = _per_row(temperature), _per_row(teacher_temperature)
    if isinstance(teacher, mfd.TopK):
        return divergences.sparse_pair(x, teacher, t, tt)
    log_q = F.log_softmax(x / t, -1)
    if isinstance(teacher, torch.Tensor):
        return F.log_softmax(_transform(teacher, transform) / tt, -1), log_q
    probs = torch.stack([F.softmax(_transform(y, transform) / tt, -1) for y in teacher], -1)
    weights = torch.ones(len(teacher)) if teacher_weights is None else teacher_weights
    weights = (weights / weights.sum(-1, keepdim=True)).to(probs.dtype)
    return (probs * weights.unsqueeze(-2)).sum(-1).log(), log_q


def _rows(
    student,
    teacher,
    labels=None,
    *,
    teacher_weights=None,
    divergence="forward_kl",
    temperature=1.0,
    teacher_temperature=None,
    label_smoothing=0.0,
    mask=None,
    ignore_index=-100,
    ignored_labels="row",
    student_transform=None,
    teacher_transform=None,
    scale_by_temperature=True,
):
    if isinstance(divergence, str):
        divergence = DIVERGENCES[divergence]
    x = _transform(student, student_transform)
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    of_teacher = (teacher, teacher_transform, teacher_weights)
    log_p, log_q = _compared(x, *of_teacher, temperature, teacher_temperature)
    keep = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask
    label, labelled = None, keep
    if labels is not None:
        labelled = keep & (labels != ignore_index)
        label = torch.where(labelled, labels, 0)
        keep = keep if ignored_labels == "term" else labelled
        if isinstance(teacher, mfd.TopK) and teacher.tail != "zero":
            label = (teacher.indices == label.unsqueeze(-1)).int().argmax(-1)
    soft = divergences.divergence(divergence, log_p, log_q, label)
    if scale_by_temperature:
        soft = soft * temperature**2
    if divergence.name == "nkd":
        soft = soft + divergences.of_label(*_compared(x, *of_teacher, 1.0, 1.0), label)
    hard = torch.zeros_like(soft)
    if labels is not None:
        hard = F.cross_entropy(
            x.flatten(0, -2),
            labels.flatten(),
            reduction="none",
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        ).reshape(labels.shape)
    log_q = F.log_softmax(x / _per_row(temperature), -1)
    return torch.where(keep, soft, 0), torch.where(labelled, hard, 0), keep, labelled, log_q, log_p


def _reduce(per_row, keep, weight, reduction, normalizer):
    if weight is not None:
        per_row = torch.where(keep, weight * per_row, 0)
    if reduction == "none":
        return per_row
    if reduction == "sum":
        return per_row.sum()
    return per_row.sum() / (max(int(keep.sum()), 1) if normalizer is None else normalizer)


def distill_loss(
    student,
    teacher,
    labels=None,
    *,
    soft_weight=1.0,
    hard_weight=0.0,
    weight=None,
    reduction="mean",
    normalizer=None,
    return_parts=False,
    **options,
):
    if teacher is None:
        teacher, options["teacher_transform"] = student.detach(), options.get("student_transform")
    soft, hard, keep, labelled, _, _ = _rows(student, teacher, labels, **options)
    loss = _both(soft_weight * soft, hard_weight * hard, keep, labelled, weight, reduction, normalizer)
    if not return_parts:
        return loss
    values = distill_terms(student, teacher, labels, **options)
    of_soft, of_hard = normalizer if isinstance(normalizer, tuple) else (normalizer, normalizer)
    parts = {
        name: _reduce(values[name].detach(), keep, weight, reduction, of_soft)
        for name in ("soft", "student_entropy", "teacher_entropy")
    }
    return {"loss": loss, **parts, "hard": _reduce(hard.detach(), labelled, weight, reduction, of_hard)}


def _both(of_soft, of_hard, keep, labelled, weight, reduction, normalizer):
    """The sum of both terms, each over its own count."""
    if keep is labelled and not isinstance(normalizer, tuple):
        return _reduce(of_soft + of_hard, keep, weight, reduction, normalizer)
    soft_by, hard_by = normalizer if isinstance(normalizer, tuple) else (normalizer, normalizer)
    hard = _reduce(of_hard, labelled, weight, reduction, hard_by)
    return _reduce(of_soft, keep, weight, reduction, soft_by) + hard


def distill_terms(student, teacher, labels=None, **options):
    soft, hard, keep, labelled, log_q, log_p = _rows(student, teacher, labels, **options)
    if isinstance(teacher, mfd.TopK):
        tt = options.get("teacher_temperature", options.get("temperature", 1.0))
        own = divergences.sparse_teacher(teacher, _per_row(tt))
        log_p = divergences.dense(own[..., : teacher.values.shape[-1]], teacher, student.shape[-1])
        teacher_entropy = -(own.exp() * own.masked_fill(own == -torch.inf, 0)).sum(-1)
    else:
        teacher_entropy = -(log_p.exp() * log_p).sum(-1)
    q, p = log_q.exp(), log_p.exp()
    out = {
        "soft": soft,
        "student_entropy": torch.where(keep, -(q * log_q).sum(-1), 0),
        "teacher_entropy": torch.where(keep, teacher_entropy, 0),
    }
    if labels is not None:
        index = torch.where(labelled, labels, 0).unsqueeze(-1)
        out["hard"] = hard
        out["student_label_prob"] = torch.where(labelled, q.gather(-1, index).squeeze(-1), 0)
        out["teacher_label_prob"] = torch.where(labelled, p.gather(-1, index).squeeze(-1), 0)
    return out


def modal_pool(features, query=None, *, scores=None, bias=None, temperature=1.0, present=None, scale=None):
    x = features if isinstance(features, torch.Tensor) else torch.stack(list(features), -2)
    logits = torch.zeros(x.shape[:-1], dtype=x.dtype)
    if query is not None:
        logits = (x @ query) * (x.shape[-1] ** -0.5 if scale is None else scale)
    if scores is not None:
        logits = scores
    if bias is not None:
        logits = logits + bias
    logits = logits / _per_row(temperature)
    if present is not None:
        logits = logits.masked_fill(~present, -torch.inf)
        x = x.masked_fill(~present.unsqueeze(-1), 0)
        nothing = ~present.any(-1, keepdim=True)
        weights = torch.softmax(logits.masked_fill(nothing, 0), -1).masked_fill(nothing, 0)
    else:
        weights = torch.softmax(logits, -1)
    return {"pooled": (weights.unsqueeze(-1) * x).sum(-2).to(x.dtype), "weights": weights}


def _feature_rows(a, b, kind):
    if kind == "cosine":
        return 1 - F.cosine_similarity(a, b, dim=-1)
    loss = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}[kind]
    return loss(a, b, reduction="none").mean(-1)


def feature_loss(student, teacher, *, kind="mse", mask=None, weight=None, projector=None, reduction="mean"):
    if isinstance(student, torch.Tensor):
        student, teacher, projector = [student], [teacher], [projector]
    taps = len(student)
    weight = list(weight.unbind()) if isinstance(weight, torch.Tensor) and weight.dim() else weight
    weights = weight if isinstance(weight, (list, tuple)) else [1.0 if weight is None else weight] * taps
    total = 0.0
    for s, t, w, proj in zip(student, teacher, weights, projector or [None] * taps, strict=True):
        a = s if proj is None else s @ proj.T
        rows = _feature_rows(a, t, kind)
        count = rows.numel()
        if mask is not None:
            rows, count = torch.where(mask, rows, 0), int(mask.sum())
        each = rows if reduction == "none" else rows.sum()
        if reduction == "mean":
            each = each / count
        elif reduction == "sum" and kind != "cosine":
            each = each * a.shape[-1]
        total = total + w * each
    return total


def mfd_loss(
    features,
    query,
    head_weight,
    head_bias,
    teacher_logits,
    labels=None,
    *,
    teacher_features=None,
    present=None,
    bias=None,
    pool_temperature=1.0,
    pool_scale=None,
    soft_weight=1.0,
    hard_weight=0.0,
    feature_weight=0.0,
    feature_kind="mse",
    teacher_pool_weights=None,
    absent_pool_weights="infinite",
    pool_weight=0.0,
    weight=None,
    reduction="mean",
    normalizer=None,
    **options,
):
    pool = modal_pool(features, query, bias=bias, temperature=pool_temperature, present=present, scale=pool_scale)
    logits = F.linear(pool["pooled"], head_weight, head_bias)
    teacher_logits = logits.detach() if teacher_logits is None else teacher_logits
    soft, hard, keep, labelled, _, _ = _rows(logits, teacher_logits, labels, **options)
    soft = soft if soft_weight else torch.zeros_like(soft)
    feature = torch.zeros_like(soft)
    if teacher_features is not None:
        feature = torch.where(keep, _feature_rows(pool["pooled"], teacher_features, feature_kind), 0)
    per_row = soft_weight * soft + feature_weight * feature
    if teacher_pool_weights is not None:
        if absent_pool_weights == "renormalize":
            teacher_pool_weights = torch.where(present, teacher_pool_weights, 0)
            teacher_pool_weights = teacher_pool_weights / teacher_pool_weights.sum(-1, keepdim=True)
        on = teacher_pool_weights > 0
        log_target = torch.where(on, teacher_pool_weights, 1).log()
        log_weights = torch.where(on, pool["weights"], 1).log()
        each = teacher_pool_weights * (log_target - log_weights)
        per_row = per_row + pool_weight * torch.where(keep, each.sum(-1), 0)
    of_soft, of_hard = normalizer if isinstance(normalizer, tuple) else (normalizer, normalizer)
    terms = {"soft": soft, "feature": feature}
    out = {name: _reduce(value.detach(), keep, weight, reduction, of_soft) for name, value in terms.items()}
    out["hard"] = _reduce(hard.detach(), labelled, weight, reduction, of_hard)
    out["loss"] = _both(per_row, hard_weight * hard, keep, labelled, weight, reduction, normalizer)
    out["weights"] = torch.where(keep.unsqueeze(-1), pool["weights"].detach(), 0)
    return out


def linear_distill_loss(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    labels=None,
    *,
    student_bias=None,
    teacher_bias=None,
    soft_weight=1.0,
    hard_weight=0.0,
    weight=None,
    reduction="mean",
    normalizer=None,
    chunk_rows=None,
    **options,
):
    z = F.linear(student_hidden, student_weight, student_bias)
    t = teacher_hidden if teacher_weight is None else F.linear(teacher_hidden, teacher_weight, teacher_bias)
    soft, hard, keep, labelled, log_q, _ = _rows(z, z.detach() if t is None else t, labels, **options)
    of_soft, of_hard = normalizer if isinstance(normalizer, tuple) else (normalizer, normalizer)
    nothing = torch.zeros_like(soft)
    soft, hard = nothing if t is None else soft, hard if hard_weight else nothing
    return {
        "loss": _both(soft_weight * soft, hard_weight * hard, keep, labelled, weight, reduction, normalizer),
        "soft": _reduce(soft.detach(), keep, weight, reduction, of_soft),
        "hard": _reduce(hard.detach(), labelled, weight, reduction, of_hard),
        "student_entropy": torch.where(keep, -(log_q.exp() * log_q).sum(-1), 0).sum().detach(),
        "rows": keep.sum(),
    }
