"""The choice of a backend: who asks, who wins, what explain says, and never a silent fallback."""

import os
import subprocess
import sys

import pytest
import torch
from op_db import CASE_IDS, CASES, RECORDS

import mfd_fast as mfd
from mfd_fast import backends
from mfd_fast.testing import without_plans

SAMPLE = RECORDS["distill_loss"].samples()["plain"]


@pytest.mark.parametrize(("record", "backend"), CASES, ids=CASE_IDS)
def test_explain_tells_what_runs(record, backend):
    arguments = next(iter(record.samples().values()))
    choice = mfd.explain(record.op, **arguments, backend=backend)
    assert choice.backend == backend
    assert f"backend='{backend}' was passed" in choice.reason
    assert set(choice.rejected) == set(backends.NAMES) - {backend}
    assert all(choice.rejected.values())
    assert str(choice).startswith(f"{backend}: ")


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_default_choice(record):
    choice = mfd.explain(record.op, **next(iter(record.samples().values())))
    assert choice.backend == ("cpu" if "cpu" in record.backends else "reference")
    for name in ("cuda", "triton"):
        expected = "only when asked for" if name in record.backends else f"no {name} kernel"
        assert expected in choice.rejected[name]


def test_nearest_request_wins(monkeypatch):
    def chosen(**options):
        return mfd.explain(mfd.distill_loss, **SAMPLE, **options).backend

    monkeypatch.setenv("MFD_FAST_BACKEND", "triton")
    assert chosen() == "triton"
    with mfd.use_backend("reference"):
        assert chosen() == "reference"
        with mfd.use_backend("cpu"):
            assert chosen() == "cpu"
        assert chosen() == "reference"
        assert chosen(backend="cpu") == "cpu"
    assert chosen() == "triton"
    monkeypatch.setenv("MFD_FAST_BACKEND", "")
    assert chosen() == "cpu"


def test_request_ends_with_its_block_also_after_an_error():
    with pytest.raises(KeyError), mfd.use_backend("reference"):
        raise KeyError
    assert mfd.explain(mfd.distill_loss, **SAMPLE).backend == "cpu"


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton", "reference"])
def test_the_backend_that_was_asked_for_is_the_one_that_runs(monkeypatch, backend):
    """Every other backend's entry points would fail loudly."""

    def fail(*args, **kwargs):
        raise AssertionError("the wrong backend ran")

    for other in {"cpu", "cuda", "triton"} - {backend}:
        module = backends.implementation(other, "distill_loss")
        for entry in ("scalar", "per_row", "per_row_backward"):
            monkeypatch.setattr(module, entry, fail)
    student = SAMPLE["student"].clone().requires_grad_()
    for reduction in ("mean", "none"):
        loss = mfd.distill_loss(student, SAMPLE["teacher"], reduction=reduction, backend=backend)
        loss.sum().backward()
    if backend == "reference":
        return
    module = backends.implementation(backend, "distill_loss")
    monkeypatch.setattr(module, "scalar", fail)
    with without_plans(), pytest.raises(AssertionError, match="the wrong backend ran"):
        mfd.distill_loss(student, SAMPLE["teacher"], backend=backend)


def test_a_refusal_names_the_reason_and_the_default_passes_on():
    call = {**SAMPLE, "divergence": mfd.JSD(0.001)}
    for backend in ("cpu", "triton"):
        with pytest.raises(mfd.BackendError, match=rf"backend '{backend}' cannot run .*JSD\(beta=0.001\).* a limit"):
            mfd.distill_loss(**call, backend=backend)
    choice = mfd.explain(mfd.distill_loss, **call)
    assert choice.backend == "reference"
    assert all("a limit" in choice.rejected[name] for name in ("cpu", "triton"))
    assert mfd.distill_loss(**call).isfinite()


def python(code, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MFD_FAST", "TRITON"))}
    return subprocess.run([sys.executable, "-c", code], env={**env, **environment}, capture_output=True, text=True)


CALL = "import torch, mfd_fast as mfd; x = torch.zeros(2, 3); print(mfd.explain(mfd.distill_loss, x, x).backend);"


def test_import_needs_neither_triton_nor_the_native_module():
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['mfd_fast._C'] = None\n"
        + CALL
        + "\nprint(float(mfd.distill_loss(x, x + torch.eye(2, 3))) > 0)"
        + "\nfor name in ('cpu', 'triton'):"
        + "\n    try: mfd.distill_loss(x, x, backend=name)"
        + "\n    except mfd.BackendError as error: print(error)"
    )
    done = python(code)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["reference", "True"], done.stderr
    assert "distill_loss: backend 'cpu' cannot run" in lines[2]
    assert "distill_loss: backend 'triton' cannot run" in lines[3]


def test_import_loads_no_heavy_module():
    done = python(
        "import sys, mfd_fast; print([m for m in ('triton', 'numpy.f2py', 'matplotlib') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_triton_without_a_gpu_says_how_to_run_it():
    done = python(CALL + "mfd.distill_loss(x, x, backend='triton')")
    assert done.stdout.strip() == "cpu"
    assert "BackendError" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr


def test_unknown_instruction_set_is_refused_in_one_sentence():
    done = python(CALL + "mfd.distill_loss(x, x, backend='cpu')", MFD_FAST_CPU_ISA="sse9")
    assert done.stdout.strip() == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ValueError: MFD_FAST_CPU_ISA must be one of baseline, avx2, avx512, got 'sse9'"


def test_environment_variable_chooses_in_a_fresh_process():
    assert python(CALL, MFD_FAST_BACKEND="reference").stdout.strip() == "reference"
    done = python(CALL, MFD_FAST_BACKEND="tpu")
    assert "MFD_FAST_BACKEND must be one of cuda, triton, cpu, reference, got 'tpu'" in done.stderr


def test_tensors_of_another_device_are_refused_with_a_reason():
    x = torch.zeros(2, 3, device="meta")
    for backend, reason in (("cpu", "meta"), ("triton", "CPU tensors only")):
        with pytest.raises(mfd.BackendError, match=f"backend '{backend}' cannot run .*{reason}"):
            mfd.distill_loss(x, x, backend=backend)
