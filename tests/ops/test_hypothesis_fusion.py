"""Differential tests of the fusion ops: any allowed call agrees with the reference in float64, and mfd_loss with
the composition of the three public ops."""

import pytest
import torch
from harness import Result, evaluate, on, to_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from op_db import RECORDS
from test_hypothesis import DTYPES, EXACT_LAYOUTS, ROOM

import mfd_fast as mfd
from mfd_fast.testing import LAYOUTS

POOL, FEATURE, MFD = (RECORDS[name] for name in ("modal_pool", "feature_loss", "mfd_loss"))


def drawer(draw):
    """Random tensors of a seed, in a drawn layout."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def tensor(shape, dtype, *, low=None, high=None, layout=True):
        if low is None:
            value = torch.randn(shape, generator=rng, dtype=torch.float64)
        else:
            value = low + (high - low) * torch.rand(shape, generator=rng, dtype=torch.float64)
        value = value.to(dtype)
        return LAYOUTS[draw(st.sampled_from(EXACT_LAYOUTS))](value) if layout else value

    def flags(shape, share):
        return torch.rand(shape, generator=rng) < share

    def number(lead, low, high, dtype):
        kind = draw(st.sampled_from(["float", "0-d", "row"]))
        if kind == "float":
            return draw(st.floats(low, high))
        return tensor(lead if kind == "row" else (), dtype, low=low, high=high, layout=False)

    return tensor, flags, number, rng


@st.composite
def pool_calls(draw):
    tensor, flags, number, _ = drawer(draw)
    lead = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    modalities, width = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 32])), draw(st.integers(1, 140))
    dtype = draw(st.sampled_from(DTYPES))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    if draw(st.booleans()):
        features = tensor((*lead, modalities, width), dtype)
    else:
        features = [tensor((*lead, width), dtype) for _ in range(modalities)]
    call = {"features": features, "temperature": number(lead, 0.3, 3.0, acc)}
    mode = draw(st.sampled_from(["query", "scores", "prior"]))
    if mode == "query":
        call["query"] = tensor((width,), dtype)
        call["scale"] = draw(st.sampled_from([None, 0.3]))
    elif mode == "scores":
        call["scores"] = tensor((*lead, modalities), draw(st.sampled_from(DTYPES[:3])))
    if mode == "prior" or draw(st.booleans()):
        call["bias"] = tensor((modalities,), dtype)
    if draw(st.booleans()):
        call["present"] = flags((*lead, modalities), 0.6)
    return call


@st.composite
def feature_calls(draw):
    tensor, flags, _, _ = drawer(draw)
    many, reduction = draw(st.booleans()), draw(st.sampled_from(["mean", "sum", "none"]))
    count = draw(st.integers(1, 4)) if many else 1
    first = tuple(draw(st.lists(st.integers(0, 4), max_size=2)))
    students, teachers, masks, projectors = [], [], [], []
    for _ in range(count):
        lead = first if reduction == "none" else tuple(draw(st.lists(st.integers(0, 4), max_size=2)))
        width, dtype, teacher_dtype = draw(st.integers(1, 70)), *(draw(st.sampled_from(DTYPES)) for _ in range(2))
        students.append(tensor((*lead, width), dtype))
        projector = draw(st.sampled_from([None, 3, 17]))
        projectors.append(None if projector is None else tensor((projector, width), dtype))
        teachers.append(tensor((*lead, projector or width), teacher_dtype))
        masks.append(flags(lead, 0.6) if draw(st.booleans()) else None)
    weights = [draw(st.sampled_from([1.0, 0.5, torch.tensor(0.25)])) for _ in range(count)]
    pick = (lambda values: values) if many else (lambda values: values[0])
    return {
        "student": pick(students),
        "teacher": pick(teachers),
        "mask": pick(masks),
        "projector": pick(projectors),
        "weight": pick(weights),
        "kind": draw(st.sampled_from(["mse", "smooth_l1", "cosine"])),
        "reduction": reduction,
    }


def agree(found, expected, coarse=None):
    if not (found.grads and expected.grads):  # a loss whose every weight is 0: no graph is a gradient of 0
        assert not any(bool(g.any()) for g in (*found.grads.values(), *expected.grads.values()))
        found, expected = Result(found.outputs), Result(expected.outputs)
    for (key, a), (_, b) in zip(found.items(), expected.items(), strict=True):
        if not a.dtype.is_floating_point:
            continue
        room = ROOM[a.dtype] if coarse is None else max(ROOM[a.dtype], coarse)
        size = 1.0 + float(b.abs().max()) if b.numel() else 1.0
        assert a.shape == b.shape, key
        torch.testing.assert_close(a.double(), b, rtol=room, atol=room * size, msg=lambda m, k=key: f"{k}: {m}")


def check_modal_pool(backend, call):
    agree(evaluate(POOL, on(POOL, backend), call), evaluate(POOL, on(POOL, "reference"), to_float64(call)))


@pytest.mark.parametrize("backend", [b for b in POOL.backends if b not in ("reference", "triton")])
@settings(max_examples=200, deadline=None, derandomize=True)
@given(call=pool_calls())
def test_drawn_modal_pool(backend, call):
    check_modal_pool(backend, call)


@pytest.mark.rest
@settings(max_examples=60, deadline=None, derandomize=True)
@given(call=pool_calls())
def test_interpreted_modal_pool(call):
    check_modal_pool("triton", call)


@pytest.mark.rest
@pytest.mark.parametrize("backend", [b for b in FEATURE.backends if b != "reference"])
@settings(max_examples=200, deadline=None, derandomize=True)
@given(call=feature_calls(), names=st.sampled_from([("student",), FEATURE.differentiable]))
def test_drawn_feature_loss(backend, call, names):
    found = evaluate(FEATURE, on(FEATURE, backend), call, names=names)
    agree(found, evaluate(FEATURE, on(FEATURE, "reference"), to_float64(call), names=names))


@st.composite
def mfd_calls(draw):
    tensor, flags, number, rng = drawer(draw)
    lead = draw(st.sampled_from([(), (1,), (5,), (2, 3), (70,), (0,)]))
    modalities, width, classes = draw(st.integers(1, 5)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(DTYPES))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    shared = [tensor((*lead, width), dtype) for _ in range(modalities)]
    call = {
        "features": torch.stack(shared, -2) if draw(st.booleans()) else shared,
        "query": tensor((width,), dtype) if draw(st.booleans()) else None,
        "head_weight": tensor((classes, width), dtype),
        "head_bias": tensor((classes,), dtype) if draw(st.booleans()) else None,
        "teacher_logits": tensor((*lead, classes), dtype),
        "pool_temperature": number(lead, 0.5, 2.0, acc),
        "temperature": number(lead, 0.5, 4.0, acc),
        "scale_by_temperature": draw(st.booleans()),
        "soft_weight": draw(st.sampled_from([0.0, 1.0, torch.tensor(0.7, dtype=acc)])),
        "reduction": draw(st.sampled_from(["mean", "mean", "sum", "none"])),
    }
    if draw(st.booleans()):
        call["bias"] = tensor((modalities,), dtype)
    if draw(st.booleans()):
        call["present"] = flags((*lead, modalities), 0.7)
    if draw(st.booleans()):
        ignored = flags(lead, 0.2)
        call["ignore_index"] = draw(st.sampled_from([-100, classes, 0]))
        call["labels"] = torch.randint(classes, lead, generator=rng).masked_fill(ignored, call["ignore_index"])
        call["hard_weight"] = draw(st.sampled_from([0.0, 0.5, torch.tensor(0.25, dtype=acc)]))
        call["label_smoothing"] = draw(st.sampled_from([0.0, 0.1]))
    if draw(st.booleans()):
        call["teacher_features"] = tensor((*lead, width), dtype)
        call["feature_weight"] = draw(st.sampled_from([0.0, 0.3, torch.tensor(0.4, dtype=acc)]))
        call["feature_kind"] = draw(st.sampled_from(["mse", "smooth_l1", "cosine"]))
    if draw(st.booleans()):
        shares = tensor((*lead, modalities), acc, low=0.1, high=1.0, layout=False)
        shares = torch.where(call["present"], shares, 0) if "present" in call else shares
        call["teacher_pool_weights"] = shares / shares.sum(-1, keepdim=True).clamp_min(0.1)
        call["pool_weight"] = draw(st.sampled_from([0.0, 0.2]))
    if draw(st.booleans()):
        call["mask"] = flags(lead, 0.7)
    if draw(st.booleans()):
        call["weight"] = tensor(lead, acc, low=0.0, high=2.0, layout=False)
    if call["reduction"] == "mean" and draw(st.booleans()):
        call["normalizer"] = draw(st.sampled_from([3.0, torch.tensor(5.0, dtype=acc)]))
    return call


def composition(
    features, query, head_weight, head_bias, teacher_logits, labels=None, *, backend, present=None, bias=None,
    pool_temperature=1.0, teacher_features=None, feature_weight=0.0, feature_kind="mse", teacher_pool_weights=None,
    pool_weight=0.0, soft_weight=1.0, hard_weight=0.0, mask=None, weight=None, ignore_index=-100, reduction="mean",
    normalizer=None, operand=None, **options,
):  # fmt: skip
    """What mfd_loss computes, by the three public ops; the head reads pooled features of dtype ``operand``."""
    lead = teacher_logits.shape[:-1]
    counted = torch.ones(lead, dtype=torch.bool) if mask is None else mask
    if labels is not None:
        counted = counted & (labels != ignore_index)
    pool = mfd.modal_pool(features, query, bias=bias, temperature=pool_temperature, present=present, backend=backend)
    acc = pool.weights.dtype
    pooled = pool.pooled.to(acc)
    if operand is not None:
        pooled = pooled + (pooled.to(operand).to(acc) - pooled).detach()
    logits = pooled @ head_weight.to(acc).T
    if head_bias is not None:
        logits = logits + head_bias.to(acc)
    rows = mfd.distill_loss(
        logits, teacher_logits, labels, soft_weight=soft_weight, hard_weight=hard_weight, mask=counted,
        ignore_index=ignore_index, reduction="none", backend=backend, **options,
    )  # fmt: skip
    if isinstance(feature_weight, torch.Tensor) or feature_weight:
        rows = rows + feature_weight * mfd.feature_loss(
            pool.pooled, teacher_features, kind=feature_kind, mask=counted, reduction="none", backend=backend
        )
    if pool_weight:
        told = teacher_pool_weights > 0
        ratio = torch.where(told, teacher_pool_weights, 1).log() - torch.where(told, pool.weights, 1).log()
        rows = rows + pool_weight * torch.where(counted, (teacher_pool_weights * ratio).sum(-1), 0)
    if weight is not None:
        rows = torch.where(counted, weight * rows, 0)
    if reduction == "none":
        return {"loss": rows}
    if reduction == "sum":
        return {"loss": rows.sum()}
    return {"loss": rows.sum() / (max(int(counted.sum()), 1) if normalizer is None else normalizer)}


LEAVES = ("features", "query", "bias", "head_weight", "head_bias")


def check_mfd_loss(backend, call, names):
    """mfd_loss and its gradients are those of the composition of the public ops."""

    def composed(where, **more):
        return lambda **arguments: composition(**arguments, **more, backend=where)

    exact = evaluate(MFD, composed("reference"), to_float64(call), names=names)
    found = evaluate(MFD, lambda **a: {"loss": MFD.op(**a, backend=backend).loss}, call, names=names)
    dtype = call["teacher_logits"].dtype
    if backend != "cpu" and dtype.itemsize == 2:  # tensor cores multiply 16 bits
        agree(found, evaluate(MFD, composed("reference", operand=dtype), to_float64(call), names=names))
    else:
        agree(found, exact)
    # The composition rounds the pooled features to the inputs' dtype for every term, mfd_loss at most for the head.
    agree(evaluate(MFD, composed(backend), call, names=names), exact, coarse=20 * ROOM[dtype])


DRAWS = {"call": mfd_calls(), "names": st.sampled_from([LEAVES, LEAVES, MFD.differentiable])}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(**DRAWS)
def test_mfd_loss_is_the_composition_of_the_public_ops(call, names):
    check_mfd_loss("cpu", call, names)


@pytest.mark.rest
@pytest.mark.parametrize("backend", [b for b in MFD.backends if b not in ("reference", "cpu")])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(**DRAWS)
def test_interpreted_or_emulated_mfd_loss_is_the_composition_of_the_public_ops(backend, call, names):
    check_mfd_loss(backend, call, names)
