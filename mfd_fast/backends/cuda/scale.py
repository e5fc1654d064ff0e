"""Multiplication of saved gradients by the gradient of the loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...codes import DTYPES
from . import native
from .launch import where


def scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    """:func:`scale_gradients_` of one."""
    native().cuda.scale_in_place(
        gradient.data_ptr(),
        DTYPES[gradient.dtype],
        gradient.numel(),
        factor.data_ptr(),
        DTYPES[factor.dtype],
        *where(gradient.device),
    )


def scale_gradients_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Each of the contiguous ``gradients`` ``*= factor`` (0-d, same device) in place, in one launch for all.

    Nothing is touched where ``factor`` is 1. The host does not wait for its value.
    """
    filled = [g for g in gradients if g.numel()]
    if len(filled) == 1:
        scale_gradient_(filled[0], factor)
    elif filled:
        described = [(g.data_ptr(), DTYPES[g.dtype], g.numel()) for g in filled]
        native().cuda.scale_all(described, factor.data_ptr(), DTYPES[factor.dtype], *where(filled[0].device))
