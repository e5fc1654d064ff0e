"""What ops do with ``process_group``: logits whose classes are divided over its ranks; distill_loss of such logits.

:class:`mfd_fast.backends.class_sharded.ClassSharded` computes the rows; linear_distill_loss calls it by chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.class_sharded import ClassSharded, why_not
from ..backends.protocol import RowNeeds
from ..problems.checks import is_recorded, upstream
from ..problems.rows import DistillProblem, RowLoss, RowProblem, check_labels_in_range
from ..reference.distill_loss import combine_rows
from .autograd import needs_reference, requires_grad, save, saved


def check_class_sharded(op: str, rows: RowProblem, widths: Sequence[int], group: Any, constant: Sequence[Any]) -> None:
    """Raises ValueError for what shards do not support. ``widths``: classes that this rank has of either side;
    ``constant``: what must not require a gradient.
    """
    if is_recorded():
        raise ValueError(f"{op}: process_group cannot be recorded by a compiler; call the op eagerly")
    reason = why_not(rows)
    if reason is not None:
        raise ValueError(f"{op}: process_group does not support {reason}")
    if set(widths) != {rows.classes}:
        raise ValueError(f"{op}: process_group does not support classes of a transform; pass this rank's classes alone")
    if torch.distributed.get_rank(group) < 0:
        raise ValueError(f"{op}: process_group must be a group of torch.distributed that this rank is in")
    if requires_grad(*constant):
        raise ValueError(f"{op}: with process_group, only the student is differentiated; detach the rest")


def wants_reference(op: str, sharded: ClassSharded | None, *grad_outputs: Tensor | None) -> bool:
    """:func:`needs_reference`; raises for shards, which have none."""
    needed = needs_reference(*grad_outputs)
    if needed and sharded is not None:
        raise RuntimeError(f"{op}: class-sharded logits have no second derivatives")
    return needed


class _RowTerms(torch.autograd.Function):
    """soft and hard ``[n]`` of counted rows, differentiable to this rank's columns of the student."""

    @staticmethod
    def forward(ctx: Any, rows: RowProblem, sharded: ClassSharded, student: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        soft, hard, statistics, _ = sharded.per_row(rows, terms=False)
        save(ctx, (rows,), statistics)
        ctx.sharded = sharded
        ctx.set_materialize_grads(False)
        return soft, hard

    @staticmethod
    def backward(ctx: Any, grad_soft: Tensor | None, grad_hard: Tensor | None) -> tuple[Tensor | None, ...]:
        wants_reference("distill_loss", ctx.sharded, grad_soft, grad_hard)
        (rows,), (statistics,) = saved(ctx)
        zero = statistics.new_zeros(()).expand(rows.n_rows)
        upstreams = (zero if g is None else upstream(g) for g in (grad_soft, grad_hard))
        needs = RowNeeds(True, False, False, False, [False])
        return None, None, ctx.sharded.per_row_backward(rows, statistics, *upstreams, needs).student


def class_sharded_loss(op: str, problem: DistillProblem, group: Any) -> Tensor:
    """distill_loss of this rank's classes; all ranks call it with the same options and get the same loss."""
    rows, loss = problem.rows, problem.loss
    constant = [*rows.teachers, rows.temperature, rows.own_teacher_temperature, *loss.tensors()]
    check_class_sharded(op, rows, problem.widths, group, constant)
    sharded = ClassSharded(group, rows.classes, rows.device)
    check_labels_in_range(op, rows.replace(classes=sharded.classes))
    counted = rows.counted()
    index = None if counted is None else counted.nonzero().squeeze(-1)
    soft, hard = _RowTerms.apply(*_counted(rows, loss, index, sharded))
    if index is not None:
        soft, hard = (term.new_zeros(rows.n_rows).index_copy(0, index, term) for term in (soft, hard))
    return combine_rows(rows, loss, soft, hard)


def _counted(
    rows: RowProblem, loss: RowLoss, index: Tensor | None, sharded: ClassSharded
) -> tuple[RowProblem, ClassSharded, Tensor]:
    """The rows ``index`` as the entry points of a backend take them, and their student's logits."""

    def of(value: Any) -> Any:
        return value[index] if isinstance(value, Tensor) and value.dim() and index is not None else value

    def matrix(logits: Tensor) -> Tensor:
        return of(logits.reshape(-1, logits.shape[-1]))  # type: ignore[no-any-return]

    student = matrix(rows.student)
    chosen = rows.replace(
        student=student,
        teachers=[matrix(rows.teacher) if loss.use_soft else student.detach()],
        labels=of(rows.labels) if loss.use_hard else None,
        mask=None,
        temperature=of(rows.temperature),
        own_teacher_temperature=of(rows.own_teacher_temperature),
        n_rows=student.shape[0],
    )
    return chosen, sharded, student
