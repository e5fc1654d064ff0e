"""Scratch memory of launches on a GPU is the driver's, not PyTorch's (a fake driver: no GPU is needed)."""

import contextlib
import ctypes

import pytest
import torch

from mfd_fast.backends.cuda import launch

GPU = torch.device("cuda", 0)


class Driver:
    """Gives host memory, or the error that it was made with."""

    def __init__(self, error=0):
        self.error, self.held, self.inside = error, [], False

    def cuMemAlloc_v2(self, address, nbytes):
        assert self.inside, "no device is current"
        self.held.append((ctypes.c_ubyte * nbytes.value)(*[7] * nbytes.value))
        address._obj.value = ctypes.addressof(self.held[-1])
        return self.error


@pytest.fixture
def driver(monkeypatch):
    made = Driver()

    @contextlib.contextmanager
    def current(device):
        made.inside = True
        yield
        made.inside = False

    def as_tensor(memory, device):
        described = memory.__cuda_array_interface__
        (nbytes,), (address, read_only) = described["shape"], described["data"]
        assert (described["typestr"], read_only, device) == ("|u1", False, GPU)
        return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)

    monkeypatch.setattr(launch, "_driver", lambda: made)
    monkeypatch.setattr(launch, "_workspaces", {})
    monkeypatch.setattr(launch, "where", lambda device: (0, 0))
    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


def test_the_memory_is_the_drivers_zeroed_and_kept(driver):
    first = launch.workspace(GPU, 64)
    assert first.data_ptr() == ctypes.addressof(driver.held[0])
    assert first.numel() == 64
    assert not bool(first.any())
    assert launch.workspace(GPU, 48) is first
    assert launch.workspace(GPU, 65).numel() == 65
    assert len(driver.held) == 2


def test_a_driver_without_memory_is_said(driver):
    driver.error = 2
    with pytest.raises(RuntimeError, match="no 64 bytes of scratch memory"):
        launch.workspace(GPU, 64)


def test_pytorch_is_not_asked_for_it(driver, monkeypatch):
    """Its allocator may be that of a graph's pool."""

    def refuses(*args, **kwargs):
        raise AssertionError("PyTorch's allocator was asked")

    for name in ("empty", "zeros", "full"):
        monkeypatch.setattr(torch, name, refuses)
    assert launch.workspace(GPU, 8, "tickets").numel() == 8
