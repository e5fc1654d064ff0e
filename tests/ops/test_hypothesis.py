"""Differential test: any call that the contract allows agrees on every backend with the reference in float64."""

import math

import pytest
import torch
from harness import evaluate, map_tensors, named_tensors, on, to_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from op_db import BACKEND_FEATURES, RECORDS

import mfd_fast as mfd
from mfd_fast import LogitTransform
from mfd_fast.testing import DISTANCES, LAYOUTS, distill_inputs

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Room for a rounding of the result and a few of the arithmetic: accuracy itself is the business of test_values.
ROOM = {torch.float16: 2**-9, torch.bfloat16: 2**-6, torch.float32: 2e-4, torch.float64: 1e-9}
EXACT_LAYOUTS = sorted(set(LAYOUTS) - {"stride_zero", "expanded"})


DIVERGENCES = [
    *(mfd.JSD(beta) for beta in (0.0, 0.3, 1.0)),
    *(mfd.SkewKL(lam) for lam in (0.0, 0.1, 0.6)),
    *(mfd.SkewReverseKL(lam) for lam in (0.0, 0.1, 0.6)),
    *(mfd.AlphaBeta(*ab) for ab in ((0.6, 0.3), (1.0, 0.0), (0.0, 0.8), (0.4, 1.2))),
    *(mfd.DKD(*ab) for ab in ((1.0, 0.5), (0.0, 1.0), (1.0, 0.0))),
    *(mfd.NKD(gamma) for gamma in (0.0, 1.5)),
    *(mfd.ForwardKL(), mfd.ReverseKL(), mfd.TVD()),
]


def topk_of(draw, teacher, classes, labels):
    """Some classes of every row, the label among them; they leave at least a tenth to the rest."""
    k = draw(st.integers(1, classes))
    log_p = torch.log_softmax(teacher[..., :classes].double(), -1)
    favoured = log_p if labels is None else log_p.scatter(-1, labels.clamp(0, classes - 1)[..., None], 1.0)
    indices = favoured.topk(k, -1).indices
    values = (log_p.gather(-1, indices) + math.log(0.9)).to(teacher.dtype)
    return mfd.TopK(values, indices, draw(st.sampled_from(["bucket", "renormalize", "zero"])))


def allowed(divergence, teacher):
    """Not refused: a sparse teacher without its rest makes some divergences infinite or undefined."""
    if not isinstance(teacher, mfd.TopK) or teacher.tail != "zero":
        return True
    return not divergence.needs_labels and divergence.canonical() not in (mfd.ReverseKL(), mfd.AlphaBeta(0.0, 0.8))


@st.composite
def calls(draw, largest, backend="reference"):
    features = BACKEND_FEATURES[backend]
    lead = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    classes = draw(st.integers(1, largest))
    dtype, teacher_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    acc = torch.float64 if torch.float64 in (dtype, teacher_dtype) else torch.float32
    seed = draw(st.integers(0, 2**16))
    made = distill_inputs(
        (*lead, classes + draw(st.integers(0, 3))),
        distance=draw(st.sampled_from(sorted(DISTANCES))),
        dtype=dtype,
        teacher_dtype=teacher_dtype,
        spread=draw(st.sampled_from([0.1, 1.0, 8.0])),
        seed=seed,
    )
    rng = torch.Generator().manual_seed(seed + 1)

    def per_row(low, high):
        return (low + (high - low) * torch.rand(lead, generator=rng)).to(acc)

    def number(low, high):
        kind = draw(st.sampled_from(["float", "0-d", "row"]))
        value = draw(st.floats(low, high))
        return {"float": value, "0-d": torch.tensor(value, dtype=acc), "row": per_row(low, high)}[kind]

    def transform():
        softcap = draw(st.sampled_from([None, 2.0, 30.0]))
        return LogitTransform(scale=draw(st.sampled_from([1.0, 0.5, 2.0])), softcap=softcap, classes=classes)

    layout = LAYOUTS[draw(st.sampled_from(EXACT_LAYOUTS))]
    call = {
        "student": layout(made.student),
        "teacher": LAYOUTS[draw(st.sampled_from(EXACT_LAYOUTS))](made.teacher),
        "student_transform": transform(),
        "teacher_transform": transform(),
        "temperature": number(0.3, 5.0),
        "scale_by_temperature": draw(st.booleans()),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    if draw(st.booleans()):
        call["teacher_temperature"] = number(0.3, 5.0)
    if draw(st.booleans()):
        labels = torch.randint(classes, lead, generator=rng)
        ignored = torch.rand(lead, generator=rng) < 0.2
        call["ignore_index"] = draw(st.sampled_from([-100, -1, classes, 0]))
        call["labels"] = labels.masked_fill(ignored, call["ignore_index"])
        call["hard_weight"] = draw(st.sampled_from([0.0, 0.5, torch.tensor(0.25, dtype=acc)]))
        call["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
    if draw(st.booleans()):
        call["soft_weight"] = draw(st.sampled_from([0.0, 2.0, torch.tensor(0.5, dtype=acc)]))
    if draw(st.booleans()):
        call["mask"] = torch.rand(lead, generator=rng) < 0.7
    if draw(st.booleans()):
        call["weight"] = per_row(0.0, 2.0)
    if call["reduction"] == "mean" and draw(st.booleans()):
        call["normalizer"] = draw(st.sampled_from([3.0, torch.tensor(5.0, dtype=acc)]))
    divergence = draw(st.sampled_from([d for d in DIVERGENCES if d.canonical().name in features]))
    if "labels" in call or not divergence.needs_labels:
        call["divergence"] = divergence
    kinds = [kind for kind in ("dense", "topk", "teachers") if kind == "dense" or kind in features]
    kind = draw(st.sampled_from(kinds))
    if kind == "teachers":
        other = distill_inputs((*lead, classes + draw(st.integers(0, 3))), dtype=teacher_dtype, seed=seed + 2)
        call["teacher"] = [call["teacher"], other.teacher]
        call["teacher_weights"] = draw(st.sampled_from([None, torch.tensor([1.0, 3.0]), per_row(0.1, 1.0)]))
        if call["teacher_weights"] is not None and call["teacher_weights"].shape != (2,):
            call["teacher_weights"] = torch.stack([call["teacher_weights"], per_row(0.1, 1.0)], -1)
    elif kind == "topk":
        labels = call.get("labels")
        sparse = topk_of(draw, made.teacher, classes, labels)
        if allowed(call.get("divergence", mfd.ForwardKL()), sparse):
            call["teacher"] = sparse
            del call["teacher_transform"]
    names = ("student",) if draw(st.booleans()) else RECORDS["distill_loss"].differentiable
    return call, names


def agree(backend, call, names):
    record = RECORDS["distill_loss"]
    expected = evaluate(record, on(record, "reference"), to_float64(call), names=names)
    found = evaluate(record, on(record, backend), call, names=names)
    logits = named_tensors({k: call[k] for k in ("student", "teacher")}).values()
    acc = torch.float64 if any(t.dtype == torch.float64 for t in logits) else torch.float32
    for (key, a), (_, b) in zip(found.items(), expected.items(), strict=True):
        # Losses and gradients in the arithmetic's dtype are finer than 16-bit gradients.
        room = ROOM[a.dtype]
        size = 1.0 + float(b.abs().max()) if b.numel() else 1.0
        assert a.shape == b.shape, key
        torch.testing.assert_close(a.double(), b, rtol=room, atol=room * size, msg=lambda m, k=key: f"{k}: {m}")
        if key in ("loss", "d weight", "d soft_weight"):
            assert a.dtype == acc, key


@settings(max_examples=250, deadline=None, derandomize=True)
@given(calls(largest=300, backend="cpu"))
def test_cpu(case):
    agree("cpu", *case)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(calls(largest=300))
def test_reference_in_its_own_dtype(case):
    agree("reference", *case)


@pytest.mark.rest
@settings(max_examples=60, deadline=None, derandomize=True)
@given(calls(largest=40, backend="triton"))
def test_triton(case):
    agree("triton", *case)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton", "cuda"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    values=st.lists(
        st.lists(st.sampled_from([0.0, 1.0, -2.0, 60.0, math.inf, -math.inf, math.nan]), min_size=4, max_size=4),
        min_size=4,
        max_size=4,
    )
)
def test_special_values_in_any_arrangement(backend, values):
    """NaN, +inf and -inf stand where the reference has them in float64, in values and gradients."""
    record = RECORDS["distill_loss"]
    rows = torch.tensor(values)
    call = {"student": rows[:2], "teacher": rows[2:], "temperature": 2.0, "reduction": "none"}
    found = evaluate(record, on(record, backend), call, names=("student",))
    expected = evaluate(record, on(record, "reference"), map_tensors(call, torch.Tensor.double), names=("student",))
    for (key, a), (_, b) in zip(found.items(), expected.items(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5, equal_nan=True, msg=key)
