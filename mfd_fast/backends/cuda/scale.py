"""Multiplication of saved gradients by the gradient of the loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..cpu.rows import DTYPES
from . import native
from .launch import where


def scale_gradients_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Each of the contiguous ``gradients`` ``*= factor`` (0-d, same device) in place, in one launch for all.

    Nothing is touched where ``factor`` is 1. The host does not wait for its value.
    """
    filled = [(g.data_ptr(), DTYPES[g.dtype], g.numel()) for g in gradients if g.numel()]
    if filled:
        device = gradients[0].device
        native().cuda.scale_all(filled, factor.data_ptr(), DTYPES[factor.dtype], *where(device))
