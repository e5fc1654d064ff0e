"""`mfd-fast check`: what it says, and its exit status, of right and wrong kernels and of a device that is gone."""

import dataclasses
import inspect
import json
import subprocess
import sys

import pytest
import torch

import mfd_fast as mfd
from mfd_fast import backends, check, cli
from mfd_fast.bench import machine
from mfd_fast.bench.ops import OPS

CPU = torch.device("cpu")
SMALL = (
    ("distill_loss", {"rows": 4, "classes": 500}, {"hard_weight": 0.5}),
    ("modal_pool", {"batch": 4, "modalities": 2, "width": 500}, {}),
    ("topk_loss", {"rows": 4, "classes": 500, "listed": 3}, {}),
)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr("mfd_fast.bench.gate.SMALL_BLOCK", 2000)
    monkeypatch.setattr("mfd_fast.bench.gate.SEEDS", 3)
    monkeypatch.setattr(check, "CASES", SMALL)
    monkeypatch.setattr(check, "DTYPES", ("float32",))


def replaced(monkeypatch, op, call):
    monkeypatch.setitem(OPS, op, dataclasses.replace(OPS[op], call=call))


def test_every_backend_is_right_and_the_file_says_so(tmp_path, capsys):
    path = tmp_path / "check.json"
    assert cli.main(["check", "--seconds", "600", "--json", str(path)]) == check.RIGHT
    said = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["verdict"] == "right"
    assert found["machine"]["torch"]
    able = {name for name, reason in backends.status().items() if reason is None}
    assert {o["backend"] for o in found["outcomes"]} == able
    assert len(found["outcomes"]) == len(SMALL) * len(check.DTYPES) * len(able)
    assert all(o["verdict"] == "right" for o in found["outcomes"])
    for name in able:
        assert f"distill_loss   {name:<10} right   2 of 2" in said
    assert said.splitlines()[-1].startswith("Right: ")


def test_a_wrong_gradient_is_named_and_fails(monkeypatch, capsys):
    right = OPS["modal_pool"].call

    def call(options, backend):
        f = right(options, backend)
        return f if backend == "reference" else lambda features, query: f([1.01 * x for x in features], query)

    replaced(monkeypatch, "modal_pool", call)
    assert check.main(["--device", "cpu", "--backend", "cpu", "--backend", "reference"]) == check.WRONG
    said = capsys.readouterr().out
    assert "modal_pool     cpu        WRONG   0 of 1" in said
    assert "\n    modal_pool 4x2x500 float32: " in said
    assert "modal_pool     reference  right" in said
    assert said.splitlines()[-1].startswith("WRONG: ")


def test_an_exception_is_wrong_and_the_others_go_on(monkeypatch):
    def call(options, backend):
        raise ZeroDivisionError("no launch")

    replaced(monkeypatch, "distill_loss", call)
    found, lost = check.run({"cpu": CPU}, float("inf"))
    assert not lost
    first, *_ = check.lines(found)
    assert (first.verdict, first.outcomes[0].why) == ("wrong", "ZeroDivisionError: no launch")
    assert {line.op: line.verdict for line in check.lines(found)}["modal_pool"] == "right"


def test_a_lost_device_stops_it(monkeypatch, capsys):
    def call(options, backend):
        raise RuntimeError("an illegal memory access was encountered")

    replaced(monkeypatch, "modal_pool", call)
    monkeypatch.setattr(machine, "is_lost", lambda device: True)
    assert check.main(["--backend", "cpu"]) == check.WRONG
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("WRONG: the GPU no longer answers after modal_pool on cpu.")
    assert "distill_loss   cpu        right   1 of 1" in said


def test_a_gpu_that_raises_is_lost(monkeypatch):
    def raises(device):
        raise RuntimeError("an illegal memory access was encountered")

    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", raises)
    assert machine.is_lost(gpu)
    assert not machine.is_lost(CPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not machine.is_lost(gpu)


def test_what_the_time_does_not_reach_is_late(capsys):
    assert check.main(["--seconds", "0", "--backend", "reference"]) == check.LATE
    assert "distill_loss   reference  late    the time was spent" in capsys.readouterr().out


def test_a_call_that_a_backend_refuses_is_neither_right_nor_wrong(monkeypatch, capsys):
    monkeypatch.setattr(backends, "why_not", lambda name, op, problem: "it is a test" if op == "modal_pool" else None)
    assert check.main(["--backend", "cpu"]) == check.RIGHT
    assert "modal_pool     cpu        cannot  it is a test" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--device", "nowhere"], "--device nowhere: no such kind of device"),
        (["--device", "cuda:7"], "--device cuda:7: PyTorch sees"),
    ],
)
def test_what_is_not_there_is_said_in_a_sentence(argv, sentence, capsys):
    assert check.main(argv) == check.WRONG
    assert capsys.readouterr().err.startswith(f"mfd-fast check: {sentence}")


def test_a_backend_that_cannot_run_is_said(monkeypatch, capsys):
    monkeypatch.setattr(backends, "status", lambda: {"cuda": "there is no GPU", "reference": None})
    assert check.main(["--backend", "cuda"]) == check.WRONG
    assert capsys.readouterr().err == "mfd-fast check: backend 'cuda' cannot run here: there is no GPU\n"


def test_each_backend_is_checked_where_its_tensors_lie(monkeypatch):
    monkeypatch.setattr(backends, "status", lambda: dict.fromkeys(backends.NAMES))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = torch.device("cuda")
    assert check.places()[0] == {"cuda": gpu, "triton": gpu, "cpu": CPU, "reference": gpu}
    assert set(check.places("cpu")[0].values()) == {CPU}


def test_every_public_op_is_checked_first_of_all(monkeypatch):
    monkeypatch.undo()
    ops = {n for n in mfd.__all__ if inspect.isfunction(getattr(mfd, n))} - {"explain", "use_backend"}
    first = [OPS[op].public or op for op, _, _ in check.CASES[: len(ops)]]
    assert set(first) == ops
    begin = [(OPS[w.op].public or w.op, w.dtype) for w in check.workloads()[: 2 * len(ops)]]
    assert set(begin) == {(op, dtype) for op in ops for dtype in ("float32", "bfloat16")}
    assert len(ops) == len(check.OPS)


def test_it_needs_neither_pytest_nor_the_tests(tmp_path):
    script = (
        "import sys\nsys.modules['pytest'] = sys.modules['harness'] = None\n"
        "from mfd_fast import check\ncheck.CASES = check.CASES[2:3]\n"
        "sys.exit(check.main(['--device', 'cpu', '--backend', 'reference']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
