"""distill_loss on the native CPU kernels: marshals tensors to addresses and allocates the outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...contract import check_indices, label_error
from ...rows import Rows, is_used
from ...types import LogitTransform
from .. import allocate
from ..layout import STATISTICS, row_layout
from ..limits import beyond_kernels
from . import native

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
#: Numbers of the divergences in csrc/common/types.h.
_DIVERGENCES = {
    "forward_kl": 0,
    "reverse_kl": 1,
    "jsd": 2,
    "skew_kl": 3,
    "skew_reverse_kl": 4,
    "tvd": 5,
    "alpha_beta": 6,
    "dkd": 7,
    "nkd": 8,
}

#: Numbers of the tails.
_TAILS = {"bucket": 0, "renormalize": 1, "zero": 2}

#: Gradients of at least this many bytes are written past the caches.
STREAM_BYTES = 4 << 20

ByProducts = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None", Tensor]


def can_run(rows: Rows) -> str | None:
    """Why the native kernels cannot take this call, None if they can."""
    if rows.student.device.type != "cpu":
        return f"the tensors are on {rows.student.device}"
    return beyond_kernels(rows)


def _side(module: Any, logits: Tensor, transform: LogitTransform | None, keep: list[Any]) -> Any:
    tensor, inner, outer_stride, row_stride = row_layout(logits)
    keep.append(tensor)
    scale, softcap = (1.0, 0.0) if transform is None else (transform.scale, transform.softcap or 0.0)
    standardize = transform is not None and transform.standardize
    width, dtype = tensor.shape[-1], DTYPES[tensor.dtype]
    return module.Side(tensor.data_ptr(), dtype, inner, outer_stride, row_stride, width, scale, softcap, standardize)


def _temperature(value: float | Tensor) -> tuple[float, int, int]:
    """(value, address of one value per row or 0, stride)."""
    if not isinstance(value, Tensor):
        return value, 0, 0
    if value.dim() == 0:
        return value.item(), 0, 0
    return 1.0, value.data_ptr(), value.stride(0)


def _teachers(module: Any, rows: Rows, keep: list[Any]) -> Any:
    """The native description of several teachers, None for one."""
    if len(rows.teachers) == 1:
        return None
    weights = rows.teacher_weights
    teachers = module.Teachers(
        [_side(module, teacher, rows.teacher_transform, keep) for teacher in rows.teachers],
        0 if weights is None else weights.data_ptr(),
        0 if weights is None or weights.dim() == 1 else weights.stride(0),
    )
    keep.append(teachers)
    return teachers


def native_problem(
    module: Any,
    rows: Rows,
    labels: Tensor | None,
    keep: list[Any],
    describe: Callable[[float | Tensor], tuple[float, int, int]] = _temperature,
) -> Any:
    """The native description of ``rows``; what it points into is appended to ``keep``."""
    same = rows.teacher_temperature is rows.temperature
    temperature = describe(rows.temperature)
    return module.Problem(
        rows.n_rows,
        rows.classes,
        rows.dtype is torch.float64,
        _side(module, rows.student, rows.student_transform, keep),
        _side(module, rows.teacher, rows.teacher_transform, keep),
        *temperature,
        *(temperature if same else describe(rows.teacher_temperature)),
        0 if labels is None else labels.data_ptr(),
        0 if rows.mask is None else rows.mask.data_ptr(),
        rows.ignore_index,
        rows.label_smoothing if rows.classes > 1 else 0.0,  # one class keeps all of its label
        rows.scale_by_temperature,
        _DIVERGENCES[rows.divergence.name],
        *rows.divergence.parameters,
        _teachers(module, rows, keep),
    )


def native_topk(module: Any, rows: Rows) -> Any:
    """The native description of a sparse teacher, None for a teacher of all classes."""
    if rows.topk is None:
        return None
    indices = rows.topk.indices
    return module.TopK(indices.data_ptr(), indices.shape[-1], _TAILS[rows.topk.tail], rows.topk.logprobs)


def _check_lists(module: Any, rows: Rows, problem: Any, topk: Any) -> None:
    """Raises ValueError for a sparse teacher's indices that are out of range, repeated, or lack a label they need."""
    if topk is not None and not module.lists_are_valid(problem, topk, torch.get_num_threads()):
        check_indices(rows.op, rows)


def count(module: Any, rows: Rows, problem: Any) -> int:
    """Number of counted rows; raises ValueError for a label out of range in one of them."""
    if rows.labels is None and rows.mask is None:
        return rows.n_rows
    counted: int = module.count_rows(problem)
    if counted < 0:
        assert rows.labels is not None
        row = -1 - counted
        raise label_error(rows.op, row, int(rows.labels[row]), rows.classes)
    return counted


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _streams(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.numel() * gradient.itemsize >= STREAM_BYTES


def scalar(
    rows: Rows,
    *,
    weight: Tensor | None,
    soft_weight: float | Tensor,
    hard_weight: float | Tensor,
    mean: bool,
    normalizer: float | Tensor | None,
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """The scalar loss and, from the same pass, its gradient with respect to the student."""
    module = native()
    keep: list[Any] = []
    use_soft = is_used(soft_weight)
    use_hard = rows.labels is not None and is_used(hard_weight)
    problem = native_problem(module, rows, rows.labels, keep)
    counted = count(module, rows, problem)
    topk = native_topk(module, rows)
    _check_lists(module, rows, problem, topk)
    soft_factor, hard_factor = float(soft_weight), float(hard_weight)
    if mean:
        divisor = max(counted, 1) if normalizer is None else float(normalizer)
        soft_factor, hard_factor = _divide(soft_factor, divisor), _divide(hard_factor, divisor)
    device = rows.student.device
    loss = allocate.empty((), rows.dtype, device)
    gradient = allocate.empty_gradient(rows.student) if needs_grad else None
    if not (use_soft or use_hard):
        loss.zero_()
        return loss, None if gradient is None else gradient.zero_()
    module.scalar(
        problem,
        topk if use_soft else None,
        use_soft,
        use_hard,
        0 if weight is None else weight.data_ptr(),
        soft_factor,
        hard_factor,
        loss.data_ptr(),
        0 if gradient is None else gradient.data_ptr(),
        _streams(gradient),
        torch.get_num_threads(),
    )
    return loss, gradient


def _divide(factor: float, divisor: float) -> float:
    """IEEE division: a normalizer of 0 gives inf or NaN, as it does for tensors."""
    if divisor != 0:
        return factor / divisor
    return float(torch.tensor(factor, dtype=torch.float64) / divisor)


def per_row(rows: Rows, *, terms: bool) -> tuple[Tensor, Tensor, Tensor, ByProducts | None]:
    """soft [N], hard [N], statistics [N, STATISTICS] for the backward, and the by-products if ``terms``."""
    module = native()
    keep: list[Any] = []
    n, device = rows.n_rows, rows.student.device
    problem = native_problem(module, rows, rows.labels, keep)
    count(module, rows, problem)
    topk = native_topk(module, rows)
    _check_lists(module, rows, problem, topk)

    def column() -> Tensor:
        return allocate.empty((n,), rows.dtype, device)

    soft, hard = column(), column()
    stats = allocate.empty((n, STATISTICS), rows.dtype, device)
    if topk is not None:  # its backward starts again from the logits
        stats.zero_()
    extra: ByProducts | None = None
    addresses = [0] * 5
    if terms:
        label_probs = (None, None) if rows.labels is None else (column(), column())
        extra = (column(), column(), *label_probs, allocate.empty((n,), torch.bool, device))
        addresses = [0 if t is None else t.data_ptr() for t in extra]
    if n:
        module.per_row(
            problem, topk, soft.data_ptr(), hard.data_ptr(), stats.data_ptr(), *addresses, torch.get_num_threads()
        )
    return soft, hard, stats, extra


def per_row_backward(
    rows: Rows, stats: Tensor, grad_soft: Tensor, grad_hard: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of ``sum(grad_soft*soft + grad_hard*hard)`` to all logits and, per row, temperatures and weights."""
    module = native()
    keep: list[Any] = []
    problem = native_problem(module, rows, rows.labels, keep)
    grad_soft, grad_hard, stats = grad_soft.to(rows.dtype), grad_hard.to(rows.dtype), stats.contiguous()
    d_student = allocate.empty_gradient(rows.student) if needs[0] else None
    d_teachers = [
        allocate.empty_gradient(teacher) if need else None
        for teacher, need in zip(rows.teachers, (needs[1], *needs[5:]), strict=True)
    ]
    d_temperature, d_teacher_temperature = (
        allocate.empty((rows.n_rows,), rows.dtype, rows.student.device) if need else None for need in needs[2:4]
    )
    d_weights = None
    if len(needs) > 4 and needs[4]:
        d_weights = allocate.empty((rows.n_rows, len(rows.teachers)), rows.dtype, rows.student.device)
    if rows.n_rows:
        module.per_row_backward(
            problem,
            native_topk(module, rows),
            stats.data_ptr(),
            grad_soft.data_ptr(),
            grad_soft.stride(0),
            grad_hard.data_ptr(),
            grad_hard.stride(0),
            _address(d_student),
            [_address(d_teacher) for d_teacher in d_teachers],
            _address(d_temperature),
            _address(d_teacher_temperature),
            _address(d_weights),
            _streams(d_student) or any(_streams(d_teacher) for d_teacher in d_teachers),
            torch.get_num_threads(),
        )
    every = (d_student, d_teachers[0], d_temperature, d_teacher_temperature, d_weights, *d_teachers[1:])
    return every[: len(needs)]
