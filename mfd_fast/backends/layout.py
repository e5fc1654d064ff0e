"""Row addressing: how a kernel walks ``[..., C]`` logits of any layout."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowLayout(NamedTuple):
    """Row i of the flattened ``[N, C]`` starts at element ``(i // inner)*outer_stride + (i % inner)*row_stride``.

    The last dimension of ``tensor`` has stride 1. Strides are in elements and may be 0.
    """

    tensor: Tensor
    inner: int
    outer_stride: int
    row_stride: int


class RowStrides(NamedTuple):
    """See :class:`RowLayout`."""

    inner: int
    outer_stride: int
    row_stride: int


def row_strides(tensor: Tensor) -> RowStrides | None:
    """Two-level row strides of ``tensor [..., C]``; None where it has none.

    Two levels cover the shifted logits of language models, ``logits[:, :-1]``, as they are.
    """
    shape, strides = tensor.shape, tensor.stride()
    if shape[-1] > 1 and strides[-1] != 1:
        return None
    if len(shape) == 2:
        return RowStrides(max(shape[0], 1), 0, strides[0])

    # Merge adjacent leading dimensions that step as one; sizes of 1 never step.
    groups: list[tuple[int, int]] = []  # (size, stride), outermost first
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        if size == 1:
            continue
        if groups and groups[-1][1] == size * stride:
            groups[-1] = (groups[-1][0] * size, stride)
        else:
            groups.append((size, stride))
    if len(groups) > 2:
        return None
    if len(groups) == 2:
        return RowStrides(max(groups[1][0], 1), groups[0][1], groups[1][1])
    if len(groups) == 1:
        return RowStrides(max(groups[0][0], 1), 0, groups[0][1])
    return RowStrides(1, 0, 0)


def row_layout(tensor: Tensor) -> RowLayout:
    """The rows of ``tensor``, or of a contiguous copy where it has no :func:`row_strides`."""
    strides = row_strides(tensor)
    if strides is not None:
        return RowLayout(tensor, *strides)
    columns = tensor.shape[-1]
    tensor = tensor.contiguous()
    return RowLayout(tensor, max(tensor.numel() // max(columns, 1), 1), 0, columns)


def extent_bytes(tensor: Tensor) -> int:
    """From the first byte that ``tensor`` addresses to behind the last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize
