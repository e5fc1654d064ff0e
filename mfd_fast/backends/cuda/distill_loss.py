"""distill_loss on the CUDA C++ kernels: marshals tensors to addresses, allocates the outputs, launches."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...codes import STATISTICS
from ...problems.checks import temperature_range
from ...problems.rows import RowLoss, RowProblem, check_indices, check_labels_in_range
from .. import allocate
from ..native import RowScalar, address, native_rows, native_topk, reads_rows
from ..plans import Places
from ..protocol import ByProducts, RowGradients, RowNeeds, RowOutputs, ScalarLoss
from . import native, why_not_device
from .launch import number, where, workspace

__all__ = ["call_plan", "can_run", "per_row", "per_row_backward", "plan", "row_description", "scalar"]

MAX_TEACHERS = 32  # kMaxTeachers of kernels/cuda/rows/teachers.cuh


def can_run(rows: RowProblem) -> str | None:
    """None if the kernels cover this call, else the reason."""
    if len(rows.teachers) > MAX_TEACHERS:
        return f"at most {MAX_TEACHERS} teachers"
    return rows.divergence.why_no_kernel() or why_not_device(rows.device)


def row_description(module: ModuleType, rows: RowProblem, keep: list[Any]) -> Any:
    """The native description of ``rows``; what it points into is appended to ``keep``."""

    def temperature(value: float | Tensor) -> RowScalar:
        if isinstance(value, Tensor) and value.device == rows.device:
            return 1.0, value.data_ptr(), 0 if value.dim() == 0 else value.stride(0)
        return float(value), 0, 0

    return native_rows(module, rows, keep, temperature)


def _scratch(module: ModuleType, problem: Any, topk: Any, rows: RowProblem, backward: bool, keep: list[Any]) -> int:
    """Device memory that a launch needs beside its outputs; 0 for none."""
    if topk is None and len(rows.teachers) == 1:
        return 0
    nbytes = module.cuda.scratch_bytes(problem, topk, backward, where(rows.device)[0])
    if nbytes == 0:
        return 0
    memory = allocate.empty((-(-nbytes // 8),), torch.float64, rows.device)
    keep.append(memory)
    return memory.data_ptr()


def plan(rows: RowProblem, soft: bool = True) -> tuple[str, int, int]:
    """How the device's threads share these rows: "warp", "block", "cluster" or "stream"; blocks per row; threads."""
    module = native()
    keep: list[Any] = []
    problem, topk = row_description(module, rows, keep), native_topk(module, rows)
    found: tuple[str, int, int] = module.cuda.plan(problem, topk, soft, where(rows.device)[0])
    return found


def scalar(rows: RowProblem, loss: RowLoss, *, needs_grad: bool, parts: bool) -> ScalarLoss:
    """The scalar loss and its gradient with respect to the student, from one launch.

    Of many rows with labels or a mask, another one before it counts those that are counted. The parts are summed up by
    one after it from what the launch leaves of each row.
    """
    check_labels_in_range(rows.op, rows)
    check_indices(rows.op, rows)
    module, device, dtype = native(), rows.device, rows.dtype
    soft, hard = loss.use_soft, rows.labels is not None and loss.use_hard
    value = allocate.empty((), dtype, device)
    gradient = allocate.empty_gradient(rows.student) if needs_grad else None
    if rows.n_rows == 0 or not (soft or hard):
        value.zero_()
        return ScalarLoss(value, None if gradient is None else gradient.zero_(), value.new_zeros(4) if parts else None)

    # Of every row, where the parts are wanted: soft, hard, and with the soft term both entropies.
    wanted = (soft, hard, soft, soft)
    of_rows = [allocate.empty((rows.n_rows,), dtype, device) if parts and want else None for want in wanted]
    whole, loss = loss, loss.folded()
    if not soft:  # the teachers are not read
        rows = rows.replace(topk=None, indices=None, teachers=[rows.student], teacher_weights=None)
    keep: list[Any] = []
    divisor: float | Tensor = 1.0
    mean = loss.reduction == "mean"
    counting = mean and loss.normalizer is None and (rows.labels is not None or rows.mask is not None)
    if mean:
        divisor = float(rows.n_rows) if loss.normalizer is None else loss.normalizer
    scratch = workspace(device, module.cuda.scalar_workspace)
    problem, topk = row_description(module, rows, keep), native_topk(module, rows)
    module.cuda.scalar(
        problem,
        topk,
        soft,
        hard,
        address(loss.weight),
        number(loss.soft_weight, dtype, device, keep),
        number(loss.hard_weight, dtype, device, keep),
        number(divisor, dtype, device, keep),
        counting,
        scratch.data_ptr(),
        value.data_ptr(),
        address(gradient),
        [address(t) for t in of_rows],
        _scratch(module, problem, topk, rows, False, keep),
        *where(device),
    )
    if not parts:
        return ScalarLoss(value, gradient, None)
    of_terms = allocate.empty((len(of_rows),), dtype, device)
    hard_divisor = divisor
    if whole.normalizer is not None and whole.hard_normalizer is not None:
        divisor, hard_divisor = whole.normalizer, whole.hard_normalizer
    module.cuda.reduce_parts(
        problem,
        [address(t) for t in of_rows],
        address(loss.weight),
        number(divisor, dtype, device, keep),
        number(hard_divisor, dtype, device, keep),
        counting,
        workspace(device, module.cuda.parts_workspace, "parts").data_ptr(),
        of_terms.data_ptr(),
        *where(device),
    )
    return ScalarLoss(value, gradient, of_terms)


def call_plan(rows: RowProblem, loss: RowLoss, parts: bool, places: Places) -> Any:
    """The native plan of :func:`scalar` for calls like this one; None where :func:`reads_rows` says so."""
    module = native()
    if not hasattr(module.cuda, "DistillPlan") or not rows.n_rows or not reads_rows(rows, loss, places):
        return None
    use_hard = rows.labels is not None and loss.use_hard
    read = rows if loss.use_soft else rows.replace(teachers=[rows.student])
    problem = row_description(module, read, [])
    more = loss.use_soft, use_hard, loss.reduction == "mean", parts, *temperature_range(rows.dtype), *places.first()
    return module.cuda.DistillPlan(problem, *more)


def per_row(rows: RowProblem, *, terms: bool) -> RowOutputs:
    """Both terms of every row, the statistics, and the by-products if ``terms``."""
    check_labels_in_range(rows.op, rows)
    check_indices(rows.op, rows)
    module, n, dtype, device = native(), rows.n_rows, rows.dtype, rows.device
    keep: list[Any] = []

    def column() -> Tensor:
        return allocate.empty((n,), dtype, device)

    soft, hard = column(), column()
    statistics = allocate.empty((n, STATISTICS), dtype, device)
    extra: ByProducts | None = None
    if terms:
        label_probs: tuple[Tensor | None, Tensor | None] = (None, None) if rows.labels is None else (column(), column())
        extra = ByProducts(column(), column(), *label_probs, allocate.empty((n,), torch.bool, device))
    if n:
        addresses = [address(t) for t in (soft, hard, statistics, *(extra or (None,) * 5))]
        problem, topk = row_description(module, rows, keep), native_topk(module, rows)
        scratch = _scratch(module, problem, topk, rows, False, keep)
        module.cuda.per_row(problem, topk, *addresses, scratch, *where(device))
    return RowOutputs(soft, hard, statistics, extra)


def per_row_backward(
    rows: RowProblem,
    statistics: Tensor,
    grad_soft: Tensor,
    grad_hard: Tensor,
    needs: RowNeeds,
    *,
    in_place: bool = False,
    student_dtype: torch.dtype | None = None,
) -> RowGradients:
    """Gradients of Σ grad_soft·soft + grad_hard·hard to all logits and, per row, temperatures and weights."""
    module, n, dtype, device = native(), rows.n_rows, rows.dtype, rows.device
    keep: list[Any] = []
    grad_soft, grad_hard, statistics = grad_soft.to(dtype), grad_hard.to(dtype), statistics.contiguous()

    def column(need: bool, *width: int) -> Tensor | None:
        return allocate.empty((n, *width), dtype, device) if need else None

    # A thread reads the classes that it writes, but for the logit of a label and those that a TopK lists.
    apart = rows.topk is None and not rows.divergence.needs_labels
    like: Any = (lambda logits: logits) if in_place and apart else allocate.empty_gradient
    found = RowGradients(
        like(rows.student) if needs.student else None,
        column(needs.temperature),
        column(needs.teacher_temperature),
        column(needs.teacher_weights, len(rows.teachers)),
        [like(t) if need else None for t, need in zip(rows.teachers, needs.teachers, strict=True)],
    )
    if n and any(t is not None for t in (*found[:4], *found.teachers)):
        problem, topk = row_description(module, rows, keep), native_topk(module, rows)
        module.cuda.per_row_backward(
            problem,
            topk,
            statistics.data_ptr(),
            grad_soft.data_ptr(),
            grad_soft.stride(0),
            grad_hard.data_ptr(),
            grad_hard.stride(0),
            address(found.student),
            [address(teacher) for teacher in found.teachers],
            address(found.temperature),
            address(found.teacher_temperature),
            address(found.teacher_weights),
            _scratch(module, problem, topk, rows, True, keep),
            *where(device),
        )
    return found.with_student_of(student_dtype)
