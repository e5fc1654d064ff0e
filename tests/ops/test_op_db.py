"""Every public op has a record, and the records are in step with the library."""

import inspect

import pytest
import torch
from harness import named_tensors
from op_db import RECORDS

import mfd_fast as mfd


def public_ops():
    """The public functions that take a backend."""
    functions = [getattr(mfd, name) for name in mfd.__all__ if inspect.isfunction(getattr(mfd, name))]
    return {f.__name__ for f in functions if "backend" in inspect.signature(f).parameters}


def test_every_public_op_has_a_record():
    assert public_ops() == set(RECORDS)


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_record_matches_the_library(record):
    parameters = inspect.signature(record.op).parameters
    used = {name for sample in record.samples().values() for name in sample}
    assert set(record.differentiable) <= set(parameters)
    # Every argument is exercised by some sample; these have one value only, or have tests of their own.
    others = {
        "mfd_loss": {"divergence", "scale_by_temperature", "normalizer"},
        "distill_loss": {"process_group"},  # tests/integration/test_class_sharded.py
        "linear_distill_loss": {"process_group"},
    }
    assert set(parameters) - used <= {"backend", "ignore_index"} | others.get(record.name, set())


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_samples_are_seeded_and_of_the_dtype(record, dtype):
    first, again, other = (record.samples(dtype=dtype, seed=s) for s in (0, 0, 1))
    main = "features" if record.name in ("modal_pool", "mfd_loss") else "student"
    for name in first:
        tensors, same, changed = (named_tensors(s[name]) for s in (first, again, other))
        assert any(t.dtype == dtype for k, t in tensors.items() if k.startswith(main))
        torch.testing.assert_close(same, tensors, rtol=0.0, atol=0.0, equal_nan=True)  # what pads a list is NaN
        assert any(not torch.equal(t, changed[k]) for k, t in tensors.items())
