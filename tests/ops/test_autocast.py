"""Autocast: dtypes do not change, and no result is less accurate than eager's under the same autocast."""

import on_device
import pytest
import torch
from draws import eager_outputs
from harness import assert_obeys_rule, evaluate, on, reference64, stacked
from op_db import RECORDS, SAMPLE_CASES, crossed
from test_values import DRAWS

from mfd_fast.testing import assert_bitwise_equal

AUTOCAST = {"device_type": on_device.DEVICE.type, "dtype": torch.bfloat16}


ROW_LOSSES = [case for case in SAMPLE_CASES if case[0].name in ("distill_loss", "distill_terms")]
OTHERS = [case for case in SAMPLE_CASES if case not in ROW_LOSSES]


@pytest.mark.parametrize(("record", "backend", "name", "dtype"), crossed(OTHERS, [torch.bfloat16, torch.float32]))
def test_dtypes_stay_and_accuracy_holds(record, backend, name, dtype):
    actual, exact, eager = [], [], []
    for seed in range(max(DRAWS[backend] // 3, 4)):
        arguments = record.samples(dtype=dtype, seed=seed)[name]
        plain = evaluate(record, on(record, backend), arguments)
        exact.append(reference64(record, arguments))
        with torch.autocast(**AUTOCAST):
            actual.append(evaluate(record, on(record, backend), arguments))
            eager.append(evaluate(record, lambda **a: eager_outputs(record, a), arguments))
        for (key, a), (_, b) in zip(actual[-1].items(), plain.items(), strict=True):
            assert a.dtype == b.dtype, key
        for result in (actual[-1], exact[-1]):
            result.outputs.pop("predictions", None)  # the argmax of rounded logits
    assert_obeys_rule(*(stacked(r) for r in (actual, exact, eager)), f"{record.name} {backend} {name}")


@pytest.mark.parametrize(("record", "backend", "name", "dtype"), crossed(ROW_LOSSES, [torch.bfloat16, torch.float32]))
def test_row_losses_ignore_autocast(record, backend, name, dtype):
    """The same bits, whose accuracy test_values judges."""
    arguments = record.samples(dtype=dtype)[name]
    plain = evaluate(record, on(record, backend), arguments)
    with torch.autocast(**AUTOCAST):
        found = evaluate(record, on(record, backend), arguments)
    for (key, a), (_, b) in zip(found.items(), plain.items(), strict=True):
        assert_bitwise_equal(a, b, key)


def test_backward_of_a_model_under_autocast_reaches_float32_parameters():
    model = torch.nn.Linear(5, 7)
    sample = RECORDS["distill_loss"].samples(rows=4, classes=7)["plain"]
    for backend in RECORDS["distill_loss"].backends:
        model.zero_grad()
        with torch.autocast(**AUTOCAST):
            logits = model(torch.ones(4, 5))
            assert logits.dtype == torch.bfloat16
            loss = RECORDS["distill_loss"].op(logits, sample["teacher"], temperature=2.0, backend=backend)
        assert loss.dtype == torch.float32
        loss.backward()
        assert model.weight.grad.dtype == torch.float32
        assert bool(model.weight.grad.any())
