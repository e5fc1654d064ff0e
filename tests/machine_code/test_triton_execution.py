"""The machine code of Triton's row kernels gives the right numbers, on the common road and on the careful one."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mfd_fast
from machine_code import sass
from machine_code.rows import DTYPES, RowCase
from mfd_fast.testing import assert_close_to_float64

pytestmark = pytest.mark.skipif(sass.tools() is None, reason="nvdisasm reads the machine code")

#: Rows that are held and rows that stream past, in few and in many programs.
CASES = [
    RowCase(112, "bfloat16", True),
    RowCase(257, "float32", True),
    RowCase(1100, "bfloat16"),
    RowCase(9000, "bfloat16", True),
    RowCase(5000, "float32"),
    RowCase(600, divergence="reverse_kl"),
    RowCase(3000, divergence="reverse_kl"),
    RowCase(300, labels=True, divergence="jsd"),
    RowCase(3000, divergence="jsd"),
    RowCase(3000, labels=True, divergence="skew_kl"),
    RowCase(600, divergence="skew_reverse_kl"),
    RowCase(3001, divergence="tvd"),
]


def call(case: RowCase, special: bool):
    """Rows of a case; special: with -inf on one side, on both and NaN in some of them."""
    torch.manual_seed(0)
    student, teacher = ((torch.randn(5, case.classes) * 2).to(DTYPES[case.dtype]) for _ in range(2))
    labels = torch.tensor([3, 0, case.classes - 1, 7, 50]) if case.labels else None
    if special:
        student[0, 5] = teacher[0, 5] = -torch.inf
        teacher[1, 9] = -torch.inf
        student[2, 11] = -torch.inf
        teacher[3, 13] = torch.nan
    return student, teacher, labels


def loss_and_gradient(case, student, teacher, labels, backend):
    student = student.detach().clone().requires_grad_()
    hard = 0.5 if case.labels else 0.0
    options = {"divergence": case.divergence, "temperature": 2.0, "hard_weight": hard}
    loss = mfd_fast.distill_loss(student, teacher, labels, **options, backend=backend)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@pytest.mark.rest
def test_the_machine_code_of_triton_obeys_the_tolerance_rule(tmp_path):
    calls = [
        (case, special, *call(case, special)) for case in CASES for special in {False, case.divergence == "forward_kl"}
    ]
    kept, results = tmp_path / "calls", tmp_path / "results"
    torch.save([(dataclasses.asdict(case), *tensors) for case, _, *tensors in calls], kept)
    program = Path(__file__).with_name("triton_rows.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "triton")
    subprocess.run([sys.executable, program, "--execute", kept, results], check=True, env=environment)
    for (case, special, student, teacher, labels), (loss, gradient) in zip(calls, torch.load(results), strict=True):
        exact = loss_and_gradient(case, student.double(), teacher.double(), labels, "reference")
        eager = loss_and_gradient(case, student, teacher, labels, "reference")
        context = f"{case.name}{' special' if special else ''}"
        if special:
            assert bool(torch.isnan(loss)) == bool(torch.isnan(exact[0])), context
        else:
            assert_close_to_float64(loss, exact[0], eager[0], f"{context}: loss")
        assert torch.equal(gradient.isnan(), exact[1].isnan()), context
        fine = ~exact[1].isnan()
        assert_close_to_float64(gradient[fine], exact[1][fine], eager[1][fine], f"{context}: gradient")
