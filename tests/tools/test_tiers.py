"""The tiers of the battery: quick and rest are the whole, and quick has every combination that it promises."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

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
def test_quick_has_a_case_of_every_test_that_is_not_marked(found):
    def tests(names):
        return {name.split("[")[0] for name in names}

    marked = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for mark, name in _marks(path.read_text())
        if mark == "rest"
    }
    left_out = {name.split("::")[-1] for name in tests(found["rest"]) - tests(found["quick"])}
    assert left_out == marked & {name.split("::")[-1] for name in tests(found["all"])}


def _marks(text):
    """(marker, test) of every marker of a tier."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                name = ast.unparse(decorator).split("(")[0]
                if name in ("pytest.mark.rest", "pytest.mark.quick"):
                    yield name.rsplit(".", 1)[1], node.name
