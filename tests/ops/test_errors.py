"""Every contract violation raises before any work, and says op, argument, what it got and what it needs."""

import pytest
import torch
from op_db import CASE_IDS, CASES, RECORDS

import mfd_fast as mfd

ERRORS = [(record, error) for record in RECORDS.values() for error in record.errors()]
ERROR_IDS = [f"{record.name}-{error.id}" for record, error in ERRORS]


def valid_call(record):
    sample = next(iter(record.samples().values()))
    return {k: v for k, v in sample.items() if k != "temperature"}


@pytest.mark.parametrize(("record", "error"), ERRORS, ids=ERROR_IDS)
def test_error_input_raises_and_says_why(record, error):
    with pytest.raises(error.error, match=error.match) as caught:
        record.op(**{**valid_call(record), **error.changes})
    assert type(caught.value) is error.error


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_the_call_the_errors_start_from_is_valid(record):
    record.op(**valid_call(record))


@pytest.mark.parametrize(("record", "backend"), CASES, ids=CASE_IDS)
def test_bad_labels_raise_on_every_backend_on_a_cpu(record, backend):
    call = next((dict(s) for s in record.samples().values() if "labels" in s), None)
    if call is None:
        assert record.name in ("modal_pool", "feature_loss")
        return
    call["labels"] = call["labels"].clone()
    call["labels"][-1] = 99
    with pytest.raises(ValueError, match=rf"{record.name}: labels must be in \[0, 11\).*got 99 in row 5"):
        record.op(**call, backend=backend)
    if "mask" in call:  # a row that does not exist is not read
        call["mask"] = call["mask"].clone()
        call["mask"][-1] = False
        record.op(**call, backend=backend)


def test_a_backend_that_cannot_run_is_refused_by_name_with_the_reason():
    features = [torch.zeros(2, 3)] * 33
    with pytest.raises(mfd.BackendError, match=r"modal_pool: backend 'cuda' cannot run .*passed.*32 modalities"):
        mfd.modal_pool(features, backend="cuda")
    with mfd.use_backend("cuda"), pytest.raises(mfd.BackendError, match=r"use_backend\('"):
        mfd.modal_pool(features)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"scale": 0.0}, ValueError, "scale must be a finite number > 0, got 0.0"),
        ({"scale": float("nan")}, ValueError, "scale must be"),
        ({"scale": "1"}, ValueError, "scale must be"),
        ({"softcap": -1.0}, ValueError, "softcap must be None or a finite number > 0, got -1.0"),
        ({"softcap": float("inf")}, ValueError, "softcap must be"),
        ({"standardize": 1}, TypeError, "standardize must be a bool, got 1"),
        ({"classes": 0}, ValueError, "classes must be None or an integer >= 1, got 0"),
        ({"classes": 2.0}, ValueError, "classes must be"),
    ],
)
def test_logit_transform_checks_itself(options, error, match):
    with pytest.raises(error, match=f"LogitTransform: {match}"):
        mfd.LogitTransform(**options)


def test_unknown_backend_names(monkeypatch):
    with pytest.raises(ValueError, match="use_backend: backend must be one of"), mfd.use_backend("tpu"):
        pass
    monkeypatch.setenv("MFD_FAST_BACKEND", "tpu")
    with pytest.raises(ValueError, match=r"MFD_FAST_BACKEND must be one of .*got 'tpu'"):
        mfd.distill_loss(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="explain: op must be one of"):
        mfd.explain(torch.add, 1, 2)
