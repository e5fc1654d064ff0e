"""Calls that have plans: their arguments, and for each argument another value that must miss the plan."""

import torch

import mfd_fast as mfd
from mfd_fast.testing import assert_bitwise_equal


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors_in(value):
    """Those of nested lists and tuples, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (list, tuple)) else []


def assert_same_bits(a, b):
    """Of two lists of tensors or None."""
    for one, other in zip(a, b, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_bitwise_equal(one.detach(), other.detach())


def logits():
    return {"student": random(6, 5).requires_grad_(), "teacher": random(6, 5, seed=1)}


def labelled():
    return logits() | {
        "labels": torch.tensor([0, 1, 2, -100, 4, 0]),
        "mask": torch.tensor([True, True, True, False, True, True]),
        "weight": random(6, seed=2).abs(),
        "hard_weight": 0.5,
        "temperature": 2.0,
        "teacher_temperature": 3.0,
    }


def with_parts():
    return labelled() | {"ignored_labels": "term", "return_parts": True}


def taps():
    return {
        "student": [random(4, 3).requires_grad_(), random(2, 3, 5).requires_grad_()],
        "teacher": [random(4, 3, seed=1), random(2, 3, 5, seed=2)],
        "mask": [torch.tensor([True, True, False, True]), None],
        "weight": [1.5, 0.5],
    }


def modalities():
    return {
        "features": [random(4, 3).requires_grad_(), random(4, 3, seed=1).requires_grad_()],
        "query": random(3, seed=2).requires_grad_(),
        "bias": random(2, seed=3).requires_grad_(),
        "present": torch.tensor([[True, True], [False, True], [True, True], [False, False]]),
        "temperature": 2.0,
        "scale": 0.5,
    }


def stacked():
    return {
        "features": random(2, 4, 2, 3).requires_grad_(),
        "scores": random(2, 4, 2, seed=1).requires_grad_(),
        "bias": random(2, seed=2).requires_grad_(),
    }


def head():
    rows = labelled()
    return {
        "features": [random(6, 3).requires_grad_(), random(6, 3, seed=11).requires_grad_()],
        "query": random(3, seed=12).requires_grad_(),
        "bias": random(2, seed=13).requires_grad_(),
        "head_weight": random(5, 3, seed=14).requires_grad_(),
        "head_bias": random(5, seed=15).requires_grad_(),
        "teacher_logits": rows["teacher"],
        "teacher_features": random(6, 3, seed=16),
        "teacher_pool_weights": random(6, 2, seed=17).softmax(-1),
        "present": torch.tensor([[True, True]] * 3 + [[False, True]] * 2 + [[False, False]]),
        "feature_weight": 0.5,
        "pool_weight": 0.25,
        **{name: rows[name] for name in ("labels", "mask", "weight", "hard_weight", "temperature")},
    }


#: Calls that leave plans, and changes to each of which everyone makes another call.
CALLS = {
    "distill_loss": (
        mfd.distill_loss,
        labelled,
        {
            "student": lambda: random(6, 5, dtype=torch.float64).requires_grad_(),
            "teacher": lambda: random(6, 5, dtype=torch.bfloat16),
            "labels": lambda: torch.tensor([0, 1, 2, 3, 4, 0]),
            "divergence": lambda: mfd.JSD(0.25),
            "temperature": lambda: 4.0,
            "teacher_temperature": lambda: None,
            "soft_weight": lambda: 0.25,
            "hard_weight": lambda: 0.0,
            "label_smoothing": lambda: 0.125,
            "mask": lambda: None,
            "weight": lambda: random(6, seed=3).abs(),
            "ignore_index": lambda: 4,
            "ignored_labels": lambda: "term",
            "return_parts": lambda: True,
            "student_transform": lambda: mfd.LogitTransform(scale=2.0),
            "teacher_transform": lambda: mfd.LogitTransform(softcap=3.0),
            "scale_by_temperature": lambda: False,
            "reduction": lambda: "sum",
            "normalizer": lambda: 2.5,
            "backend": lambda: "cpu",
        },
    ),
    "distill_loss with its parts": (
        mfd.distill_loss,
        with_parts,
        {
            "student": lambda: random(6, 5, dtype=torch.bfloat16).requires_grad_(),
            "labels": lambda: torch.tensor([-100, 1, -100, 3, 4, 0]),
            "soft_weight": lambda: 0.0,
            "hard_weight": lambda: 0.0,
            "weight": lambda: None,
            "ignored_labels": lambda: "row",
            "reduction": lambda: "sum",
            "normalizer": lambda: 2.5,
            "return_parts": lambda: False,
        },
    ),
    "feature_loss": (
        mfd.feature_loss,
        taps,
        {
            "student": lambda: [random(4, 3, seed=9).requires_grad_(), random(2, 3, 5).requires_grad_()],
            "teacher": lambda: [random(4, 3), random(2, 3, 5).bfloat16()],
            "kind": lambda: "smooth_l1",
            "mask": lambda: [torch.tensor([True, True, False, False]), torch.ones(2, 3, dtype=torch.bool)],
            "weight": lambda: [0.0, 3.0],
            "projector": lambda: [random(3, 3), None],
            "reduction": lambda: "sum",
            "backend": lambda: "cpu",
        },
    ),
    "modal_pool": (
        mfd.modal_pool,
        modalities,
        {
            "features": lambda: [random(4, 3, seed=9).requires_grad_(), random(4, 3).requires_grad_()],
            "query": lambda: random(3, seed=7).requires_grad_(),
            "bias": lambda: random(2, seed=7),
            "temperature": lambda: 0.5,
            "present": lambda: torch.tensor([[True, True], [False, True], [True, False], [False, False]]),
            "scale": lambda: 2.0,
            "backend": lambda: "cpu",
        },
    ),
    "modal_pool of stacked features": (
        mfd.modal_pool,
        stacked,
        {
            "features": lambda: random(2, 4, 2, 3, seed=9).requires_grad_(),
            "scores": lambda: random(2, 4, 2, seed=8),
            "bias": lambda: None,
            "temperature": lambda: 0.5,
        },
    ),
    "mfd_loss": (
        mfd.mfd_loss,
        head,
        {
            "features": lambda: [random(6, 3, seed=21).requires_grad_(), random(6, 3).requires_grad_()],
            "query": lambda: None,
            "head_weight": lambda: random(5, 3, seed=22).requires_grad_(),
            "head_bias": lambda: None,
            "teacher_logits": lambda: random(6, 5, seed=23).bfloat16(),
            "labels": lambda: torch.tensor([4, 3, 2, 1, 0, 0]),
            "teacher_features": lambda: random(6, 3, seed=24),
            "present": lambda: None,
            "bias": lambda: random(2, seed=25),
            "pool_temperature": lambda: 0.5,
            "pool_scale": lambda: 2.0,
            "divergence": lambda: "reverse_kl",
            "temperature": lambda: 3.0,
            "soft_weight": lambda: 0.0,
            "hard_weight": lambda: 0.75,
            "feature_weight": lambda: 0.25,
            "feature_kind": lambda: "cosine",
            "teacher_pool_weights": lambda: random(6, 2, seed=26).softmax(-1),
            "pool_weight": lambda: 0.0,
            "mask": lambda: None,
            "weight": lambda: random(6, seed=27).abs(),
            "ignore_index": lambda: 4,
            "ignored_labels": lambda: "term",
            "absent_pool_weights": lambda: "renormalize",
            "label_smoothing": lambda: 0.25,
            "scale_by_temperature": lambda: False,
            "reduction": lambda: "sum",
            "normalizer": lambda: 2.0,
            "backend": lambda: "cpu",
        },
    ),
    "mfd_loss of a large batch": (
        mfd.mfd_loss,
        lambda: {
            "features": random(70, 2, 16).requires_grad_(),
            "query": None,
            "head_weight": random(20, 16, seed=1).requires_grad_(),
            "head_bias": None,
            "teacher_logits": random(70, 20, seed=2),
        },
        {"temperature": lambda: 3.0, "divergence": lambda: mfd.JSD(0.25)},
    ),
}
