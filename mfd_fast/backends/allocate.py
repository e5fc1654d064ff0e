"""The only place where outputs are allocated, so that tests can poison every one of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Hook = Callable[[Tensor], Tensor]
Provider = Callable[[torch.Size, torch.dtype], "Tensor | None"]

_hook: Hook | None = None
_cpu_gradient_provider: Provider | None = None


class _OfThread(threading.local):
    plain = False


_of_thread = _OfThread()


@contextlib.contextmanager
def unhooked() -> Iterator[None]:
    """This thread's allocations are PyTorch's own inside the block."""
    before, _of_thread.plain = _of_thread.plain, True
    try:
        yield
    finally:
        _of_thread.plain = before


def set_hook(hook: Hook | None) -> Hook | None:
    """Passes every later allocation through ``hook(tensor) -> tensor``; returns the previous hook."""
    global _hook
    previous, _hook = _hook, hook
    return previous


def set_cpu_gradient_provider(provider: Provider | None) -> Provider | None:
    """``provider(shape, dtype)`` returns recycled memory for a large CPU gradient, or None to decline.

    Returns the previous provider.
    """
    global _cpu_gradient_provider
    previous, _cpu_gradient_provider = _cpu_gradient_provider, provider
    return previous


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised contiguous tensor; the caller writes every element."""
    return _hooked(torch.empty(shape, dtype=dtype, device=device))


def _hooked(out: Tensor) -> Tensor:
    return out if _hook is None or _of_thread.plain else _hook(out)


def empty_large(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """:func:`empty` for outputs that may be large: on a CPU from memory that an earlier one has left."""
    out = None
    if _cpu_gradient_provider is not None and device.type == "cpu" and not _of_thread.plain:
        out = _cpu_gradient_provider(shape, dtype)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    return _hooked(out)


def empty_gradient(like: Tensor) -> Tensor:
    """Uninitialised contiguous tensor of ``like``'s shape, dtype and device for a large gradient."""
    return empty_large(like.shape, like.dtype, like.device)
