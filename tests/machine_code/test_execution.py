"""The executed machine code gives the right numbers, and the counts are those of instructions that can be told."""

import shutil
import subprocess

import pytest
import torch
from torch import Tensor
from torch.nn import functional

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


def kl_and_gradient(student: Tensor, teacher: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Plain PyTorch in the dtype of its arguments."""
    student = student.detach().clone().requires_grad_()
    log_q, log_p = (torch.log_softmax(x / 2.0, -1) for x in (student, teacher))
    loss = 4.0 * functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    if labels is not None:
        loss = loss + 0.5 * functional.cross_entropy(student, labels)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


CASES = [RowCase(112, "bfloat16", True), RowCase(257, "float32", True), RowCase(1100, "bfloat16")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_machine_code_obeys_the_tolerance_rule(case: RowCase):
    launches, (loss, student, teacher, labels) = run(case, 6, 1, None)
    assert len(launches) == 1
    (gradient,) = torch.autograd.grad(loss, student)
    exact = kl_and_gradient(student.double(), teacher.double(), labels)
    eager = kl_and_gradient(student, teacher, labels)
    for k, found in enumerate((loss.detach(), gradient)):
        assert_close_to_float64(found, exact[k], eager[k], f"{case.name}: {('loss', 'gradient')[k]}")
