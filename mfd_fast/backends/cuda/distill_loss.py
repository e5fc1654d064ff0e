"""distill_loss on the CUDA C++ kernels: marshals tensors to addresses, allocates the outputs, launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...contract import check_indices, check_labels_in_range
from ...rows import Rows, is_used
from .. import allocate
from ..cpu.distill_loss import DTYPES, native_problem, native_topk
from ..layout import STATISTICS
from ..limits import beyond_kernels
from . import native, why_not_device
from .launch import number, where, workspace

__all__ = ["can_run", "per_row", "per_row_backward", "plan", "scalar", "scale_gradient_"]

MAX_TEACHERS = 32  # kMaxTeachers of csrc/cuda/distill.h


def can_run(rows: Rows) -> str | None:
    """None if the kernels cover this call, else the reason."""
    if len(rows.teachers) > MAX_TEACHERS:
        return f"at most {MAX_TEACHERS} teachers"
    return beyond_kernels(rows) or why_not_device(rows.device)


def _problem(module: Any, rows: Rows, keep: list[Tensor]) -> Any:
    def temperature(value: float | Tensor) -> tuple[float, int, int]:
        if isinstance(value, Tensor) and value.device == rows.device:
            return 1.0, value.data_ptr(), 0 if value.dim() == 0 else value.stride(0)
        return float(value), 0, 0

    return native_problem(module, rows, rows.labels, keep, temperature)


def _scratch(module: Any, problem: Any, topk: Any, rows: Rows, backward: bool, keep: list[Tensor]) -> int:
    """Device memory that a launch needs beside its outputs; 0 for none."""
    if topk is None and len(rows.teachers) == 1:
        return 0
    nbytes = module.cuda.scratch_bytes(problem, topk, backward, where(rows.device)[0])
    if nbytes == 0:
        return 0
    keep.append(allocate.empty((-(-nbytes // 8),), torch.float64, rows.device))
    return keep[-1].data_ptr()


def plan(rows: Rows, soft: bool = True) -> tuple[str, int, int]:
    """How the device's threads share these rows: "warp", "block", "cluster" or "stream"; blocks per row; threads."""
    module = native()
    keep: list[Tensor] = []
    problem, topk = _problem(module, rows, keep), native_topk(module, rows)
    found: tuple[str, int, int] = module.cuda.plan(problem, topk, soft, where(rows.device)[0])
    return found


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
    """The scalar loss and its gradient with respect to the student, from one launch.

    Of many rows with labels or a mask, another one before it counts those that are counted.
    """
    check_labels_in_range(rows.op, rows)
    check_indices(rows.op, rows)
    module, device, dtype = native(), rows.device, rows.dtype
    soft = is_used(soft_weight)
    hard = rows.labels is not None and is_used(hard_weight)
    loss = allocate.empty((), dtype, device)
    gradient = allocate.empty_gradient(rows.student) if needs_grad else None
    if rows.n_rows == 0 or not (soft or hard):
        return loss.zero_(), None if gradient is None else gradient.zero_()

    if not soft:  # the teachers are not read
        rows = rows.replace(topk=None, teacher=rows.student, more_teachers=(), teacher_weights=None)
    keep: list[Tensor] = []
    divisor: float | Tensor = 1.0
    counting = mean and normalizer is None and (rows.labels is not None or rows.mask is not None)
    if mean:
        divisor = float(rows.n_rows) if normalizer is None else normalizer
    scratch = workspace(device, module.cuda.scalar_workspace)
    problem, topk = _problem(module, rows, keep), native_topk(module, rows)
    module.cuda.scalar(
        problem,
        topk,
        soft,
        hard,
        0 if weight is None else weight.data_ptr(),
        number(soft_weight, dtype, device, keep),
        number(hard_weight, dtype, device, keep),
        number(divisor, dtype, device, keep),
        counting,
        scratch.data_ptr(),
        loss.data_ptr(),
        0 if gradient is None else gradient.data_ptr(),
        _scratch(module, problem, topk, rows, False, keep),
        *where(device),
    )
    return loss, gradient


def per_row(rows: Rows, *, terms: bool) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...] | None]:
    """soft [N], hard [N], stats [N, STATISTICS] and, if asked, the by-products."""
    check_labels_in_range(rows.op, rows)
    check_indices(rows.op, rows)
    module, n, dtype, device = native(), rows.n_rows, rows.dtype, rows.device
    keep: list[Tensor] = []
    soft, hard = allocate.empty((n,), dtype, device), allocate.empty((n,), dtype, device)
    stats = allocate.empty((n, STATISTICS), dtype, device)
    extra: list[Tensor | None] = [None] * 5
    if terms:
        of_labels = 4 if rows.labels is not None else 2
        extra[:of_labels] = [allocate.empty((n,), dtype, device) for _ in range(of_labels)]
        extra[4] = allocate.empty((n,), torch.bool, device)
    if n:
        addresses = [0 if t is None else t.data_ptr() for t in (soft, hard, stats, *extra)]
        problem, topk = _problem(module, rows, keep), native_topk(module, rows)
        scratch = _scratch(module, problem, topk, rows, False, keep)
        module.cuda.per_row(problem, topk, *addresses, scratch, *where(device))
    return soft, hard, stats, tuple(extra) if terms else None


def per_row_backward(
    rows: Rows, stats: Tensor, grad_soft: Tensor, grad_hard: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of Σ grad_soft·soft + grad_hard·hard to student, teacher and, per row, both temperatures.

    With several teachers also to the weights [N, K] and to each further teacher.
    """
    module, n, dtype, device = native(), rows.n_rows, rows.dtype, rows.device
    keep: list[Tensor] = []
    grad_soft, grad_hard, stats = grad_soft.to(dtype), grad_hard.to(dtype), stats.contiguous()
    student = allocate.empty_gradient(rows.student) if needs[0] else None
    teachers = [
        allocate.empty_gradient(teacher) if need else None
        for teacher, need in zip(rows.teachers, (needs[1], *needs[5:]), strict=True)
    ]
    temperatures = [allocate.empty((n,), dtype, device) if need else None for need in needs[2:4]]
    weights = allocate.empty((n, len(teachers)), dtype, device) if any(needs[4:5]) else None
    if n and any(needs):
        problem, topk = _problem(module, rows, keep), native_topk(module, rows)
        module.cuda.per_row_backward(
            problem,
            topk,
            stats.data_ptr(),
            grad_soft.data_ptr(),
            grad_soft.stride(0),
            grad_hard.data_ptr(),
            grad_hard.stride(0),
            _address(student),
            [_address(teacher) for teacher in teachers],
            *(_address(temperature) for temperature in temperatures),
            _address(weights),
            _scratch(module, problem, topk, rows, True, keep),
            *where(device),
        )
    return (student, teachers[0], *temperatures, weights, *teachers[1:])[: len(needs)]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def scale_gradient_(gradient: Tensor, factor: Tensor) -> Tensor:
    """``gradient *= factor`` (0-d, same device) in place in one launch, which does nothing where ``factor`` is 1.

    ``gradient`` is contiguous. The host does not wait for the value of ``factor``. Returns ``gradient``.
    """
    if gradient.numel():
        native().cuda.scale_in_place(
            gradient.data_ptr(),
            DTYPES[gradient.dtype],
            gradient.numel(),
            factor.data_ptr(),
            DTYPES[factor.dtype],
            *where(gradient.device),
        )
    return gradient
