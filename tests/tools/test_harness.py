"""What `harness.evaluate` watches in every test is found when it goes wrong."""

import pytest
import torch
from harness import OpRecord, evaluate

from mfd_fast.backends import allocate
from mfd_fast.testing import PoisonError


class Double(torch.autograd.Function):
    """Twice ``x``, with a fault in one place."""

    @staticmethod
    def forward(ctx, x, fault):
        ctx.fault = fault
        out = allocate.empty(x.shape, x.dtype, x.device)
        if fault == "input":
            x.detach().mul_(2)
        elif fault == "version":
            x.add_(0)
        if fault == "unwritten":
            out[:-1] = 2 * x[:-1]
        else:
            torch.mul(x, 2, out=out)
        if fault == "beyond":
            torch.as_strided(out, (1,), (1,), out.storage_offset() + out.numel()).zero_()
        return out

    @staticmethod
    def backward(ctx, grad_output):
        if ctx.fault == "grad_output":
            grad_output.mul_(2)
        return grad_output * 2, None


def run(fault):
    def double(x):
        return Double.apply(x, fault)

    record = OpRecord(
        op=double,
        eager=double,
        samples=lambda **_: {},
        differentiable=("x",),
        outputs=lambda result: {"loss": result},
        errors=list,
    )
    return evaluate(record, double, {"x": torch.randn(3, 4)})


def test_a_sound_op_passes():
    assert bool(run(None).grads["x"].any())


@pytest.mark.parametrize(
    ("fault", "error", "match"),
    [
        ("input", AssertionError, "x was written"),
        ("version", AssertionError, "x: 1 writes in place were counted"),
        ("grad_output", AssertionError, "grad_output 0 was written"),
        ("unwritten", PoisonError, "4 of 12 elements never written"),
        ("beyond", PoisonError, "1 elements written behind"),
    ],
)
def test_a_fault_is_found(fault, error, match):
    with pytest.raises(error, match=match):
        run(fault)
