"""The order of a GPU's backends: the model confirms it, a measurement changes it, explain says which of both it was."""

import itertools
from pathlib import Path

import pytest
import torch

import mfd_fast as mfd
from mfd_fast import backends
from mfd_fast.backends import choice
from mfd_fast.problems.rows import check_rows

ROOT = Path(__file__).resolve().parents[2]
SHAPES = list(itertools.product((1, 256, 8192, 65536), (10, 1000, 4096, 32000, 128256), (2, 4)))


@pytest.mark.parametrize("op", [op for op, names in backends.KERNELS.items() if {"cuda", "triton"} <= set(names)])
@pytest.mark.parametrize("clusters", [True, False])
def test_the_model_confirms_the_usual_order(op, clusters):
    usual = [name for name in backends.KERNELS[op] if name in choice.LAUNCH_US]
    for shape in SHAPES:
        assert sorted(usual, key=lambda name: choice.model_us(name, *shape, clusters=clusters)) == usual, shape


def test_what_the_model_says():
    """A small call is its launch; of long rows on a chip with clusters the model asks for 3/5 of the bytes."""
    assert choice.model_us("cuda", 256, 10, 2) == pytest.approx(2.0, rel=0.01)
    assert choice.model_us("triton", 256, 10, 2) == pytest.approx(15.0, rel=0.01)
    ratio = choice.model_us("cuda", 8192, 128256, 2) / choice.model_us("triton", 8192, 128256, 2)
    assert ratio == pytest.approx(3 / 5, rel=0.01)
    whole = choice.model_us("cuda", 8192, 128256, 2) / choice.model_us("cuda", 8192, 128256, 2, clusters=False)
    assert whole == pytest.approx(3 / 5, rel=0.01)


@pytest.fixture
def problem(monkeypatch):
    """Rows on a device that is no CPU, on which everything could run."""
    monkeypatch.setattr(backends, "why_not", lambda name, op, problem: None)
    logits = torch.empty((4, 1000), device="meta")
    return check_rows("distill_loss", logits, logits, None)


def test_explain_says_that_nothing_was_measured(problem):
    assert backends.choose("distill_loss", problem) == "cuda"
    said = backends.explain_choice("distill_loss", problem, None, "distill_loss")
    assert said.reason == "the fastest that can run on meta (by the launch and byte model, no GPU has measured it)"
    assert said.rejected["triton"].startswith("slower than cuda: a launch costs 15 us against 2; rows of more than 8")
    assert said.rejected["cpu"] == "slower than cuda"


def test_a_measurement_changes_the_order_where_it_was_made(problem, monkeypatch):
    entry = choice.Measured("distill_loss", (900, 1100), ("triton", "cuda"), "a-gpu.json")
    monkeypatch.setattr(choice, "MEASURED", (entry,))
    assert backends.choose("distill_loss", problem) == "triton"
    said = backends.explain_choice("distill_loss", problem, None, "distill_loss")
    assert "measured: benchmarks/results/a-gpu.json" in said.reason
    assert said.rejected["cuda"].startswith("slower than triton")
    assert choice.order("distill_loss", 1101, backends.KERNELS["distill_loss"])[0][0] == "cuda"
    assert choice.order("modal_pool", 1000, backends.KERNELS["modal_pool"])[0] == backends.KERNELS["modal_pool"]


def test_measured_exceptions_have_their_evidence():
    for entry in choice.MEASURED:
        assert entry.op in backends.KERNELS
        assert set(entry.backends) <= set(mfd.backends.NAMES)
        assert (ROOT / "benchmarks" / "results" / entry.file).is_file()
