"""The executed machine code gives the right numbers, and the counts are those of instructions that can be told."""

import shutil
import subprocess

import eager
import pytest
import torch
from torch import Tensor

from machine_code import counting, sass
from machine_code.machine import Machine
from machine_code.rows import RowCase, run
from mfd_fast.testing import assert_close_to_float64

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None or sass.tools() is None, reason="nvcc and nvdisasm make and read the machine code"
)

COPY = """
#include <cstdint>
extern "C" __global__ void copy(const uint4* a, uint4* b, int n) {
  for (int k = blockIdx.x * 64 + threadIdx.x; k < n; k += gridDim.x * 64) b[k] = a[k];
}
"""


def test_a_copy_counts_exactly(tmp_path):
    """One load and one store of 16 bytes for each, and every byte arrives."""
    source, cubin = tmp_path / "copy.cu", tmp_path / "copy.cubin"
    source.write_text(COPY)
    subprocess.run([shutil.which("nvcc"), "-arch=sm_90", "-O3", "-cubin", source, "-o", cubin], check=True)
    kernel = sass.read(cubin, "^copy$")["copy"]
    a = torch.randint(0, 2**31, (4 * 640,), dtype=torch.int32)
    b = torch.zeros_like(a)
    words = torch.tensor([a.data_ptr(), b.data_ptr(), 640], dtype=torch.int64)
    trace = Machine(kernel, words.numpy().tobytes()[:20], 64, 1, 1, 0).run()
    assert torch.equal(a, b)
    counted = counting.counts(kernel, trace)
    assert counted["global"] == 2 * 640 // 32
    assert counted["bytes loaded"] == counted["bytes stored"] == 640 * 16


def loss_and_gradient(case: RowCase, student: Tensor, teacher: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Plain PyTorch in the dtype of its arguments."""
    student = student.detach().clone().requires_grad_()
    hard_weight = 0.5 if case.labels else 0.0
    loss = eager.distill_loss(
        student, teacher, labels, divergence=case.divergence, temperature=2.0, hard_weight=hard_weight
    )
    return loss.detach(), torch.autograd.grad(loss, student)[0]


CASES = [
    RowCase(112, "bfloat16", True),
    RowCase(257, "float32", True),
    RowCase(1100, "bfloat16"),
    # Unaligned rows of each lean divergence, in registers and in shared memory.
    *(
        pytest.param(RowCase(classes, "bfloat16", labels, divergence), marks=pytest.mark.rest)
        for divergence in ("reverse_kl", "tvd", "jsd", "skew_kl", "skew_reverse_kl")
        for classes, labels in ((257, True), (1100, False))
    ),
    *(pytest.param(RowCase(1100, "float32", True, name), marks=pytest.mark.rest) for name in ("reverse_kl", "tvd")),
    *(
        pytest.param(RowCase(classes, dtype, labels, name), marks=pytest.mark.rest)
        for name in ("dkd", "nkd")
        for classes, dtype, labels in ((257, "bfloat16", True), (1100, "bfloat16", False), (1100, "float32", True))
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_machine_code_obeys_the_tolerance_rule(case: RowCase):
    launches, (loss, student, teacher, labels) = run(case, 6, 1, None)
    assert len(launches) == 1
    (gradient,) = torch.autograd.grad(loss, student)
    exact = loss_and_gradient(case, student.double(), teacher.double(), labels)
    plain = loss_and_gradient(case, student, teacher, labels)
    for k, found in enumerate((loss.detach(), gradient)):
        assert_close_to_float64(found, exact[k], plain[k], f"{case.name}: {('loss', 'gradient')[k]}")


def test_a_launch_in_part_leaves_nothing_for_the_next():
    """Of the blocks that add up a loss, one arrives; those of the next call count from 0."""
    case = RowCase(112)
    launches, _ = run(case, 64, 4, {0})
    assert launches[0].grid > 1
    loss, student, teacher, labels = case.call(64)
    exact = loss_and_gradient(case, student.double(), teacher.double(), labels)[0]
    plain = loss_and_gradient(case, student, teacher, labels)[0]
    assert_close_to_float64(loss.detach(), exact, plain, "loss")
