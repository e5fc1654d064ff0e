"""One record per public op; every property test runs over these records."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import eager
import op_db_divergences
import op_db_linear
import op_errors
import pytest
import torch
from harness import Arguments, OpRecord
from torch import Tensor

import mfd_fast as mfd
from mfd_fast.testing import distill_inputs, modal_inputs

#: What the row losses of each backend have, beside the forward KL of dense logits.
BACKEND_FEATURES = {
    "reference": op_db_divergences.FEATURES,
    "cpu": op_db_divergences.FEATURES,
    "triton": op_db_divergences.FEATURES,
    "cuda": op_db_divergences.FEATURES,
}


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _uniform(shape: tuple[int, ...], low: float, high: float, seed: int, dtype: torch.dtype) -> Tensor:
    rng = torch.Generator().manual_seed(1000 + seed)
    return (low + (high - low) * torch.rand(shape, generator=rng, dtype=torch.float64)).to(_accumulation(dtype))


def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=_accumulation(dtype))


_HARD_ALONE: Arguments = {"soft_weight": 0.0, "hard_weight": 1.0}


def distill_loss_samples(
    dtype: torch.dtype = torch.float32,
    distance: str = "far",
    seed: int = 0,
    rows: int = 6,
    classes: int = 11,
) -> dict[str, Arguments]:
    base = distill_inputs((rows, classes), distance=distance, dtype=dtype, seed=seed)
    both: Arguments = {"student": base.student, "teacher": base.teacher}
    labels = base.labels.clone()
    labels[rows // 2 : rows // 2 + 1] = -100
    mask = torch.ones(rows, dtype=torch.bool)
    mask[1:2] = False
    weight = _uniform((rows,), 0.1, 2.0, seed, dtype)

    lead = distill_inputs(
        (2, rows // 2, classes),
        distance=distance,
        dtype=dtype,
        teacher_dtype=_accumulation(dtype),
        seed=seed,
    )
    wide = distill_inputs((rows, classes + 3), distance=distance, dtype=dtype, seed=seed)
    return {
        "plain": {**both, "temperature": 2.0},
        "labels": {
            **both,
            "labels": labels,
            "temperature": 3.0,
            "soft_weight": 0.7,
            "hard_weight": 0.3,
            "label_smoothing": 0.1,
            "mask": mask,
            "weight": weight,
        },
        "per_row": {
            **both,
            "labels": base.labels,
            "temperature": _uniform((rows,), 0.5, 4.0, seed + 1, dtype),
            "teacher_temperature": _scalar(1.5, dtype),
            "hard_weight": 0.5,
            "weight": weight,
            "reduction": "none",
        },
        "shared_temperature": {
            **both,
            "labels": labels,
            "temperature": _scalar(1.7, dtype),
            "soft_weight": _scalar(0.6, dtype),
            "hard_weight": _scalar(0.4, dtype),
            "scale_by_temperature": False,
            "reduction": "sum",
        },
        "transforms": {
            "student": wide.student,
            "teacher": base.teacher,
            "labels": base.labels,
            "student_transform": mfd.LogitTransform(scale=0.5, softcap=4.0, classes=classes),
            "teacher_transform": mfd.LogitTransform(softcap=3.0),
            "temperature": 1.3,
            "hard_weight": 0.5,
            "normalizer": _scalar(7.0, dtype),
        },
        "leading": {
            "student": lead.student,
            "teacher": lead.teacher,
            "mask": mask[: 2 * (rows // 2)].reshape(2, rows // 2),
            "temperature": 4.0,
        },
        "ignored_term": {
            **both,
            "labels": labels,
            "temperature": 2.0,
            "soft_weight": 0.7,
            "hard_weight": 0.3,
            "label_smoothing": 0.1,
            "mask": mask,
            "weight": weight,
            "ignored_labels": "term",
            "return_parts": True,
        },
        "normalizers": {
            **both,
            "labels": labels,
            "hard_weight": _scalar(0.4, dtype),
            "ignored_labels": "term",
            "normalizer": (_scalar(7.0, dtype), _scalar(3.0, dtype)),
            "return_parts": True,
        },
        "no_teacher": {"student": base.student, "teacher": None, "labels": labels, **_HARD_ALONE},
        "hard_only": {**both, "labels": labels, **_HARD_ALONE},
        **op_db_divergences.samples(dtype, distance, seed, rows, classes),
    }


_LOSS_ONLY = ("soft_weight", "hard_weight", "weight", "reduction", "normalizer", "return_parts")


def distill_terms_samples(**options: Any) -> dict[str, Arguments]:
    samples = distill_loss_samples(**options)
    for name in ("hard_only", "no_teacher", "normalizers", *op_db_divergences.LOSS_ONLY):
        del samples[name]
    return {name: {k: v for k, v in s.items() if k not in _LOSS_ONLY} for name, s in samples.items()}


def modal_pool_samples(
    dtype: torch.dtype = torch.float32, distance: str = "far", seed: int = 0, rows: int = 6, classes: int = 11
) -> dict[str, Arguments]:
    features, query, bias, present = modal_inputs(rows, 3, classes, dtype=dtype, seed=seed)
    present[:1] = False
    half = rows // 2
    scores = _uniform((rows, 3), -2.0, 2.0, seed, dtype).to(dtype)
    return {
        "query": {"features": features, "query": query},
        "average": {"features": torch.stack(features, 1), "bias": bias, "temperature": 0.5},
        "scores": {
            "features": features,
            "scores": scores,
            "present": present,
            "temperature": _uniform((rows,), 0.5, 2.0, seed, dtype),
        },
        "everything": {
            "features": [f[: 2 * half].reshape(2, half, classes) for f in features],
            "query": query,
            "bias": bias,
            "present": present[: 2 * half].reshape(2, half, 3),
            "temperature": _scalar(0.8, dtype),
            "scale": 0.3,
        },
    }


def feature_loss_samples(
    dtype: torch.dtype = torch.float32, distance: str = "far", seed: int = 0, rows: int = 6, classes: int = 11
) -> dict[str, Arguments]:
    first = distill_inputs((rows, classes), distance=distance, dtype=dtype, spread=1.0, seed=seed)
    second = distill_inputs((2, rows, 5), distance=distance, dtype=dtype, spread=1.0, seed=seed + 1)
    one = {"student": first.student, "teacher": first.teacher}
    mask = torch.ones(rows, dtype=torch.bool)
    mask[1:3] = False
    projector = _uniform((classes, 5), -0.5, 0.5, seed, dtype).to(dtype)
    wide = distill_inputs((2, rows, classes), dtype=dtype, spread=1.0, seed=seed + 2)
    return {
        "mse": {**one, "mask": mask},
        "smooth_l1": {**one, "kind": "smooth_l1", "weight": 0.5, "reduction": "sum"},
        "cosine": {**one, "kind": "cosine", "mask": mask, "reduction": "none"},
        "taps": {
            "student": [first.student, second.student],
            "teacher": [first.teacher, wide.teacher],
            "projector": [None, projector],
            "weight": _uniform((2,), 0.5, 2.0, seed, dtype),
        },
    }


def mfd_loss_samples(
    dtype: torch.dtype = torch.float32, distance: str = "far", seed: int = 0, rows: int = 6, classes: int = 11
) -> dict[str, Arguments]:
    width = 5
    features, query, bias, present = modal_inputs(rows, 3, width, dtype=dtype, seed=seed)
    logits = distill_inputs((rows, classes), dtype=dtype, spread=1.0, seed=seed)
    head = _uniform((classes, width), -1.0, 1.0, seed, dtype).to(dtype)
    head_bias = _uniform((classes,), -1.0, 1.0, seed + 1, dtype).to(dtype)
    present[:, 0] = True
    plain = {
        "features": features,
        "query": query,
        "head_weight": head,
        "head_bias": head_bias,
        "teacher_logits": logits.teacher,
    }
    mask = torch.ones(rows, dtype=torch.bool)
    mask[1:2] = False
    shares = torch.where(present, _uniform((rows, 3), 0.1, 1.0, seed + 2, dtype), 0)
    pool_target = shares / shares.sum(-1, keepdim=True)
    every = {
        **plain,
        "labels": logits.labels,
        "teacher_features": _uniform((rows, width), -1.0, 1.0, seed + 3, dtype).to(dtype),
        "present": present,
        "bias": bias,
        "pool_temperature": 0.7,
        "pool_scale": 0.5,
        "temperature": 2.0,
        "soft_weight": 0.8,
        "hard_weight": 0.4,
        "feature_weight": 0.3,
        "teacher_pool_weights": pool_target,
        "pool_weight": 0.2,
        "mask": mask,
        "weight": _uniform((rows,), 0.1, 2.0, seed + 4, dtype),
        "label_smoothing": 0.1,
    }
    return {
        "plain": {**plain, "temperature": 2.0},
        "everything": every,
        "per_row": {**every, "feature_kind": "cosine", "reduction": "none"},
        "ignored_term": {
            **every,
            "labels": torch.where(torch.arange(rows) % 3 == 2, -100, logits.labels),
            "ignored_labels": "term",
            "teacher_pool_weights": torch.softmax(_uniform((rows, 3), -1.0, 1.0, seed + 5, dtype), -1),
            "absent_pool_weights": "renormalize",
        },
        "no_teacher": {**plain, "teacher_logits": None, "labels": logits.labels, **_HARD_ALONE},
    }


def _loss(result: Tensor | mfd.DistillOutput) -> dict[str, Tensor]:
    return {"loss": result} if isinstance(result, Tensor) else _fields(result)


def _fields(result: Any) -> dict[str, Tensor]:
    return {k: v for k, v in result._asdict().items() if v is not None}


_ROW_ARGUMENTS = ("student", "teacher", "temperature", "teacher_temperature", "teacher_weights")

RECORDS = {
    r.name: r
    for r in (
        OpRecord(
            op=mfd.distill_loss,
            eager=eager.distill_loss,
            samples=distill_loss_samples,
            differentiable=(*_ROW_ARGUMENTS, "weight", "soft_weight", "hard_weight", "normalizer"),
            outputs=_loss,
            errors=op_errors.distill_loss,
            registered=("distill_loss", "distill_rows", "distill_rows_backward"),
        ),
        OpRecord(
            op=mfd.distill_terms,
            eager=eager.distill_terms,
            samples=distill_terms_samples,
            differentiable=_ROW_ARGUMENTS,
            outputs=_fields,
            errors=op_errors.distill_terms,
            registered=("distill_rows", "distill_rows_backward"),
        ),
        OpRecord(
            op=mfd.linear_distill_loss,
            eager=eager.linear_distill_loss,
            samples=op_db_linear.samples,
            differentiable=(*op_db_linear.HEADS, "temperature", "teacher_temperature", "weight", "normalizer"),
            outputs=_fields,
            errors=op_errors.linear_distill_loss,
            registered=("linear_distill_loss", "linear_distill_rows", "linear_distill_rows_backward"),
        ),
        OpRecord(
            op=mfd.modal_pool,
            eager=eager.modal_pool,
            samples=modal_pool_samples,
            differentiable=("features", "query", "scores", "bias", "temperature"),
            outputs=_fields,
            errors=op_errors.modal_pool,
            registered=("modal_pool", "modal_pool_backward"),
        ),
        OpRecord(
            op=mfd.feature_loss,
            eager=eager.feature_loss,
            samples=feature_loss_samples,
            differentiable=("student", "teacher", "projector", "weight"),
            outputs=_loss,
            errors=op_errors.feature_loss,
            registered=("feature_distances", "feature_distances_backward"),
        ),
        OpRecord(
            op=mfd.mfd_loss,
            eager=eager.mfd_loss,
            samples=mfd_loss_samples,
            differentiable=("features", "query", "bias", "head_weight", "head_bias", "teacher_logits", "weight"),
            outputs=_fields,
            errors=op_errors.mfd_loss,
        ),
    )
}


def samples_on(record: OpRecord, backend: str) -> list[str]:
    """The samples that ``backend`` has kernels for; which those are is checked in test_divergences."""
    return [name for name in record.samples() if op_db_divergences.feature(name) in BACKEND_FEATURES[backend]]


#: (record, backend) for ``parametrize``, with readable ids.
CASES = [(record, backend) for record in RECORDS.values() for backend in record.backends]
CASE_IDS = [f"{record.name}-{backend}" for record, backend in CASES]
SAMPLE_CASES = [(record, backend, name) for record, backend in CASES for name in samples_on(record, backend)]
SAMPLE_IDS = [f"{record.name}-{backend}-{name}" for record, backend, name in SAMPLE_CASES]


def crossed(cases: list[tuple[Any, ...]], *axes: Iterable[Any]) -> list[Any]:
    """``pytest.param`` of every case with every combination of the axes' values.

    Interpreted kernels are slow: for them the values of the last axis take turns from case to case and from one
    combination of the other axes to the next. So every sample, hence every divergence and every option, is still
    there, and so is every value of every axis.
    """
    *others, last = [list(axis) for axis in axes]
    found = []
    for i, case in enumerate(cases):
        names = [getattr(part, "name", part) for part in case]
        for j, chosen in enumerate(itertools.product(*others)):
            turn = last[(i + j) % len(last)]
            for value in [turn] if "triton" in case else last:
                values = (*chosen, value)
                found.append(pytest.param(*case, *values, id="-".join(map(str, (*names, *values)))))
    return found


#: The same of distill_loss on the backends that have kernels: the gradient of the student comes from the forward pass.
KERNEL_CASES = [
    (backend, name) for backend in ("cpu", "cuda", "triton") for name in samples_on(RECORDS["distill_loss"], backend)
]
