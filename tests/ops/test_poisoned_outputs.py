"""Backends write every element of what they allocate, and nothing outside it: rows with and without a remainder.

`harness.evaluate` watches that in every test, at every dtype, distance and layout; here are more shapes.
"""

import contextlib
import itertools

import harness
import pytest
from harness import evaluate, on
from op_db import CASES, samples_on

SHAPES = [(6, 11), (0, 11), (1, 1), (3, 64), (5, 65), (2, 129)]


def in_turn(record, backend):
    """Every sample and every shape."""
    names = samples_on(record, backend)
    turns = zip(itertools.cycle(names), itertools.cycle(SHAPES), strict=False)
    return itertools.islice(turns, max(len(names), len(SHAPES)))


TURNS = [(record, backend, *turn) for record, backend in CASES for turn in in_turn(record, backend)]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("record", "backend", "name", "shape"), TURNS, ids=[f"{r.name}-{b}-{name}-{shape}" for r, b, name, shape in TURNS]
)
def test_every_element_is_written_and_none_beyond(monkeypatch, record, backend, name, shape):
    original, handed_out = harness.poison, []

    @contextlib.contextmanager
    def counted():
        with original() as buffers:
            yield buffers
            handed_out.append(len(buffers))

    monkeypatch.setattr(harness, "poison", counted)
    arguments = record.samples(rows=shape[0], classes=shape[1])[name]
    for names in (record.differentiable[:1], record.differentiable):
        evaluate(record, on(record, backend), arguments, names=names)
    assert len(handed_out) == 2
    assert min(handed_out) > 0 or backend == "reference"
