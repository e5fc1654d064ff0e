"""The row-loss entry points in plain PyTorch, with the gradients written out in ``gradients``.

The public functions with ``backend="reference"`` run the differentiable composition of
:mod:`mfd_fast.reference.distill_loss` directly; these entry points serve the registered ops, inside which
autograd does not record.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...codes import STATISTICS
from ...divergences import NKD
from ...problems.rows import RowLoss, RowProblem
from ...reference.distill_loss import (
    RowTerms,
    Sides,
    both_sides,
    combine_with_parts,
    compared,
    divergence_value,
    for_lists,
    log_rest,
    mix,
    raw_logits,
    row_factors,
    row_terms,
    soften,
    sparse_teacher,
    where_true,
)
from ..protocol import ByProducts, RowGradients, RowNeeds, RowOutputs, ScalarLoss
from .gradients import label_slopes, project, slopes, temperature_slope, through_transform

__all__ = ["can_run", "per_row", "per_row_backward", "scalar"]


def can_run(rows: RowProblem) -> str | None:  # noqa: ARG001
    """Every call can run."""
    return None


def scalar(rows: RowProblem, loss: RowLoss, *, needs_grad: bool, parts: bool) -> ScalarLoss:
    """The scalar loss and, if asked, its gradient with respect to the student and its parts."""
    value, *terms = combine_with_parts(rows, loss)
    of_terms = torch.stack(terms) if parts else None
    if not needs_grad:
        return ScalarLoss(value, None, of_terms)
    return ScalarLoss(value, _gradients(rows, *row_factors(rows, loss)).student, of_terms)


def per_row(rows: RowProblem, *, terms: bool) -> RowOutputs:
    """``soft``, ``hard``, the statistics and the by-products."""
    values = row_terms(rows)
    by_products = ByProducts(*values[2:]) if terms else None  # type: ignore[arg-type]
    return RowOutputs(values.soft.clone(), values.hard.clone(), _statistics(rows, values), by_products)


def per_row_backward(
    rows: RowProblem,
    statistics: Tensor,  # noqa: ARG001
    grad_soft: Tensor,
    grad_hard: Tensor,
    needs: RowNeeds,
    *,
    in_place: bool = False,  # noqa: ARG001
    student_dtype: torch.dtype | None = None,
) -> RowGradients:
    """Gradients of Σ grad_soft·soft + grad_hard·hard."""
    found = _gradients(rows, grad_soft, grad_hard)
    return RowGradients(
        found.student if needs.student else None,
        found.temperature if needs.temperature else None,
        found.teacher_temperature if needs.teacher_temperature else None,
        found.teacher_weights if needs.teacher_weights else None,
        [g if need else None for g, need in zip(found.teachers, needs.teachers, strict=True)],
    ).with_student_of(student_dtype)


class _Gradients(NamedTuple):
    student: Tensor
    teachers: list[Tensor]
    temperature: Tensor
    teacher_temperature: Tensor
    teacher_weights: Tensor


def _gradients(rows: RowProblem, grad_soft: Tensor | None, grad_hard: Tensor | None) -> _Gradients:
    """All of them; a term whose upstream gradient is None has no part."""
    sides = both_sides(rows, rows.op)
    x, ys = sides.x, sides.ys
    none = x.new_zeros(rows.n_rows)
    total = _Gradients(
        torch.zeros_like(x), [torch.zeros_like(y) for y in ys], none, none, x.new_zeros(rows.n_rows, len(ys))
    )
    if grad_soft is not None:
        total = _of_soft_term(rows, sides, grad_soft.to(rows.dtype), total)
    dx = total.student
    if grad_hard is not None and sides.labels is not None:
        smoothing = rows.label_smoothing
        target = torch.full_like(x, smoothing / rows.classes)
        target.scatter_add_(-1, sides.labels[:, None], torch.full_like(x[:, :1], 1 - smoothing))
        of_labels = where_true(rows.labelled(), grad_hard.to(rows.dtype))
        assert of_labels is not None
        dx = dx + of_labels[:, None] * (x.softmax(-1) - target)
    raw_x, raw_ys = raw_logits(rows)
    counted = rows.counted()

    def existing(values: Tensor) -> Tensor:
        if counted is None:
            return values
        return torch.where(counted.reshape(-1, *(1,) * (values.dim() - 1)), values, torch.zeros_like(values))

    def whole(side: Tensor, gradient: Tensor) -> Tensor:
        """In the side's shape and dtype; columns that are not used get 0."""
        full = gradient.new_zeros(rows.n_rows, side.shape[-1])
        full[:, : gradient.shape[-1]] = existing(gradient)
        return full.to(side.dtype).reshape(side.shape)

    return _Gradients(
        whole(rows.student, through_transform(dx, raw_x, rows.student_transform)),
        [
            whole(t, through_transform(dy, raw, rows.teacher_transform))
            for t, dy, raw in zip(rows.teachers, total.teachers, raw_ys, strict=True)
        ],
        existing(total.temperature),
        existing(total.teacher_temperature),
        existing(total.teacher_weights),
    )


def _of_soft_term(rows: RowProblem, sides: Sides, upstream: Tensor, zero: _Gradients) -> _Gradients:
    """Of Σ upstream·soft, with respect to the transformed logits, the temperatures and the weights."""
    if len(sides.ys) > 1:  # as soft_value
        sides = sides._replace(x=sides.x.double(), ys=[y.double() for y in sides.ys])
    t, teacher_t, divergence = rows.temperature, rows.teacher_temperature, rows.divergence
    log_p, log_q = compared(rows, sides, t, teacher_t)
    value = divergence_value(rows, log_p, log_q, sides.label)
    factor = upstream * t**2 if rows.scale_by_temperature else upstream
    a, b = slopes(divergence, log_p, log_q, sides.label)
    scale = factor * divergence.gamma if isinstance(divergence, NKD) else factor
    total = _add(zero, _chain(rows, sides, (log_p, log_q), (a, b), t, teacher_t), scale)
    if rows.scale_by_temperature:
        total = total._replace(temperature=total.temperature + 2 * t * upstream * value)
    if isinstance(divergence, NKD):  # its first term is one of temperature 1 and has no factor
        assert sides.label is not None
        logs = compared(rows, sides, 1.0, 1.0)
        first = _chain(rows, sides, logs, label_slopes(*logs, sides.label), 1.0, 1.0)
        none = torch.zeros_like(upstream)
        total = _add(total, first._replace(temperature=none, teacher_temperature=none), upstream)
    return _Gradients(
        total.student.to(rows.dtype), [g.to(rows.dtype) for g in total.teachers], *(g.to(rows.dtype) for g in total[2:])
    )


def _add(total: _Gradients, more: _Gradients, scale: Tensor) -> _Gradients:
    column = scale[:, None]
    return _Gradients(
        total.student + column * more.student,
        [a + column * b for a, b in zip(total.teachers, more.teachers, strict=True)],
        total.temperature + scale * more.temperature,
        total.teacher_temperature + scale * more.teacher_temperature,
        total.teacher_weights + column * more.teacher_weights,
    )


def _column(value: float | Tensor) -> float | Tensor:
    return value.reshape(-1, 1) if isinstance(value, Tensor) else value


def _chain(
    rows: RowProblem,
    sides: Sides,
    logs: tuple[Tensor, Tensor],
    ab: tuple[Tensor, Tensor],
    t: float | Tensor,
    teacher_t: float | Tensor,
) -> _Gradients:
    """From the slopes a, b of the classes compared to the gradients of D, without its factor T²."""
    (log_p, log_q), (a, b), (x, ys) = logs, ab, (sides.x, sides.ys)
    du, p = project(a, log_q.exp()), log_p.exp()
    weights = x.new_zeros(rows.n_rows, len(ys))
    if rows.topk is not None and sides.indices is not None:
        tail, indices = rows.topk.tail, sides.indices
        width = indices.shape[-1]
        if tail != "zero":
            # A rest is the log-sum-exp of its classes: each takes its share q_j / q_rest.
            whole = for_lists(rows, x)
            spread = torch.zeros_like(whole)
            if tail == "bucket":
                others = soften(whole, t).scatter(-1, indices, -torch.inf) - log_q[:, -1:]
                spread = torch.where(log_q[:, -1:] == -torch.inf, spread, du[:, -1:] * others.exp())
            du = spread.scatter_add(-1, indices, du[:, :width])
        du = du[:, : rows.classes]
        dy, slope = _sparse_teacher_gradient(rows, ys[0], b, indices, teacher_t)
        teachers, teacher_slope = [dy], slope
    else:
        teachers, teacher_slope = [], torch.zeros_like(weights[:, 0])
        for k, y in enumerate(ys):
            if len(ys) == 1:
                dv = project(b, p)
            else:
                log_p_k = soften(y, teacher_t)
                ratio = (log_p_k - log_p).clamp_max(math.log(torch.finfo(b.dtype).max) - 1.0).exp()
                share = torch.where(log_p == -torch.inf, torch.zeros_like(b), ratio * b)
                weights[:, k] = share.sum(-1)
                weight = 1 / len(ys) if rows.teacher_weights is None else rows.teacher_weights[..., k, None]
                dv = weight * project(share, log_p_k.exp())
            teacher_slope = teacher_slope + temperature_slope(dv, y, teacher_t)
            teachers.append(dv / _column(teacher_t))
    return _Gradients(du / _column(t), teachers, temperature_slope(du, x, t), teacher_slope, weights)


def _sparse_teacher_gradient(
    rows: RowProblem, values: Tensor, b: Tensor, indices: Tensor, teacher_t: float | Tensor
) -> tuple[Tensor, Tensor]:
    """To the K values, and −Σ dv·v/T_t of the temperature; v = [values, log of the rest]/T_t."""
    assert rows.topk is not None
    if rows.topk.tail == "zero":
        b = b.gather(-1, indices)
    if b.shape[-1] == values.shape[-1]:
        b = torch.cat((b, torch.zeros_like(b[:, :1])), -1)
    dv = project(b, sparse_teacher(rows, values, teacher_t).exp())
    rest = log_rest(rows, values)
    # d log(1 − Σ e^y)/dy = −e^y / (1 − Σ e^y)
    share = torch.where(rest == -torch.inf, torch.zeros_like(values), (values - rest).exp())
    dy = dv[:, :-1] - dv[:, -1:] * share
    return dy / _column(teacher_t), temperature_slope(dv, torch.cat((values, rest), -1), teacher_t)


def _statistics(rows: RowProblem, values: RowTerms) -> Tensor:
    """Those that all backends share and KL; of several teachers those of log p, of a TopK those of its values."""
    sides = both_sides(rows, rows.op)
    x, y, teacher_t = sides.x, sides.ys[0], rows.teacher_temperature
    if len(sides.ys) > 1:
        y, teacher_t = mix([soften(z, teacher_t) for z in sides.ys], rows.teacher_weights), 1.0
    out = x.new_zeros(rows.n_rows, STATISTICS)
    # log Σexp((x−max)/T) is minus the largest log-probability.
    out[:, 0], out[:, 1] = x.amax(-1), -soften(x, rows.temperature).amax(-1)
    out[:, 2], out[:, 3] = y.amax(-1), -soften(y, teacher_t).amax(-1)
    if rows.labels is not None:
        out[:, 4] = -torch.log_softmax(x, -1).amax(-1)
    out[:, 5] = values.soft / rows.temperature**2 if rows.scale_by_temperature else values.soft
    counted = rows.counted()
    return out if counted is None else torch.where(counted[:, None], out, torch.zeros_like(out))
