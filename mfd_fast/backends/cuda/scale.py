"""Multiplication of saved gradients by the gradient of the loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .distill_loss import scale_gradient_

__all__ = ["scale_gradient_", "scale_gradients_"]


def scale_gradients_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Each of the contiguous ``gradients`` ``*= factor``, as :func:`scale_gradient_`."""
    for gradient in gradients:
        scale_gradient_(gradient, factor)
