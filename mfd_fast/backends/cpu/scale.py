"""Multiplication of saved gradients by the gradient of the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["scale_gradients_"]


def scale_gradients_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Each of the ``gradients`` ``*= factor`` (0-d) in place; nothing is touched where ``factor`` is 1."""
    if (number := factor.item()) != 1.0:
        torch._foreach_mul_(list(gradients), number)
