"""The row-loss entry points in plain PyTorch, with the gradients of ``numerics`` written out.

The public functions with ``backend="reference"`` run the differentiable composition of
:mod:`mfd_fast.reference.distill_loss` directly; these entry points serve the registered ops, inside which
autograd does not record. Every backend has the same four: ``can_run``, ``scalar``, ``per_row``, ``per_row_backward``.

``needs`` of the last, and the gradients it returns, are (student, teacher, temperature, teacher_temperature), and with
several teachers also (teacher_weights, second teacher, third teacher, …); the gradients of the temperatures are ``[N]``
and of the weights ``[N, teachers]``, one value per row, of weights that already sum to 1. With a TopK teacher the
gradient of the teacher is that of its values ``[..., K]``.
The statistics ``[N, 8]`` are: max x, log Σexp((x−max)/T), max y, log Σexp((y−max)/T), log Σexp(x−max), and three
that the backend chooses; only its own backward reads those three.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference.distill_loss import RowTerms, combine, row_terms, soften, transform_logits
from ...rows import Rows
from ...types import LogitTransform

Needs = tuple[bool, bool, bool, bool]


def can_run(rows: Rows) -> str | None:  # noqa: ARG001
    """Every call can run."""
    return None


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
    """The scalar loss and, if asked, its gradient with respect to the student."""
    loss = combine(rows, weight, soft_weight, hard_weight, "mean" if mean else "sum", normalizer)
    if not needs_grad:
        return loss, None
    factor = torch.ones(rows.n_rows, dtype=rows.dtype, device=rows.device) if weight is None else weight
    if mean and normalizer is not None:
        factor = factor / normalizer
    elif mean:
        counted = rows.counted()
        factor = factor / (max(rows.n_rows, 1) if counted is None else counted.sum().clamp_min(1))
    return loss, _student_gradient(rows, soft_weight, hard_weight, factor)


def per_row(rows: Rows, *, terms: bool) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...] | None]:
    """``soft``, ``hard``, the statistics that any backend's backward understands, and the by-products."""
    values = row_terms(rows)
    return values.soft.clone(), values.hard.clone(), _statistics(rows, values), tuple(values[2:]) if terms else None


def per_row_backward(
    rows: Rows,
    stats: Tensor,  # noqa: ARG001
    grad_soft: Tensor,
    grad_hard: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to student, teacher and, per row, to the two temperatures."""
    student = _student_gradient(rows, grad_soft[:, None], grad_hard[:, None]) if needs[0] else None
    if not any(needs[1:]):
        return student, None, None, None
    x, y, log_q, log_p = _sides(rows)
    p, q = log_p.exp(), log_q.exp()
    ratio = torch.where(p == 0, torch.zeros_like(p), log_p - log_q)  # r, with 0·r = 0
    kl = (p * ratio).sum(-1, keepdim=True)
    factor = _soft_factor(rows)
    teacher = None
    if needs[1]:
        gradient = grad_soft[:, None] * factor * p * (ratio - kl) / _column(rows.teacher_temperature)
        teacher = _through_transform(rows, rows.teacher, gradient, y, rows.teacher_transform)
    expect = lambda weights, values: (weights * torch.where(weights == 0, torch.zeros_like(values), values)).sum(-1)  # noqa: E731
    temperature = teacher_temperature = None
    if needs[2]:  # dK/dT = −(E_q[x] − E_p[x])/T², and T² itself depends on T
        t = rows.temperature
        temperature = (expect(p, x) - expect(q, x)) / t**2
        temperature = t**2 * temperature + 2 * t * kl.squeeze(-1) if rows.scale_by_temperature else temperature
        temperature = _only_counted(rows, grad_soft * temperature)
    if needs[3]:  # dK/dT_teacher = −(E_p[y r] − K E_p[y])/T_teacher²
        slope = expect(p, y * ratio) - kl.squeeze(-1) * expect(p, y)
        slope = -slope / rows.teacher_temperature**2 * factor.squeeze(-1)
        teacher_temperature = _only_counted(rows, grad_soft * slope)
    return student, teacher, temperature, teacher_temperature


def _column(value: float | Tensor) -> float | Tensor:
    return value.reshape(-1, 1) if isinstance(value, Tensor) else value


def _soft_factor(rows: Rows) -> Tensor:
    """T² where the soft term carries it, else 1, as a column."""
    one = torch.ones(1, 1, dtype=rows.dtype, device=rows.device)
    factor = _column(rows.temperature)
    return one * factor * factor if rows.scale_by_temperature else one


def _sides(rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Transformed logits x, y and log q, log p, each ``[N, C]``."""
    x, y = (
        transform_logits(side.reshape(rows.n_rows, side.shape[-1])[:, : rows.classes].to(rows.dtype), transform)
        for side, transform in ((rows.student, rows.student_transform), (rows.teacher, rows.teacher_transform))
    )
    return x, y, soften(x, rows.temperature), soften(y, rows.teacher_temperature)


def _student_gradient(
    rows: Rows, soft_weight: float | Tensor, hard_weight: float | Tensor, factor: Tensor | None = None
) -> Tensor:
    """Σ factor·(soft_weight·f(q−p)/T + hard_weight·(softmax(x) − (1−ε)e_label − ε/C)), through the transform."""
    x, _, log_q, log_p = _sides(rows)
    gradient = torch.zeros_like(x)
    if isinstance(soft_weight, Tensor) or soft_weight != 0:
        scale = _soft_factor(rows) / _column(rows.temperature)
        gradient = gradient + soft_weight * scale * (log_q.exp() - log_p.exp())
    if rows.labels is not None and (isinstance(hard_weight, Tensor) or hard_weight != 0):
        smoothing = rows.label_smoothing
        target = torch.full_like(x, smoothing / rows.classes)
        label = rows.labels.clamp(0, rows.classes - 1)[:, None]
        target.scatter_add_(-1, label, torch.full_like(x[:, :1], 1 - smoothing))
        gradient = gradient + hard_weight * (x.softmax(-1) - target)
    if factor is not None:
        gradient = factor[:, None] * gradient
    return _through_transform(rows, rows.student, gradient, x, rows.student_transform)


def _through_transform(
    rows: Rows, side: Tensor, gradient: Tensor, transformed: Tensor, transform: LogitTransform | None
) -> Tensor:
    """Gradient of the raw logits, in their shape and dtype; unused columns and uncounted rows get 0."""
    if transform is not None:
        if transform.softcap is not None:
            gradient = gradient * (1 - (transformed / transform.softcap).square())
        gradient = gradient * transform.scale
    full = gradient.new_zeros(rows.n_rows, side.shape[-1])
    full[:, : rows.classes] = _only_counted(rows, gradient)
    return full.to(side.dtype).reshape(side.shape)


def _only_counted(rows: Rows, values: Tensor) -> Tensor:
    counted = rows.counted()
    if counted is None:
        return values
    return torch.where(counted.reshape(-1, *(1,) * (values.dim() - 1)), values, torch.zeros_like(values))


def _statistics(rows: Rows, values: RowTerms) -> Tensor:
    """``[N, 8]``: max x, log Σexp((x−max)/T), max y, log Σexp((y−max)/T), log Σexp(x−max), KL, 0, 0."""
    x, y, log_q, log_p = _sides(rows)
    out = x.new_zeros(rows.n_rows, 8)
    # log Σexp((x−max)/T) is minus the largest log-probability.
    out[:, 0], out[:, 2] = x.amax(-1), y.amax(-1)
    out[:, 1], out[:, 3] = -log_q.amax(-1), -log_p.amax(-1)
    if rows.labels is not None:
        out[:, 4] = -torch.log_softmax(x, -1).amax(-1)
    out[:, 5] = values.soft / rows.temperature**2 if rows.scale_by_temperature else values.soft
    return _only_counted(rows, out)
