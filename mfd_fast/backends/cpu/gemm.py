"""Matrix products by the libraries that PyTorch carries, in the dtype of the operands and never under autocast."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import allocate


@functools.cache
def _onednn() -> Any:
    """oneDNN's float32 linear, which torch.compile uses too, or None where this PyTorch lacks it.

    MKL, which torch.mm calls, runs at a third of its speed on processors that are not Intel's.
    """
    try:
        op = torch.ops.mkldnn._linear_pointwise.default
        works = bool((op(torch.eye(2), torch.eye(2), None, "none", [], "") == torch.eye(2)).all())
    except (AttributeError, RuntimeError):
        return None
    return op if works else None


def _plain(matrix: Tensor) -> Tensor:
    """Dense in either order."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x · weightᵀ + bias`` for ``x [N, K]``, ``weight [C, K]`` of one dtype, any strides; contiguous ``[N, C]``."""
    # The op trusts its operands to be dense, and takes the strides of a dimension of size 1 at their word.
    if x.dtype is torch.float32 and min(*x.shape, weight.shape[0]) > 1:
        op = _onednn()
        if op is not None:
            bias = None if bias is None else bias.contiguous()
            product: Tensor = op(_plain(x), _plain(weight), bias, "none", [], "")
            return product
    shape = torch.Size([x.shape[0], weight.shape[0]])
    out = allocate.empty_large(shape, x.dtype, x.device)  # out= keeps autocast away
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)
