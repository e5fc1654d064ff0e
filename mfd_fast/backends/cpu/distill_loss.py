"""distill_loss on the native CPU kernels: marshals tensors to addresses and allocates the outputs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...codes import STATISTICS
from ...problems.checks import label_error, temperature_range
from ...problems.rows import RowLoss, RowProblem, check_indices
from .. import allocate
from ..native import RowScalar, address, native_rows, native_topk, reads_rows
from ..plans import Places
from ..protocol import ByProducts, RowGradients, RowNeeds, RowOutputs, ScalarLoss
from . import STREAM_BYTES, native, streams

__all__ = ["call_plan", "can_run", "count", "per_row", "per_row_backward", "row_description", "scalar"]


def can_run(rows: RowProblem) -> str | None:
    """Why the native kernels cannot take this call, None if they can."""
    if rows.device.type != "cpu":
        return f"the tensors are on {rows.device}"
    return rows.divergence.why_no_kernel()


def _temperature(value: float | Tensor) -> RowScalar:
    if not isinstance(value, Tensor):
        return value, 0, 0
    if value.dim() == 0:
        return value.item(), 0, 0
    return 1.0, value.data_ptr(), value.stride(0)


def row_description(module: ModuleType, rows: RowProblem, keep: list[Any]) -> Any:
    """The native description of ``rows``; what it points into is appended to ``keep``."""
    return native_rows(module, rows, keep, _temperature)


def _check_lists(module: ModuleType, rows: RowProblem, problem: Any, topk: Any) -> None:
    """Raises ValueError for a sparse teacher's indices that are out of range, repeated, or lack a label they need."""
    if topk is not None and not module.lists_are_valid(problem, topk, torch.get_num_threads()):
        check_indices(rows.op, rows)


def count(module: ModuleType, rows: RowProblem, problem: Any) -> int:
    """Number of counted rows; raises ValueError for a label out of range in one of them."""
    if rows.labels is None and rows.mask is None:
        return rows.n_rows
    counted: int = module.count_rows(problem)
    if counted < 0:
        assert rows.labels is not None
        row = -1 - counted
        raise label_error(rows.op, row, int(rows.labels[row]), rows.classes)
    return counted


def divisors(module: ModuleType, rows: RowProblem, loss: RowLoss, problem: Any, counted: int) -> tuple[float, float]:
    """What the sums of the soft and of the hard term are divided by."""
    if loss.reduction != "mean":
        return 1.0, 1.0
    divisor = float(max(counted, 1) if loss.normalizer is None else loss.normalizer)
    if not loss.counts_apart(rows):
        return divisor, divisor
    if loss.hard_normalizer is not None:
        return divisor, float(loss.hard_normalizer)
    return divisor, float(max(module.count_labelled(problem), 1))


def scalar(rows: RowProblem, loss: RowLoss, *, needs_grad: bool, parts: bool) -> ScalarLoss:
    """The scalar loss and, from the same pass, its gradient with respect to the student and its parts."""
    module = native()
    keep: list[Any] = []
    use_soft, use_hard = loss.use_soft, rows.labels is not None and loss.use_hard
    problem = row_description(module, rows, keep)
    counted = count(module, rows, problem)
    topk = native_topk(module, rows)
    _check_lists(module, rows, problem, topk)
    of_soft, of_hard = divisors(module, rows, loss, problem, counted)
    value = allocate.empty((), rows.dtype, rows.device)
    of_terms = allocate.empty((4,), rows.dtype, rows.device) if parts else None
    gradient = allocate.empty_gradient(rows.student) if needs_grad else None
    if not (use_soft or use_hard):
        value.zero_()
        return ScalarLoss(
            value, None if gradient is None else gradient.zero_(), None if of_terms is None else of_terms.zero_()
        )
    module.scalar(
        problem,
        topk if use_soft else None,
        use_soft,
        use_hard,
        address(loss.weight),
        _divide(float(loss.soft_weight), of_soft),
        _divide(float(loss.hard_weight), of_hard),
        value.data_ptr(),
        address(gradient),
        streams(gradient),
        address(of_terms),
        _divide(1.0, of_soft),
        _divide(1.0, of_hard),
        torch.get_num_threads(),
    )
    return ScalarLoss(value, gradient, of_terms)


def call_plan(rows: RowProblem, loss: RowLoss, parts: bool, places: Places) -> Any:
    """The native plan of :func:`scalar` for calls like this one; None where :func:`reads_rows` says so."""
    if not reads_rows(rows, loss, places):
        return None
    module, mean = native(), loss.reduction == "mean"
    use_hard = rows.labels is not None and loss.use_hard
    problem = row_description(module, rows, [])
    terms = loss.use_soft, use_hard, mean, parts
    return module.DistillPlan(problem, *terms, *temperature_range(rows.dtype), *places.first())


def _divide(factor: float, divisor: float) -> float:
    """IEEE division: a normalizer of 0 gives inf or NaN, as it does for tensors."""
    if divisor != 0:
        return factor / divisor
    return float(torch.tensor(factor, dtype=torch.float64) / divisor)


def per_row(rows: RowProblem, *, terms: bool) -> RowOutputs:
    """Both terms of every row, the statistics, and the by-products if ``terms``."""
    module = native()
    keep: list[Any] = []
    n, device = rows.n_rows, rows.device
    problem = row_description(module, rows, keep)
    count(module, rows, problem)
    topk = native_topk(module, rows)
    _check_lists(module, rows, problem, topk)

    def column() -> Tensor:
        return allocate.empty((n,), rows.dtype, device)

    soft, hard = column(), column()
    statistics = allocate.empty((n, STATISTICS), rows.dtype, device)
    if topk is not None:  # its backward starts again from the logits
        statistics.zero_()
    extra: ByProducts | None = None
    addresses = [0] * 5
    if terms:
        label_probs: tuple[Tensor | None, Tensor | None] = (None, None) if rows.labels is None else (column(), column())
        extra = ByProducts(column(), column(), *label_probs, allocate.empty((n,), torch.bool, device))
        addresses = [address(t) for t in extra]
    if n:
        module.per_row(
            problem, topk, soft.data_ptr(), hard.data_ptr(), statistics.data_ptr(), *addresses, torch.get_num_threads()
        )
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
    """Gradients of ``sum(grad_soft*soft + grad_hard*hard)`` to all logits and, per row, temperatures and weights."""
    module = native()
    keep: list[Any] = []
    n, dtype, device = rows.n_rows, rows.dtype, rows.device
    problem = row_description(module, rows, keep)
    grad_soft, grad_hard, statistics = grad_soft.to(dtype), grad_hard.to(dtype), statistics.contiguous()

    def column(need: bool, *width: int) -> Tensor | None:
        return allocate.empty((n, *width), dtype, device) if need else None

    # A kernel reads a block of a row into its scratch before it writes that block's gradient.
    like: Any = (lambda logits: logits) if in_place else allocate.empty_gradient
    found = RowGradients(
        like(rows.student) if needs.student else None,
        column(needs.temperature),
        column(needs.teacher_temperature),
        column(needs.teacher_weights, len(rows.teachers)),
        [like(t) if need else None for t, need in zip(rows.teachers, needs.teachers, strict=True)],
    )
    if n:
        module.per_row_backward(
            problem,
            native_topk(module, rows),
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
            not in_place and any(t is not None and t.nbytes >= STREAM_BYTES for t in (found.student, *found.teachers)),
            torch.get_num_threads(),
        )
    return found.with_student_of(student_dtype)
