"""Backends write every element of what they allocate, and nothing outside it."""

import pytest
from harness import evaluate, on
from op_db import SAMPLE_CASES, crossed

from mfd_fast.testing import assert_bitwise_equal, poison

SHAPES = [(6, 11), (0, 11), (1, 1), (3, 64), (5, 65), (2, 129)]


@pytest.mark.parametrize(("record", "backend", "name", "shape"), crossed(SAMPLE_CASES, SHAPES))
def test_every_element_is_written_and_none_beyond(record, backend, name, shape):
    rows, classes = shape
    arguments = record.samples(rows=rows, classes=classes)[name]
    for names in (record.differentiable[:1], record.differentiable):
        clean = evaluate(record, on(record, backend), arguments, names=names)
        with poison() as buffers:
            found = evaluate(record, on(record, backend), arguments, names=names)
        assert len(buffers) > 0 or backend == "reference"
        for (key, a), (_, b) in zip(found.items(), clean.items(), strict=True):
            assert_bitwise_equal(a, b, key)
