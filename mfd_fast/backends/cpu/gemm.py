"""Matrix products in the dtype of the operands and never under autocast."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import allocate
from ..native import address
from . import native

#: Up to this many multiplications a call into a library costs more than its better use of the caches saves.
NATIVE_PRODUCTS = 1 << 24


@functools.cache
def onednn() -> Any:
    """oneDNN's float32 linear, or None where this PyTorch lacks it or MKL, which torch.mm calls, is faster.

    With AVX-512 it takes .8 to 1.0 times as long as MKL, with AVX2 1.0 to 1.5 times, and rounds twice as much there
    (the products of 1024x768x1000, two threads, AMD EPYC, MKL and oneDNN held to AVX2 by their own variables).
    """
    try:
        if torch.backends.cpu.get_cpu_capability() != "AVX512":
            return None
        op = torch.ops.mkldnn._linear_pointwise.default
        works = bool((op(torch.eye(2), torch.eye(2), None, "none", [], "") == torch.eye(2)).all())
    except (AttributeError, RuntimeError):
        return None
    return op if works else None


def _plain(matrix: Tensor) -> Tensor:
    """Dense in either order."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if 1 not in weight.stride():
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    (rows, depth), columns = x.shape, weight.shape[0]
    out = allocate.empty_large(torch.Size([rows, columns]), x.dtype, x.device)
    column, along = weight.stride()
    native().product(
        rows,
        columns,
        depth,
        x.data_ptr(),
        *x.stride(),
        weight.data_ptr(),
        along,
        column,
        address(bias),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, exact: bool = False) -> Tensor:
    """``x · weightᵀ + bias`` for ``x [N, K]``, ``weight [C, K]`` of one dtype, any strides; contiguous ``[N, C]``.

    ``exact``: never with more rounding error than eager PyTorch's product. oneDNN sums over the whole depth one by
    one and has half as much again; MKL adds up sums of 192 products, the native product sums of 96.
    """
    if x.dtype is torch.float32 and (exact or _is_small(x, weight)):
        return _native(x, weight, bias)
    # The op trusts its operands to be dense, and takes the strides of a dimension of size 1 at their word.
    op = onednn() if x.dtype is torch.float32 and min(*x.shape, weight.shape[0]) > 1 else None
    if op is None:
        return _by_eager(x, weight, bias)
    bias = None if bias is None else bias.contiguous()
    product: Tensor = op(_plain(x), _plain(weight), bias, "none", [], "")
    return product


def head_gradient(d_logits: Tensor, pooled: Tensor) -> Tensor:
    """``d_logitsᵀ · pooled``: ``[N, C]``, ``[N, D]`` to ``[C, D]``, by eager's product, as fast as oneDNN's."""
    x, weight = d_logits.t(), pooled.t()
    if x.dtype is torch.float32 and _is_small(x, weight):
        return _native(x, weight, None)
    return _by_eager(x, weight, None)


def _is_small(x: Tensor, weight: Tensor) -> bool:
    return x.shape[0] * x.shape[1] * weight.shape[0] <= NATIVE_PRODUCTS


def _by_eager(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    shape = torch.Size([x.shape[0], weight.shape[0]])
    out = allocate.empty_large(shape, x.dtype, x.device)  # out= keeps autocast away
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def has_pair_product(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`pair_product` takes these operands on this processor."""
    dense = x.is_contiguous() and weight.is_contiguous()
    return dense and x.shape[1] % 2 == 0 and bool(native().has_pair_product())


def pair_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`linear` of bfloat16 operands with sums in float32 that are never rounded to bfloat16: float32 out."""
    (rows, depth), columns = x.shape, weight.shape[0]
    out = allocate.empty_large(torch.Size([rows, columns]), torch.float32, x.device)
    bias = None if bias is None else bias.contiguous()
    addresses = x.data_ptr(), weight.data_ptr(), address(bias), out.data_ptr()
    native().pair_product(rows, columns, depth, *addresses, torch.get_num_threads())
    return out
