"""Bitwise repeatability: over runs, over thread counts, and whatever ran in between."""

import functools

import harness
import pytest
import torch
from harness import on
from on_device import ON_GPU
from op_db import CASE_IDS, CASES, RECORDS, samples_on

from mfd_fast.testing import assert_bitwise_equal

#: In the memory that calls get outside of tests, recycled gradients included.
evaluate = functools.partial(harness.evaluate, poisoned=False)
#: Interpreted programs run one after the other: only memory that nobody has written could differ, which poison shows.
RUNS = {"reference": 50, "cpu": 50, "triton": 50 if ON_GPU else 5, "cuda": 50}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_repeats(first, again):
    for (name, a), (_, b) in zip(again.items(), first.items(), strict=True):
        assert_bitwise_equal(a, b, name)


@pytest.mark.parametrize(("record", "backend"), CASES, ids=CASE_IDS)
def test_fifty_runs_give_the_same_bits(record, backend):
    size = {"rows": 2, "classes": 5} if backend == "triton" else {"rows": 24, "classes": 67}
    samples = [record.samples(**size)[name] for name in samples_on(record, backend)]
    calls = [(samples[0], record.differentiable[:1]), (samples[-1], record.differentiable)]
    for arguments, names in calls:
        first = evaluate(record, on(record, backend), arguments, names=names)
        for _ in range(RUNS[backend] - 1):
            assert_repeats(first, evaluate(record, on(record, backend), arguments, names=names))


SHAPES = [(1, 70001), (2, 40000), (3, 1), (67, 1003), (20011, 3), (5000, 112)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["labels", "per_row"])
def test_thread_count_does_not_change_a_bit_on_the_cpu_backend(threads, shape, dtype, name):
    record = RECORDS["distill_loss"]
    arguments = record.samples(dtype=dtype, rows=shape[0], classes=shape[1])[name]
    for names in (("student",), ("student", "teacher", "temperature")):
        found = []
        for count in (1, 2, 1, 3):
            threads(count)
            found.append(evaluate(record, on(record, "cpu"), arguments, names=names))
        for other in found[1:]:
            assert_repeats(found[0], other)


@pytest.mark.parametrize("backend", RECORDS["distill_loss"].backends)
def test_nothing_is_left_behind_by_other_calls(backend):
    """Scratch memory and recycled gradients of other shapes, dtypes and options do not leak into a result."""
    record = RECORDS["distill_loss"]
    arguments = record.samples()["labels"]
    first = evaluate(record, on(record, backend), arguments)
    for dtype in (torch.float64, torch.bfloat16):
        others = record.samples(dtype=dtype, rows=4, classes=23)
        for name in samples_on(record, backend):
            evaluate(record, on(record, backend), others[name])
            assert_repeats(first, evaluate(record, on(record, backend), arguments))


@pytest.mark.parametrize("backend", RECORDS["distill_loss"].backends)
def test_row_result_does_not_depend_on_its_neighbours(backend):
    """A row alone, in a batch, or at another place in it: the same bits."""
    record = RECORDS["distill_loss"]
    sample = {**record.samples(rows=5, classes=33)["plain"], "reduction": "none"}
    together = evaluate(record, on(record, backend), sample, grad_outputs=lambda t, _: torch.ones_like(t))
    for row in (0, 3, 4):
        alone = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in sample.items()}
        found = evaluate(record, on(record, backend), alone, grad_outputs=lambda t, _: torch.ones_like(t))
        for (name, a), (_, b) in zip(found.items(), together.items(), strict=True):
            if backend != "reference":  # PyTorch's own sums depend on the shape
                assert_bitwise_equal(a, b[row : row + 1], name)
            torch.testing.assert_close(a, b[row : row + 1], msg=name)
