"""Buffers that count or hold probabilities keep their precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class FixedPrecision(nn.Module):
    """``.half()``, ``.bfloat16()`` and ``.to(dtype)`` leave this module's own buffers in the dtype they have.

    A running sum in bfloat16 stops at 256 counts, one in float16 overflows at 65504. Parameters follow as usual.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        buffers = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in buffers.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self
