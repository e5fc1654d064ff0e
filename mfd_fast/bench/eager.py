"""What one writes in PyTorch without this library: the baseline, and the source that torch.compile gets.

Each function takes what the public op of its name takes, in the dtype of the inputs, and no option of it that a
workload does not use. Formulas as in :mod:`mfd_fast.reference`, which also serves cases that nobody writes by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Exponents of the measured "alpha_beta", which has no default ones: no limit, and a degree other than 1.
ALPHA_BETA = (0.6, 0.3)

Rows = Callable[[Tensor, Tensor, "Tensor | None", float], Tensor]


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) per row."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _mixture(log_a: Tensor, log_b: Tensor, share_of_a: float) -> Tensor:
    return torch.logaddexp(log_a + math.log(share_of_a), log_b + math.log(1 - share_of_a))


def _softened(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log q, log p."""
    return F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)


def forward_kl(student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float) -> Tensor:  # noqa: ARG001
    log_q = F.log_softmax(student / temperature, -1)
    p = F.softmax(teacher / temperature, -1)
    return temperature**2 * F.kl_div(log_q, p, reduction="none").sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float) -> Tensor:  # noqa: ARG001
    log_q, log_p = _softened(student, teacher, temperature)
    return temperature**2 * _kl(log_q, log_p)


def jsd(student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float) -> Tensor:  # noqa: ARG001
    log_q, log_p = _softened(student, teacher, temperature)
    log_m = _mixture(log_p, log_q, 0.5)
    return temperature**2 * 0.5 * (_kl(log_p, log_m) + _kl(log_q, log_m))


def skew_kl(student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float) -> Tensor:  # noqa: ARG001
    log_q, log_p = _softened(student, teacher, temperature)
    return temperature**2 * _kl(log_p, _mixture(log_p, log_q, 0.1))


def skew_reverse_kl(student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float) -> Tensor:  # noqa: ARG001
    log_q, log_p = _softened(student, teacher, temperature)
    return temperature**2 * _kl(log_q, _mixture(log_q, log_p, 0.1))


def tvd(student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float) -> Tensor:  # noqa: ARG001
    p, q = F.softmax(teacher / temperature, -1), F.softmax(student / temperature, -1)
    return temperature**2 * 0.5 * (p - q).abs().sum(-1)


def alpha_beta(student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float) -> Tensor:  # noqa: ARG001
    """The exponents of :data:`ALPHA_BETA` (Cichocki, Cruces, Amari, Entropy 13 (2011) 134)."""
    p, q = F.softmax(teacher / temperature, -1), F.softmax(student / temperature, -1)
    a, b = ALPHA_BETA
    s = a + b
    each = p**a * q**b - a / s * p**s - b / s * q**s
    return -(temperature**2) / (a * b) * each.sum(-1)


def dkd(student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """α = 1, β = 8; the mask of −1000 is the authors' own (Zhao et al., arXiv:2203.08679)."""
    assert labels is not None
    target = F.one_hot(labels, student.shape[-1]).bool()
    pair = []
    for logits in (teacher, student):
        probability = F.softmax(logits / temperature, -1)
        of_target = (probability * target).sum(-1)
        pair.append(torch.stack([of_target, (probability * ~target).sum(-1)], -1))
    target_part = F.kl_div(pair[1].log(), pair[0], reduction="none").sum(-1)
    log_q, p = (
        F.log_softmax(student / temperature - 1000.0 * target, -1),
        F.softmax(teacher / temperature - 1000.0 * target, -1),
    )
    return temperature**2 * (target_part + 8.0 * F.kl_div(log_q, p, reduction="none").sum(-1))


def nkd(student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """γ = 1.5 (Yang et al., arXiv:2303.13005)."""
    assert labels is not None
    column = labels[:, None]
    target = F.one_hot(labels, student.shape[-1]).bool()
    p_label = F.softmax(teacher, -1).gather(-1, column).squeeze(-1)
    log_q_label = F.log_softmax(student, -1).gather(-1, column).squeeze(-1)
    log_q = F.log_softmax((student / temperature).masked_fill(target, -torch.inf), -1).masked_fill(target, 0)
    p = F.softmax((teacher / temperature).masked_fill(target, -torch.inf), -1)
    return -p_label * log_q_label - 1.5 * temperature**2 * (p * log_q).sum(-1)


DIVERGENCES: dict[str, Rows] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "alpha_beta": alpha_beta,
    "dkd": dkd,
    "nkd": nkd,
}
NEED_LABELS = frozenset({"dkd", "nkd"})


def distill_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
) -> Tensor:
    loss: Tensor | None = None
    if soft_weight:
        loss = soft_weight * DIVERGENCES[divergence](student, teacher, labels, temperature).mean()
    if hard_weight:
        assert labels is not None
        hard = hard_weight * F.cross_entropy(student, labels)
        loss = hard if loss is None else loss + hard
    assert loss is not None
    return loss


def distill_terms(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    """The mean over rows of everything that :func:`mfd_fast.distill_terms` returns per row, summed."""
    assert labels is not None
    log_q, log_p = _softened(student, teacher, temperature)
    terms = temperature**2 * _kl(log_p, log_q) + F.cross_entropy(student, labels, reduction="none")
    for log_probability in (log_q.detach(), log_p):
        terms = terms - (log_probability.exp() * log_probability).sum(-1)
        terms = terms + log_probability.gather(-1, labels[:, None]).squeeze(-1).exp()
    return terms.mean()


def topk_loss(student: Tensor, values: Tensor, indices: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Forward KL over the listed classes and a bucket of the others."""
    left = torch.log1p(-values.exp().sum(-1, keepdim=True))
    log_p = F.log_softmax(torch.cat([values, left], -1) / temperature, -1)
    listed = F.log_softmax(student / temperature, -1).gather(-1, indices)
    log_q = torch.cat([listed, torch.log1p(-listed.exp().sum(-1, keepdim=True))], -1)
    return temperature**2 * _kl(log_p, log_q).mean()


def modal_pool(features: Sequence[Tensor], query: Tensor) -> Tensor:
    stacked = torch.stack(list(features), -2)
    weights = F.softmax(stacked @ query * stacked.shape[-1] ** -0.5, -1)
    return (weights.unsqueeze(-1) * stacked).sum(-2)


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], *, kind: str = "mse") -> Tensor:
    if kind == "cosine":
        return sum((1 - F.cosine_similarity(s, t, dim=-1)).mean() for s, t in zip(student, teacher, strict=True))  # type: ignore[return-value]
    distance = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}[kind]
    return sum(distance(s, t) for s, t in zip(student, teacher, strict=True))  # type: ignore[return-value]


def mfd_loss(
    features: Sequence[Tensor],
    query: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    teacher_features: Tensor,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    feature_weight: float = 0.0,
) -> Tensor:
    pooled = modal_pool(features, query)
    logits = F.linear(pooled, head_weight, head_bias)
    loss = distill_loss(
        logits, teacher_logits, labels, divergence=divergence, temperature=temperature, hard_weight=hard_weight
    )
    return loss + feature_weight * F.mse_loss(pooled, teacher_features)


def linear_distill(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    **options: float,
) -> Tensor:
    student = F.linear(student_hidden, student_weight)
    if teacher_hidden is None or teacher_weight is None:
        assert labels is not None
        return options["hard_weight"] * F.cross_entropy(student, labels)
    with torch.no_grad():
        teacher = F.linear(teacher_hidden, teacher_weight)
    return distill_loss(student, teacher, labels, **options)  # type: ignore[arg-type]
