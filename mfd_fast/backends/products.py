"""Matrix products between 16-bit or 32-bit operands whose results are never rounded to 16 bits, outside autocast."""

from __future__ import annotations

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

        if hidden.dtype == weight.dtype == torch.bfloat16 and gemm.has_pair_product(hidden, weight):
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


def hidden_gradient(d_logits: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """``d_logits · weight``: ``[N, C] · [C, H]`` in the dtype of ``d_logits``, in ``out`` if there is one."""
    if weight.dtype == d_logits.dtype:
        return torch.mm(d_logits, weight, out=out)
    if out is None:
        out = d_logits.new_empty((d_logits.shape[0], weight.shape[1]))
    for first, wide in widened(weight, d_logits.dtype):
        torch.addmm(out, d_logits[:, first : first + wide.shape[0]], wide, beta=1 if first else 0, out=out)
    return out


def add_weight_gradient(total: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """``total += d_logitsᵀ · hidden``: ``[C, N] · [N, H]`` into ``[C, H]``."""
    total.addmm_(d_logits.t(), hidden.to(d_logits.dtype))


def widened(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """The rows of ``weight`` in ``dtype``, some at a time, each with the number of its first row."""
    budget = WIDENED_BYTES if weight.device.type == "cpu" else WIDENED_BYTES_OFF_CPU
    step = max(budget // max(weight.shape[1] * dtype.itemsize, 1), 1)
    for first in range(0, weight.shape[0], step):
        yield first, weight[first : first + step].to(dtype)


def _sums_wider(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the device's library multiplies these 16-bit operands into float32."""
    narrow = hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
    return narrow and dtype == torch.float32 and hidden.device.type == "cuda"
