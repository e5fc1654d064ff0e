"""Matrix products between 16-bit or 32-bit operands whose results are never rounded to 16 bits, outside autocast."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

#: Bytes of a 16-bit weight, widened, that exist at a time where there is no product of 16-bit operands.
WIDENED_BYTES = 32 << 20
#: The same on a GPU, where every part is a launch.
WIDENED_BYTES_OFF_CPU = 256 << 20


def readable(matrix: Tensor) -> Tensor:
    """``matrix``, or a dense copy where a library would make one for each product."""
    # It reads lines of stride 1 that do not overlap.
    (rows, columns), (down, along) = matrix.shape, matrix.stride()
    return matrix if (along == 1 and down >= columns) or (down == 1 and along >= rows) else matrix.contiguous()


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
    """``[N, C]`` ``hidden · weightᵀ + bias`` of ``hidden [N, H]``, ``weight [C, H]``, summed in ``dtype``."""
    n, classes = hidden.shape[0], weight.shape[0]
    if backend == "cpu":
        from .cpu import gemm  # needs the native module

        sixteen = hidden.dtype == weight.dtype == torch.bfloat16 and dtype == torch.float32
        if sixteen and gemm.has_pair_product(hidden, weight):
            return gemm.pair_product(hidden, weight, None if bias is None else bias.to(dtype))
        if weight.dtype == dtype:
            return gemm.linear(hidden.to(dtype), weight, None if bias is None else bias.to(dtype), exact=True)
    if _sums_wider(hidden, weight, dtype):
        out = torch.mm(hidden, weight.t(), out_dtype=dtype)
    elif weight.dtype == dtype:
        out = torch.mm(hidden.to(dtype), weight.t())
    else:
        out = hidden.new_empty((n, classes), dtype=dtype)
        hidden = hidden.to(dtype)
        for first, wide in widened(weight, dtype):
            torch.mm(hidden, wide.t(), out=out[:, first : first + wide.shape[0]])
    return out if bias is None else out.add_(bias)


def gradient_dtype(hidden: Tensor, weight: Tensor, dtype: torch.dtype, backend: str) -> torch.dtype:
    """Of the logits' gradient in :func:`hidden_gradient`, which rounds its result to the operands' dtype once.

    bfloat16 where the device multiplies bfloat16 heads with sums in ``dtype``: what eager PyTorch's backward pass
    takes, after logits that are float32 here. Never float16, in which small gradients are 0.
    """
    if not (hidden.dtype == weight.dtype == torch.bfloat16 and dtype == torch.float32):
        return dtype
    if backend == "cpu":
        from .cpu import gemm

        return torch.bfloat16 if gemm.has_pair_product(hidden, weight) else dtype
    return torch.bfloat16 if has_wide_sums(hidden.device) else dtype


def hidden_gradient(d_logits: Tensor, weight: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``d_logits · weight``: ``[N, C] · [C, H]`` in ``dtype``, in ``out`` if there is one."""
    shape = d_logits.shape[0], weight.shape[1]
    if d_logits.dtype == weight.dtype:
        if d_logits.dtype == dtype:
            return torch.mm(d_logits, weight, out=out)
        out = d_logits.new_empty(shape, dtype=dtype) if out is None else out
        if _sums_wider(d_logits, weight, dtype):
            return torch.mm(d_logits, weight, out_dtype=dtype, out=out)
        return out.copy_(torch.mm(d_logits, weight))  # its sums are wider, its result is what will be rounded anyway
    out = d_logits.new_empty(shape) if out is None else out
    for first, wide in widened(weight, d_logits.dtype):
        torch.addmm(out, d_logits[:, first : first + wide.shape[0]], wide, beta=1 if first else 0, out=out)
    return out


def head_gradient(dz: Tensor, y: Tensor, classes: int) -> Tensor:
    """That of a head's weight ``[classes, D]``: the first columns of ``dz``, transposed, times ``y [N, D]``."""
    if not torch.is_autocast_enabled(y.device.type):
        return torch.mm(dz[:, :classes].t(), y)
    with torch.autocast(y.device.type, enabled=False):
        return torch.mm(dz[:, :classes].t(), y)


def add_weight_gradient(total: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """``total += d_logitsᵀ · hidden``: ``[C, N] · [N, H]`` into ``[C, H]``."""
    if d_logits.dtype == total.dtype:
        total.addmm_(d_logits.t(), hidden.to(total.dtype))
    elif _adds_wider(hidden.device.type):
        torch.addmm(total, d_logits.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(d_logits.t(), hidden, out_dtype=total.dtype)


@functools.cache
def _adds_wider(device: str) -> bool:
    """Whether this PyTorch adds a product of bfloat16 operands to a float32 matrix; its first version did not."""
    total, one = torch.zeros((8, 8), device=device), torch.eye(8, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(total, one, one, out_dtype=total.dtype, out=total)
    except RuntimeError:
        return False
    return True


def widened(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """The rows of ``weight`` in ``dtype``, some at a time in the same memory, each with the number of its first row."""
    budget = WIDENED_BYTES if weight.device.type == "cpu" else WIDENED_BYTES_OFF_CPU
    step = min(max(budget // max(weight.shape[1] * dtype.itemsize, 1), 1), weight.shape[0])
    memory = weight.new_empty((step, weight.shape[1]), dtype=dtype)
    for first in range(0, weight.shape[0], step):
        part = weight[first : first + step]
        yield first, memory[: part.shape[0]].copy_(part)


def _sums_wider(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the device's library multiplies these 16-bit operands into float32."""
    narrow = hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
    return narrow and dtype == torch.float32 and has_wide_sums(hidden.device)


def has_wide_sums(device: torch.device) -> bool:
    """Whether the device's library multiplies 16-bit operands into float32."""
    return device.type == "cuda"
