"""Poisoned outputs: what a kernel does not write is seen, and what it writes out of bounds is seen too.

Inside ``with poison():`` every buffer that a backend allocates starts as a NaN with a payload of its own (or as
an integer sentinel) and lies between two red zones. On exit the red zones must be intact and no element may
still hold the poison. A NaN that a kernel computes has another payload: a rightful NaN is not taken for poison.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..backends import allocate

#: Red zone on each side, in bytes; a multiple of 64 keeps the buffer aligned as the allocator would.
RED_ZONE_BYTES = 256

# Bit patterns. The floating ones are quiet NaNs: sign and exponent all ones, then a payload.
_PATTERNS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float16: (torch.int16, 0xFEAD - 0x10000),
    torch.bfloat16: (torch.int16, 0xFFAD - 0x10000),
    torch.float32: (torch.int32, 0xFFC0DEAD - 0x100000000),
    torch.float64: (torch.int64, 0xFFF8DEADDEADDEAD - 0x10000000000000000),
    torch.bool: (torch.uint8, 0xA5),
    torch.uint8: (torch.uint8, 0xA5),
    torch.int8: (torch.int8, 0xA5 - 0x100),
    torch.int16: (torch.int16, 0xDEAD - 0x10000),
    torch.int32: (torch.int32, 0xDEADBEEF - 0x100000000),
    torch.int64: (torch.int64, 0xDEADBEEFDEADBEEF - 0x10000000000000000),
}


class PoisonError(AssertionError):
    """A buffer was left partly unwritten, or written beyond its end."""


class PoisonedBuffers:
    """The buffers handed out inside one ``with poison()`` block."""

    def __init__(self, require_written: bool) -> None:
        self._require_written = require_written
        self._made: list[tuple[Tensor, torch.Size, int, int]] = []

    def __len__(self) -> int:
        return len(self._made)

    def forget(self) -> None:
        """Stop watching the buffers handed out so far."""
        self._made.clear()

    def guard(self, fresh: Tensor) -> Tensor:
        """A poisoned tensor like ``fresh`` between two red zones."""
        bits, pattern = _PATTERNS[fresh.dtype]
        zone = RED_ZONE_BYTES // bits.itemsize
        base = torch.full((fresh.numel() + 2 * zone,), pattern, dtype=bits, device=fresh.device)
        self._made.append((base, fresh.shape, zone, pattern))
        # set_ instead of slicing: autograd must not take the buffer for a view.
        like = torch.empty(0, dtype=fresh.dtype, device=fresh.device)
        strides = torch.empty(fresh.shape, device="meta").stride()
        return like.set_(base.untyped_storage(), zone, fresh.shape, strides)

    def verify(self) -> None:
        """Check every buffer handed out so far.

        Raises:
            PoisonError: naming the first buffer that is at fault.
        """
        for number, (base, shape, zone, pattern) in enumerate(self._made):
            held = base == pattern
            size = base.numel() - 2 * zone
            name = f"buffer {number} of shape {list(shape)}"
            for side, part in (("before", held[:zone]), ("behind", held[zone + size :])):
                if not bool(part.all()):
                    raise PoisonError(f"{name}: {int((~part).sum())} elements written {side} it")
            unwritten = held[zone : zone + size]
            if self._require_written and bool(unwritten.any()):
                first = int(unwritten.nonzero()[0])
                count = int(unwritten.sum())
                raise PoisonError(f"{name}: {count} of {size} elements never written, first at flat index {first}")


@contextmanager
def poison(require_written: bool = True) -> Iterator[PoisonedBuffers]:
    """Poisons every buffer of ``mfd_fast.backends.allocate`` inside the block and verifies them at its end.

    Args:
        require_written: every element of every buffer must have been written by the end.

    Raises:
        PoisonError: at the end; not raised over an exception that is already on its way.

    Example:
        >>> with poison() as buffers:
        ...     buffer = allocate.empty((3,), torch.float32, torch.device("cpu"))
        ...     poisoned = bool(buffer.isnan().all())
        ...     _ = buffer.zero_()
        >>> poisoned, len(buffers)
        (True, 1)
    """
    buffers = PoisonedBuffers(require_written)
    previous = allocate.set_hook(buffers.guard)
    try:
        yield buffers
    finally:
        allocate.set_hook(previous)
    buffers.verify()
