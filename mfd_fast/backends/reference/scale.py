"""Upstream gradients of scalar losses whose gradients are ready, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def scale_gradients_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Each of ``gradients`` ``*= factor`` (0-d, same device); the host waits for no device."""
    if gradients:
        torch._foreach_mul_(list(gradients), factor)
