"""Samples of the row losses for every divergence, TopK teachers, several teachers and standardised logits."""

from __future__ import annotations

from typing import Any

import torch

import mfd_fast as mfd
from mfd_fast.testing import distill_inputs

#: One object of every divergence, away from its end points.
DIVERGENCES: dict[str, mfd.Divergence] = {
    d.name: d
    for d in (
        mfd.ForwardKL(),
        mfd.CrossEntropy(),
        mfd.ReverseKL(),
        mfd.JSD(0.3),
        mfd.SkewKL(),
        mfd.SkewReverseKL(),
        mfd.TVD(),
        mfd.AlphaBeta(0.6, 0.3),
        mfd.DKD(0.7, 2.0),
        mfd.NKD(0.8),
    )
}
#: What a backend may have; a sample belongs to one of them, and to "forward_kl" if to no other.
FEATURES = frozenset({*DIVERGENCES, "topk", "teachers", "standardize"})
#: Samples that distill_terms leaves out: it differs in nothing that depends on them.
LOSS_ONLY = ("reverse_kl", "skew_kl", "skew_reverse_kl", "tvd", "alpha_beta", "alpha_beta_limit", "topk_logits")


def feature(sample: str) -> str:
    """Of the name of a sample."""
    return next((f for f in sorted(FEATURES, key=len, reverse=True) if sample.startswith(f)), "forward_kl")


def samples(dtype: torch.dtype, distance: str, seed: int, rows: int, classes: int) -> dict[str, dict[str, Any]]:
    base = distill_inputs((rows, classes), distance=distance, dtype=dtype, seed=seed)
    second = distill_inputs((rows, classes), dtype=dtype, seed=seed + 500)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    rng = torch.Generator().manual_seed(2000 + seed)

    def uniform(*shape: int, low: float = 0.5, high: float = 2.0) -> torch.Tensor:
        return (low + (high - low) * torch.rand(shape, generator=rng, dtype=torch.float64)).to(acc)

    mask = torch.ones(rows, dtype=torch.bool)
    mask[1:2] = False
    both: dict[str, Any] = {"student": base.student, "teacher": base.teacher}
    labelled = {**both, "labels": base.labels, "mask": mask}
    per_row = {"temperature": uniform(rows, high=4.0), "weight": uniform(rows), "reduction": "none"}
    shared = {"temperature": torch.tensor(1.7, dtype=acc), "hard_weight": 0.5, "soft_weight": 0.8}

    k = min(max(classes // 2, 1), 1024)
    log_p = torch.log_softmax(base.teacher.double(), -1)
    values, indices = log_p.topk(k, -1)
    if rows:  # unordered, and the label is not always the first
        order = torch.randperm(k, generator=rng)
        values, indices = values[:, order], indices[:, order]
    values = values.to(acc if dtype == torch.float64 else dtype)
    listed = {"labels": indices[:, 0].clone(), "mask": mask}

    def sparse(tail: str, values_are: str = "logprobs") -> mfd.TopK:
        given = values if values_are == "logprobs" else base.teacher.gather(-1, indices)
        return mfd.TopK(given, indices, tail=tail, values_are=values_are)

    # Lists of K, K − 1, … classes, of which the label is always one.
    candidates = torch.arange(k) < k - torch.arange(rows)[:, None] % k

    def padded(given: torch.Tensor, by: float) -> torch.Tensor:
        return given.masked_fill(~candidates, by)

    # TVD's slope is the sign of p − q, which has no meaning below the resolution of float32.
    apart = distill_inputs(
        (rows, classes), distance="near" if distance == "almost" else distance, dtype=dtype, seed=seed
    )
    two = {"student": base.student, "teacher": [base.teacher, second.teacher]}
    standard = mfd.LogitTransform(standardize=True)
    return {
        "cross_entropy": {**labelled, **shared, "divergence": "cross_entropy"},
        "reverse_kl": {**both, **per_row, "divergence": "reverse_kl"},
        "jsd": {**labelled, **shared, "divergence": DIVERGENCES["jsd"]},
        "skew_kl": {**both, **per_row, "divergence": DIVERGENCES["skew_kl"]},
        "skew_reverse_kl": {**labelled, **shared, "divergence": DIVERGENCES["skew_reverse_kl"]},
        "tvd": {"student": apart.student, "teacher": apart.teacher, **per_row, "divergence": "tvd"},
        "alpha_beta": {**labelled, **shared, "divergence": DIVERGENCES["alpha_beta"]},
        "alpha_beta_limit": {**both, **per_row, "divergence": mfd.AlphaBeta(0.5, 0.0)},
        "dkd": {**labelled, **per_row, "divergence": DIVERGENCES["dkd"]},
        "nkd": {**labelled, **shared, "divergence": DIVERGENCES["nkd"]},
        "topk_bucket": {**listed, **per_row, "student": base.student, "teacher": sparse("bucket"), "divergence": "dkd"},
        "topk_renormalize": {
            **listed,
            **shared,
            "student": base.student,
            "teacher": sparse("renormalize"),
            "divergence": "nkd",
        },
        "topk_padded": {
            **listed,
            **per_row,
            "student": base.student,
            "teacher": mfd.TopK(padded(values, torch.nan), padded(indices, -1), mask=candidates),
            "divergence": "cross_entropy",
        },
        "topk_zero": {"student": base.student, "teacher": sparse("zero"), "mask": mask, **per_row},
        "topk_logits": {
            **listed,
            **shared,
            "student": base.student,
            "teacher": sparse("renormalize", "logits"),
            "divergence": "jsd",
        },
        "teachers": {**two, **shared, "labels": base.labels, "teacher_weights": uniform(2)},
        "teachers_per_row": {**two, **per_row, "divergence": "jsd", "teacher_weights": uniform(rows, 2)},
        "standardize": {**labelled, **shared, "student_transform": standard, "teacher_transform": standard},
    }
