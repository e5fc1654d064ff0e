"""What the native bindings share: dtype codes, row addresses, temperatures, when to write past the caches."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import RowLayout, row_layout

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

#: Address, dtype, inner, outer stride, row stride: the native ``Rows``.
RowsArgument = tuple[int, int, int, int, int]

NO_ROWS: RowsArgument = (0, 0, 1, 0, 0)

#: Outputs of at least this many bytes in one call are written past the caches.
STREAM_BYTES = 4 << 20


def rows_argument(tensor: Tensor, keep: list[Tensor]) -> RowsArgument:
    """``[..., D]`` as the kernels address it; the tensor the address points into is appended to ``keep``."""
    if tensor.dim() == 2:
        (rows, columns), (stride, step) = tensor.shape, tensor.stride()
        if step == 1 or columns == 1:  # as row_layout, which a call of microseconds would notice
            keep.append(tensor)
            return tensor.data_ptr(), DTYPES[tensor.dtype], max(rows, 1), 0, stride
    layout = row_layout(tensor)
    keep.append(layout.tensor)
    return _argument(layout)


def stacked_arguments(stacked: Tensor, keep: list[Tensor]) -> list[RowsArgument]:
    """The M slices ``[..., m, :]`` of ``[..., M, D]``."""
    layout = row_layout(stacked.select(-2, 0))
    if layout.tensor.data_ptr() != stacked.data_ptr():  # no such layout: the slice had to be copied
        stacked = stacked.contiguous()
        layout = row_layout(stacked.select(-2, 0))
    keep.append(stacked)
    address, *rest = _argument(layout)
    step = stacked.stride(-2) * stacked.itemsize
    return [(address + m * step, *rest) for m in range(stacked.shape[-2])]  # type: ignore[misc]


def _argument(layout: RowLayout) -> RowsArgument:
    tensor, inner, outer_stride, row_stride = layout
    return tensor.data_ptr(), DTYPES[tensor.dtype], inner, outer_stride, row_stride


def temperature_argument(value: float | Tensor) -> tuple[float, int, int]:
    """(value, address of one value per row or 0, stride)."""
    if not isinstance(value, Tensor):
        return value, 0, 0
    if value.dim() == 0:
        return value.item(), 0, 0
    return 1.0, value.data_ptr(), 1


def dense(value: Tensor | None, dtype: torch.dtype, keep: list[Tensor]) -> int:
    """Address of ``value`` as a contiguous tensor of ``dtype``, 0 for None."""
    if value is None:
        return 0
    if value.dtype != dtype or not value.is_contiguous():
        value = value.to(dtype).contiguous()
    keep.append(value)
    return value.data_ptr()


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value.to(dtype)`` without the call where nothing changes: a small step calls it six times."""
    return value if value.dtype is dtype else value.to(dtype)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def streams(*outputs: Tensor | None) -> bool:
    return sum(t.nbytes for t in outputs if t is not None) >= STREAM_BYTES
