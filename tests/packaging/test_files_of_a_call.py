"""How many files one distill_loss call goes through on each backend: docs/adding_an_op.md has the bounds."""

import re
import sys
from pathlib import Path

import pytest
import torch

import mfd_fast as mfd
from mfd_fast.backends import plans

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adding_an_op.md").read_text(encoding="utf-8")
#: Where the C++ of the call begins: what Python calls, and the kernel itself.
NATIVE = {
    "cpu": ["bindings/distill_loss.cpp", "bindings/problems.cpp", "cpu/runtime/distill.cpp", "cpu/distill/forward.h"],
    "cuda": [
        *("bindings/cuda/distill_loss.cpp", "bindings/problems.cpp"),
        *("cuda/distill/forward.cu", "cuda/distill/lean_forward_kl.cu"),
    ],
}


def step(backend):
    student, teacher = torch.randn(4, 50, requires_grad=True), torch.randn(4, 50)
    mfd.distill_loss(student, teacher, torch.randint(50, (4,)), hard_weight=0.5, backend=backend).backward()


def python_files(backend):
    """Those of which a function runs, in a call that is like no earlier one; what is imported runs before."""
    step(backend)
    plans.forget()
    found = set()

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and (ROOT / "mfd_fast" in path.parents or ROOT / "kernels" in path.parents):
            found.add(path.relative_to(ROOT).as_posix())

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        step(backend)
    finally:
        sys.setprofile(before)
    return found


def native_files(backend):
    """Those sources and all that they include."""
    found, pending = set(), list(NATIVE.get(backend, []))
    while pending:
        name = pending.pop()
        (path,) = [p for p in (ROOT / "csrc" / name, ROOT / "kernels" / name) if p.is_file()]
        if path not in found:
            found.add(path)
            pending += re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
    return found


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda", pytest.param("triton", marks=pytest.mark.rest)])
def test_a_call_goes_through_few_files(backend):
    python, native = python_files(backend), native_files(backend)
    assert {"mfd_fast/ops/distill_loss.py", "mfd_fast/problems/rows.py"} < python
    row = re.search(rf"^\| `{backend}` \| (\d+) \| (\d+) \|", PAGE, re.MULTILINE)
    found = len(python), len(native)
    assert found[0] <= int(row[1]), sorted(python)
    assert found[1] <= int(row[2]), sorted(native)
