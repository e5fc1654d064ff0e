"""Launches go to the caller's stream and device; a launch neither waits, allocates nor leaves a device current."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from harness import evaluate, on
from op_db import SAMPLE_CASES, SAMPLE_IDS

from mfd_fast.backends import cuda
from mfd_fast.backends.cuda import launch
from mfd_fast.testing import without_plans

ROOT = Path(__file__).resolve().parents[3]
STREAM, DEVICE = 0x5EED, 1
CASES = [(case, i) for case, i in zip(SAMPLE_CASES, SAMPLE_IDS, strict=True) if case[1] == "cuda"]
MODULES = [importlib.import_module(f"{cuda.__name__}.{m.name}") for m in pkgutil.iter_modules(cuda.__path__)]


@pytest.mark.parametrize(("record", "backend", "name"), [c for c, _ in CASES], ids=[i for _, i in CASES])
def test_every_launch_takes_the_callers_stream_and_device(monkeypatch, record, backend, name):
    for module in MODULES:
        if hasattr(module, "where"):
            monkeypatch.setattr(module, "where", lambda device: (DEVICE, STREAM))
    native = cuda.native()
    for names in (record.differentiable[:1], record.differentiable):
        native.take_starts()
        with without_plans():  # which ask PyTorch itself
            evaluate(record, on(record, backend), record.samples()[name], names=names)
        assert set(native.take_starts()) == {(STREAM, DEVICE)}
        assert native.current_device() == 0


#: Of the runtime: none of them waits for the device, allocates, or is refused while a stream is captured.
QUIET = {
    *("cudaGetDevice", "cudaSetDevice", "cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaLaunchKernelEx"),
    *("cudaGetErrorString", "cudaGetLastError"),
    *("cudaOccupancyMaxActiveBlocksPerMultiprocessor", "cudaOccupancyMaxActiveClusters"),
}


def test_launchers_call_nothing_that_waits_or_allocates():
    used = set()
    for tree in ("csrc/cuda", "kernels/cuda", "csrc/common"):
        for path in sorted(p for p in (ROOT / tree).rglob("*") if p.is_file()):
            code = re.sub(r"//.*", "", path.read_text())
            used |= set(re.findall(r"\bcu(?:da)?[A-Z]\w*(?=\s*\()", code))
            assert "<<<" not in code, path
            assert not re.search(r"#include <(cub|thrust|cublas|nccl|cudnn)", code), path
            assert not re.search(r"\b(malloc|new [A-Za-z_]|printf)\s*\(?", code) or tree == "csrc/common", path
    assert used <= QUIET
    assert "cudaLaunchKernelEx" in used


def test_scratch_memory_belongs_to_a_stream(monkeypatch):
    at = {"key": (0, 1)}
    monkeypatch.setattr(launch, "_workspaces", {})
    monkeypatch.setattr(launch, "where", lambda device: at["key"])
    cpu = torch.device("cpu")
    first = launch.workspace(cpu, 64)
    assert not bool(first.any())
    assert launch.workspace(cpu, 48) is first
    for key in ((0, 2), (1, 1)):
        at["key"] = key
        assert launch.workspace(cpu, 64) is not first
    at["key"] = (0, 1)
    assert launch.workspace(cpu, 64) is first
    assert launch.workspace(cpu, 128).numel() == 128


def test_a_captured_graph_gets_scratch_memory_of_its_own(monkeypatch):
    """It may be replayed beside later launches of the stream that it was captured on."""
    kept = {}
    zeros = torch.zeros
    monkeypatch.setattr(launch, "_workspaces", kept)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda n, dtype, device: zeros(n, dtype=dtype))
    a, b = (launch.workspace(torch.device("cuda", 0), 64) for _ in range(2))
    assert a.data_ptr() != b.data_ptr()
    assert kept == {}


def test_scratch_memory_is_left_as_it_was_found():
    """What must be 0 before a launch is 0 again after it: only sums and counts differ."""
    from op_db import RECORDS

    record = RECORDS["distill_loss"]
    results = [
        evaluate(record, on(record, "cuda"), record.samples(rows=rows)["labels"], names=("student",)).outputs["loss"]
        for rows in (6, 40, 6)
    ]
    assert torch.equal(results[0], results[2])
