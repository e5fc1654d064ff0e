"""The poison must show what a kernel leaves out and what it writes too far."""

import ctypes

import pytest
import torch

from mfd_fast.backends import allocate
from mfd_fast.testing import PoisonError, poison

CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32, torch.bool]


def write_bytes(tensor, offset, size=1):
    """What a kernel that is off by ``offset`` bytes does."""
    ctypes.memset(tensor.data_ptr() + offset, 0x11, size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_written_buffer_passes(dtype):
    with poison() as seen:
        buffer = allocate.empty((3, 5), dtype, CPU)
        if dtype.is_floating_point:
            assert buffer.isnan().all()
        buffer.zero_()
    assert len(seen) == 1
    assert buffer.is_contiguous()
    assert not buffer._is_view()


@pytest.mark.parametrize("dtype", DTYPES)
def test_unwritten_element_is_found(dtype):
    with (
        pytest.raises(PoisonError, match=r"1 of 15 elements never written, first at flat index 14"),
        poison(),
    ):
        allocate.empty((3, 5), dtype, CPU).view(-1)[:14] = 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["before", "behind"])
def test_write_out_of_bounds_is_found(dtype, side):
    with poison(require_written=False) as buffers:
        buffer = allocate.empty((3, 5), dtype, CPU).zero_()
        buffers.verify()
        write_bytes(buffer, -1 if side == "before" else buffer.numel() * buffer.element_size())
        with pytest.raises(PoisonError, match=f"1 elements written {side} it"):
            buffers.verify()
        buffers.forget()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rightful_nan_is_not_poison(dtype):
    with poison():
        allocate.empty((4,), dtype, CPU).fill_(torch.nan)
        allocate.empty_gradient(torch.zeros(4, dtype=dtype)).copy_(torch.zeros(4, dtype=dtype) / 0)
        allocate.empty_gradient(torch.zeros(4, dtype=dtype)).copy_(-(torch.zeros(4, dtype=dtype) / 0))


def test_scratch_may_stay_unwritten_on_request():
    with poison(require_written=False):
        allocate.empty((4,), torch.float32, CPU)


def test_hook_is_restored_also_after_an_error_which_is_not_hidden():
    def body():
        with poison():
            allocate.empty((4,), torch.float32, CPU)
            raise KeyError("the error of the body")

    with pytest.raises(KeyError):
        body()
    assert allocate.set_hook(None) is None
    with poison() as outer:
        with poison() as inner:
            allocate.empty((1,), torch.float32, CPU).zero_()
        allocate.empty((1,), torch.float32, CPU).zero_()
    assert (len(outer), len(inner)) == (1, 1)


def test_empty_buffers_are_fine():
    with poison() as seen:
        assert allocate.empty((0, 3), torch.float32, CPU).shape == (0, 3)
    assert len(seen) == 1
