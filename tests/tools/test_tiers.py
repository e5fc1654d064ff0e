"""The tiers of the battery: quick and rest are the whole, and quick has every combination that it promises."""

import inspect
import itertools
import subprocess
import sys
from pathlib import Path

import op_db_divergences
import pytest
import tiers
from op_db import RECORDS, samples_on

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float16", "bfloat16", "float32")


def shown(cases, product=()):
    return set(itertools.chain.from_iterable(tiers.combinations(case, product) for case in cases))


def crossed(**axes):
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


@pytest.mark.parametrize(
    ("cases", "few"),
    [
        (crossed(a=range(5), b=range(5)), 5),
        (crossed(backend=["x", "y"], name=range(7), layout=range(3)), 14),
        (crossed(backend=["x"], record=["r", "s"], name=range(4)), 8),
        ([{"a": 1}, {"a": 1, "b": 2}], 1),
        ([{"value": float("nan")}, {"value": float("nan")}], 1),
        ([], 0),
    ],
)
def test_few_cases_show_what_all_show(cases, few):
    chosen = [cases[i] for i in tiers.covering(cases)]
    assert shown(chosen) == shown(cases)
    assert len(chosen) == few
    assert bool(chosen) == bool(cases)


def test_a_product_is_shown_whole():
    cases = crossed(backend=["x", "y"], name=["n", "m", "o"], layout=range(3))
    chosen = tiers.covering(cases, ("backend", "name"))
    assert [(cases[i]["backend"], cases[i]["name"]) for i in chosen] == [*itertools.product("xy", "nmo")]


def collected(tier):
    """Node ids, each as often as it is collected."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", f"--tier={tier}", "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.fixture(scope="module")
def found():
    return {tier: collected(tier) for tier in tiers.TIERS}


@pytest.mark.rest  # it collects the battery three times
def test_quick_and_rest_are_all(found):
    assert sorted(found["quick"] + found["rest"]) == sorted(found["all"])
    assert len(set(found["all"])) == len(found["all"]) > 10_000
    assert 0 < len(found["quick"]) < len(found["all"]) / 2


@pytest.mark.rest
def test_quick_has_every_op_backend_sample_and_dtype(found):
    """Samples have every divergence and every argument: test_op_db and test_divergences see to it."""
    prefix = "tests/ops/test_values.py::test_values_and_all_gradients["
    cases = [name.removeprefix(prefix)[:-1].split("-") for name in found["quick"] if name.startswith(prefix)]
    assert {(op, backend, sample, dtype) for op, backend, sample, _, dtype in cases} == {
        (record.name, backend, sample, dtype)
        for record in RECORDS.values()
        for backend in record.backends
        for sample in samples_on(record, backend)
        for dtype in DTYPES
    }


@pytest.mark.rest
def test_quick_has_every_op_backend_divergence_and_dtype(found):
    """Where no sample has the divergence, test_every_divergence has it."""
    prefix = "tests/ops/test_every_divergence.py::test_values_and_gradients_of_every_divergence["
    cases = {name.removeprefix(prefix)[:-1] for name in found["quick"] if name.startswith(prefix)}
    ops = [name for name, record in RECORDS.items() if "divergence" in inspect.signature(record.op).parameters]
    assert cases == {
        "-".join((op, backend, divergence, dtype))
        for op in ops
        if op != "distill_loss"
        for backend in RECORDS[op].backends
        for divergence in op_db_divergences.DIVERGENCES
        for dtype in DTYPES
    }
    assert {op_db_divergences.feature(name) for name in samples_on(RECORDS["distill_loss"], "cpu")} >= {
        *op_db_divergences.DIVERGENCES
    }
