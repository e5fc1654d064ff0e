"""What the CPU and the CUDA kernels share: descriptions of problems for the native module, by address, and which calls
have plans.

Whoever calls the native module keeps the tensors of ``keep`` until it has returned: descriptions point into them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..codes import DIVERGENCES, DTYPES, TAILS
from ..problems.features import FeatureProblem
from ..problems.mfd import MFDProblem
from ..problems.pool import PoolProblem
from ..problems.rows import RowLoss, RowProblem
from ..types import LogitTransform
from . import allocate
from .layout import RowLayout, row_layout, row_strides
from .plans import Places, each

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
    student = teacher = _side(module, rows.student, rows.student_transform, keep)
    if rows.teacher is not rows.student or rows.teacher_transform != rows.student_transform:
        teacher = _side(module, rows.teacher, rows.teacher_transform, keep)
    return module.Problem(
        rows.n_rows,
        rows.classes,
        rows.dtype is torch.float64,
        student,
        teacher,
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


# --------------------------------------------------------------------------------------------------------- plans
# A plan reads the arguments themselves where a copy, or a tensor in the place of a number, would be something else in
# the next call.


def reads_rows(rows: RowProblem, loss: RowLoss, places: Places) -> bool:
    """Whether a plan covers distill_loss: one dense teacher, and numbers for all that may be a number."""
    use_hard = rows.labels is not None and loss.use_hard
    numbers = (rows.temperature, rows.own_teacher_temperature, loss.soft_weight, loss.hard_weight, loss.normalizer)
    if rows.topk is not None or len(rows.teachers) > 1 or not (loss.use_soft or use_hard):
        return False
    if any(isinstance(number, Tensor) for number in numbers):
        return False
    sides = {"student": rows.student, "teacher": rows.teacher}
    used = sides | {"labels": rows.labels, "mask": rows.mask, "weight": loss.weight}
    if any(row_strides(side) is None for side in sides.values()):
        return False
    if rows.labels is None and places.tensors["labels"] != -1:  # given, but they have no part in it
        return False
    return all(places.reads(places.tensors[name], tensor) for name, tensor in used.items())


def reads_pool(p: PoolProblem, places: Places, one_dtype: bool) -> bool:
    """Whether a plan covers modal_pool; ``one_dtype``: its vectors have the dtype of the arithmetic."""
    if isinstance(p.temperature, Tensor):
        return False
    parts = [p.features[0].select(-2, 0)] if p.stacked else p.features
    if any(row_strides(x) is None for x in parts):
        return False
    given = {"query": p.query, "scores": p.scores, "bias": p.bias, "present": p.present}
    if any(x is not None and not x.is_contiguous() for x in given.values()):
        return False
    if one_dtype and any(x is not None and x.dtype is not p.dtype for x in (p.query, p.scores, p.bias)):
        return False
    features = each(places.tensors["features"], 1)
    used = [(places.tensors[name], x) for name, x in given.items() if x is not None]
    return all(places.reads(place, x) for place, x in [*used, *zip(features, p.features, strict=True)])


def reads_taps(problem: FeatureProblem, places: Places) -> tuple[list[int], ...] | None:
    """Of each tap where a plan of feature_loss finds student, teacher, mask and weight; None: no plan covers it."""
    if any(isinstance(weight, Tensor) for weight in problem.weights):
        return None
    count = len(problem.students)
    students, teachers, masks = (each(places.tensors[name], count) for name in ("student", "teacher", "mask"))
    for k, tap in enumerate(problem.taps):
        used = tap.student, tap.teacher, tap.mask
        if row_strides(tap.student) is None or row_strides(tap.teacher) is None:
            return None
        if not all(map(places.reads, (students[k], teachers[k], masks[k]), used)):
            return None
        if tap.mask is not None and not tap.mask.is_contiguous():
            return None
    return students, teachers, masks, each(places.numbers["weight"], count)


def reads_mfd(p: MFDProblem, places: Places, one_dtype: bool) -> bool:
    """Whether a plan covers the scalar mfd_loss; ``one_dtype`` as in :func:`reads_pool`, and of the head."""
    rows, loss = p.rows, p.loss
    use_hard = rows.labels is not None and loss.use_hard
    numbers = (rows.temperature, loss.soft_weight, loss.hard_weight, loss.normalizer, p.feature_weight, p.pool_weight)
    if any(isinstance(number, Tensor) for number in numbers) or not (loss.use_soft or use_hard):
        return False
    used = {
        "head_weight": p.head_weight,
        "head_bias": p.head_bias,
        "teacher_logits": rows.teacher,
        "labels": rows.labels,
        "mask": rows.mask,
        "weight": loss.weight,
        "teacher_features": p.teacher_features,
        "teacher_pool_weights": p.teacher_pool_weights,
    }
    if any(x is not None and row_strides(x) is None for x in (rows.teacher, p.teacher_features)):
        return False
    if any(x is not None and not x.is_contiguous() for x in (p.head_weight, p.head_bias, p.teacher_pool_weights)):
        return False
    of_one = (p.head_weight, p.head_bias) if one_dtype else ()
    if any(x is not None and x.dtype is not rows.dtype for x in (*of_one, p.teacher_pool_weights)):
        return False
    if rows.labels is None and places.tensors["labels"] != -1:  # given, but they have no part in it
        return False
    return reads_pool(p.pool, places, one_dtype) and all(places.reads(places.tensors[k], x) for k, x in used.items())
