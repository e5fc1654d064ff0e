"""Differential test: any call that the contract allows agrees on every backend with the reference in float64."""

import math

import pytest
import torch
from harness import evaluate, map_tensors, on, to_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from op_db import RECORDS

from mfd_fast import LogitTransform
from mfd_fast.testing import DISTANCES, LAYOUTS, distill_inputs

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Room for a rounding of the result and a few of the arithmetic: accuracy itself is the business of test_values.
ROOM = {torch.float16: 2**-9, torch.bfloat16: 2**-6, torch.float32: 2e-4, torch.float64: 1e-9}
EXACT_LAYOUTS = sorted(set(LAYOUTS) - {"stride_zero", "expanded"})


@st.composite
def calls(draw, largest):
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
    names = ("student",) if draw(st.booleans()) else RECORDS["distill_loss"].differentiable
    return call, names


def agree(backend, call, names):
    record = RECORDS["distill_loss"]
    expected = evaluate(record, on(record, "reference"), to_float64(call), names=names)
    found = evaluate(record, on(record, backend), call, names=names)
    coarse = max((call["student"], call["teacher"]), key=lambda t: ROOM[t.dtype]).dtype
    acc = torch.float64 if torch.float64 in (call["student"].dtype, call["teacher"].dtype) else torch.float32
    for (key, a), (_, b) in zip(found.items(), expected.items(), strict=True):
        # Losses and gradients in the arithmetic's dtype are finer than 16-bit gradients.
        room = ROOM[a.dtype]
        size = 1.0 + float(b.abs().max()) if b.numel() else 1.0
        assert a.shape == b.shape, key
        torch.testing.assert_close(a.double(), b, rtol=room, atol=room * size, msg=lambda m, k=key: f"{k}: {m}")
        if key in ("loss", "d weight", "d soft_weight"):
            assert a.dtype == acc, key
    assert math.isfinite(ROOM[coarse])


@settings(max_examples=250, deadline=None, derandomize=True)
@given(calls(largest=300))
def test_cpu(case):
    agree("cpu", *case)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(calls(largest=300))
def test_reference_in_its_own_dtype(case):
    agree("reference", *case)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(calls(largest=40))
def test_triton(case):
    agree("triton", *case)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
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
