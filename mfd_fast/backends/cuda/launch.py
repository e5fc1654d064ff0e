"""What every launch needs: the caller's device and stream, numbers that may lie on the device, scratch memory."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from . import emulating

_workspaces: dict[tuple[str, int, int], Tensor] = {}


def where(device: torch.device) -> tuple[int, int]:
    """(device number, address of the current stream): the last two arguments of every launcher."""
    if emulating():
        return 0, 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.current_stream(index).cuda_stream


def number(value: float | Tensor, dtype: torch.dtype, device: torch.device, keep: list[Any]) -> tuple[int, float]:
    """(address in device memory, or 0; value). Nothing waits for the device."""
    if not isinstance(value, Tensor):
        return 0, float(value)
    if value.device != device:  # a 0-d CPU tensor: its value is at hand
        return 0, float(value)
    value = value.to(dtype)
    keep.append(value)
    return value.data_ptr(), 0.0


def workspace(device: torch.device, nbytes: int, purpose: str = "scalar") -> Tensor:
    """``nbytes`` of device memory for the launches of one stream, one after the other; apart for each ``purpose``.

    It begins as zeros; what must be 0 before a launch is 0 again after it. A graph that is being captured gets memory
    of its own: it may be replayed beside later launches of this stream. Other memory is not PyTorch's: before it
    captures, torch.compile(mode="reduce-overhead") runs a call with the graph's pool in place of the allocator, and
    refuses a tensor of that pool which outlives the call.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)
    key = (purpose, *where(device))
    found = _workspaces.get(key)
    if found is None or found.numel() < nbytes:
        found = _workspaces[key] = _owned(nbytes, device)
    return found


def kept_workspace(index: int, stream: int, nbytes: int, purpose: str) -> int:
    """Address of what :func:`workspace` has made for a stream (a CPU's: 0); 0 for none, and while a graph is captured:
    that is no call for a plan.
    """
    found = _workspaces.get((purpose, index, stream))
    if found is None or found.numel() < nbytes or (found.is_cuda and torch.cuda.is_current_stream_capturing()):
        return 0
    return found.data_ptr()


def _owned(nbytes: int, device: torch.device) -> Tensor:
    """Zeroed memory that stays until the process ends: an outgrown one may still be in use by queued launches."""
    if device.type != "cuda":
        return torch.zeros(nbytes, dtype=torch.uint8, device=device)
    return torch.as_tensor(_Allocation(nbytes, device), device=device).zero_()


class _Allocation:
    """Device memory from the driver, for ``torch.as_tensor``. Raises RuntimeError if there is none left."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        address = ctypes.c_uint64()
        with torch.cuda.device(device):
            torch.cuda.mem_get_info(device)  # makes the device's context that of this thread
            status = _driver().cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(nbytes))
        if status:
            raise RuntimeError(f"mfd_fast: the CUDA driver gives no {nbytes} bytes of scratch memory (error {status})")
        data = (address.value, False)
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": data, "version": 2}


@functools.lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
