"""Native CPU kernels: availability, instruction set, where outputs are written, and the pool of gradient buffers.

``MFD_FAST_CPU_ISA`` (baseline, avx2, avx512) overrides the instruction set; ``MFD_FAST_GRAD_POOL_MB`` bounds the
memory that lies idle in the pool (default 256), 0 turns the pool off.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import NamedTuple

import torch  # before the native module: both then share one OpenMP runtime
from torch import Tensor

from .. import allocate, environment

__all__ = ["BufferPoolStats", "available", "buffer_pool_stats", "clear_buffer_pool", "isa", "set_buffer_pool_limit"]

#: Gradients below this many bytes come from PyTorch's allocator.
POOL_MIN_BYTES = 1 << 20
#: Outputs of at least this many bytes in one call are written past the caches.
STREAM_BYTES = 4 << 20

_POOLED = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class BufferPoolStats(NamedTuple):
    """Bytes and buffers of the gradient pool; ``live`` ones are held by tensors."""

    limit: int
    idle_bytes: int
    live_bytes: int
    idle_buffers: int
    live_buffers: int
    reused: int
    mapped: int


_module: ModuleType | None = None


@functools.cache
def available() -> str | None:
    """None if the native module runs here, else the reason in one sentence.

    Raises:
        ValueError: an environment variable asks for what does not exist.
    """
    global _module
    try:
        module = importlib.import_module("mfd_fast._C")
    except ImportError as error:
        if getattr(error, "name", None) == "mfd_fast._C":
            return "the native module mfd_fast._C is not built (install mfd_fast again with a C++ compiler)"
        return f"the native module mfd_fast._C does not load: {error}"
    try:
        module.select_isa(environment.cpu_isa())
        module.pool_set_limit(environment.gradient_pool_bytes())
    except AttributeError as error:
        return str(error)
    allocate.set_cpu_gradient_provider(_recycled)
    _module = module
    return None


def native() -> ModuleType:
    """The native module; raises ImportError with the reason where there is none."""
    reason = available()
    if reason is not None or _module is None:
        raise ImportError(f"mfd_fast: {reason}")
    return _module


def isa() -> str:
    """Instruction set in use: "baseline", "avx2" or "avx512"."""
    name: str = native().current_isa()
    return name


def streams(*outputs: Tensor | None) -> bool:
    """Whether these outputs of one call are written past the caches."""
    return sum(t.nbytes for t in outputs if t is not None) >= STREAM_BYTES


def _recycled(shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    size = shape.numel() * dtype.itemsize
    if size < POOL_MIN_BYTES or dtype not in _POOLED:
        return None
    capsule = native().pool_lend(shape, dtype is torch.bfloat16, dtype.itemsize)
    return None if capsule is None else torch.from_dlpack(capsule)


def set_buffer_pool_limit(nbytes: int) -> None:
    """Bounds the bytes that lie idle in the pool of gradient buffers; 0 turns recycling off.

    Large gradients are written into memory that an earlier gradient has left: touching fresh pages would cost
    more than computing them. A buffer returns to the pool when the last tensor on its storage is gone.

    Raises:
        TypeError, ValueError: ``nbytes`` is not an integer >= 0.
    """
    if not isinstance(nbytes, int) or isinstance(nbytes, bool):
        raise TypeError(f"set_buffer_pool_limit: nbytes must be an int, got {nbytes!r}")
    if nbytes < 0:
        raise ValueError(f"set_buffer_pool_limit: nbytes must be >= 0, got {nbytes}")
    native().pool_set_limit(nbytes)


def buffer_pool_stats() -> BufferPoolStats:
    """What the pool holds now, and how often it has reused or mapped a buffer."""
    return BufferPoolStats(*native().pool_stats())


def clear_buffer_pool() -> None:
    """Returns the idle buffers to the operating system."""
    native().pool_clear()
