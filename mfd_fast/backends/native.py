"""What the CPU and the CUDA kernels share: descriptions of problems for the native module, by address.

Whoever calls the native module keeps the tensors of ``keep`` until it has returned: descriptions point into them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..codes import DIVERGENCES, DTYPES, TAILS
from ..problems.rows import RowProblem
from ..types import LogitTransform
from . import allocate
from .layout import RowLayout, row_layout

#: Address, dtype, inner, outer stride, row stride: the native matrix of rows.
RowMatrix = tuple[int, int, int, int, int]

NO_ROWS: RowMatrix = (0, 0, 1, 0, 0)

#: (value, address of one value per row or 0, stride).
RowScalar = tuple[float, int, int]

#: Modalities that the kernels have room for.
MAX_MODALITIES = 32

# ------------------------------------------------------------------------------------------------------- tensors


def row_matrix(tensor: Tensor, keep: list[Any]) -> RowMatrix:
    """``[..., D]`` as the kernels address it."""
    if tensor.dim() == 2:
        (rows, columns), (stride, step) = tensor.shape, tensor.stride()
        if step == 1 or columns == 1:  # as row_layout, which a call of microseconds would notice
            keep.append(tensor)
            return tensor.data_ptr(), DTYPES[tensor.dtype], max(rows, 1), 0, stride
    layout = row_layout(tensor)
    keep.append(layout.tensor)
    return _of_layout(layout)


def stacked_matrices(stacked: Tensor, keep: list[Any]) -> list[RowMatrix]:
    """The M slices ``[..., m, :]`` of ``[..., M, D]``."""
    layout = row_layout(stacked.select(-2, 0))
    if layout.tensor.data_ptr() != stacked.data_ptr():  # no such layout: the slice had to be copied
        stacked = stacked.contiguous()
        layout = row_layout(stacked.select(-2, 0))
    keep.append(stacked)
    first, *rest = _of_layout(layout)
    step = stacked.stride(-2) * stacked.itemsize
    return [(first + m * step, *rest) for m in range(stacked.shape[-2])]  # type: ignore[misc]


def _of_layout(layout: RowLayout) -> RowMatrix:
    tensor, inner, outer_stride, row_stride = layout
    return tensor.data_ptr(), DTYPES[tensor.dtype], inner, outer_stride, row_stride


def feature_matrices(features: Sequence[Tensor], stacked: bool, keep: list[Any]) -> list[RowMatrix]:
    """One per modality."""
    return stacked_matrices(features[0], keep) if stacked else [row_matrix(x, keep) for x in features]


def dense(value: Tensor | None, dtype: torch.dtype, keep: list[Any]) -> int:
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


# -------------------------------------------------------------------------------------------------- descriptions


def _side(module: Any, logits: Tensor, transform: LogitTransform | None, keep: list[Any]) -> Any:
    tensor, inner, outer_stride, row_stride = row_layout(logits)
    keep.append(tensor)
    scale, softcap = (1.0, 0.0) if transform is None else (transform.scale, transform.softcap or 0.0)
    standardize = transform is not None and transform.standardize
    width, dtype = tensor.shape[-1], DTYPES[tensor.dtype]
    return module.Side(tensor.data_ptr(), dtype, inner, outer_stride, row_stride, width, scale, softcap, standardize)


def _teachers(module: Any, rows: RowProblem, keep: list[Any]) -> Any:
    """The native description of several teachers, None for one."""
    if len(rows.teachers) == 1:
        return None
    weights = rows.teacher_weights
    teachers = module.Teachers(
        [_side(module, teacher, rows.teacher_transform, keep) for teacher in rows.teachers],
        address(weights),
        0 if weights is None or weights.dim() == 1 else weights.stride(0),
    )
    keep.append(teachers)
    return teachers


def native_rows(
    module: Any, rows: RowProblem, keep: list[Any], temperature: Callable[[float | Tensor], RowScalar]
) -> Any:
    """The native description of ``rows``; ``temperature`` says how its kernels read one."""
    of_student = temperature(rows.temperature)
    own = rows.own_teacher_temperature
    return module.Problem(
        rows.n_rows,
        rows.classes,
        rows.dtype is torch.float64,
        _side(module, rows.student, rows.student_transform, keep),
        _side(module, rows.teacher, rows.teacher_transform, keep),
        *of_student,
        *(of_student if own is None else temperature(own)),
        address(rows.labels),
        address(rows.mask),
        rows.ignore_index,
        rows.ignored_labels == "term",
        rows.label_smoothing if rows.classes > 1 else 0.0,  # one class keeps all of its label
        rows.scale_by_temperature,
        DIVERGENCES[rows.divergence.name],
        *rows.divergence.parameters,
        _teachers(module, rows, keep),
    )


def native_topk(module: Any, rows: RowProblem) -> Any:
    """The native description of a sparse teacher, None for a teacher of all classes."""
    if rows.topk is None or rows.indices is None:
        return None
    return module.TopK(rows.indices.data_ptr(), rows.indices.shape[-1], TAILS[rows.topk.tail], rows.topk.logprobs)


def feature_gradients(
    features: Sequence[Tensor], needs: Sequence[bool], stacked: bool, modalities: int, width: int
) -> tuple[list[Tensor | None], list[int], int]:
    """Gradient tensors, one address per modality, and the distance of two rows in elements."""
    found = [allocate.empty_gradient(x) if need else None for x, need in zip(features, needs, strict=True)]
    if not stacked:
        return found, [address(t) for t in found], width
    (one,) = found
    if one is None:
        return found, [0] * modalities, width
    return found, [one.data_ptr() + m * width * one.itemsize for m in range(modalities)], modalities * width
