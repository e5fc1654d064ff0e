"""distill_loss: softened divergence and labels over rows of logits.

Per counted row, with x, y the transformed student and teacher logits, q = softmax(x/T), p = softmax(y/T):
    loss = weight · (soft_weight · T² D(p, q) + hard_weight · CE(x, label))
Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv:1503.02531.

A scalar loss computes its gradient in the forward pass: 3 passes over the logits (read student, read
teacher, write the gradient). Everything else keeps O(N) statistics and recomputes in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..backends import check_not_traced, choose, choose_recorded, row_backend
from ..backends.plans import Done, Plans
from ..backends.protocol import RowGradients, RowNeeds
from ..codes import STATISTICS
from ..divergences import Divergence
from ..problems.checks import by_pytorch, is_recorded, upstream
from ..problems.rows import DistillProblem, Normalizer, RowLoss, RowProblem, check_loss
from ..reference.distill_loss import combine, combine_rows, combine_with_parts, parts_of
from ..reference.distill_loss import row_terms as reference_terms
from ..types import DistillOutput, LogitTransform, TopK
from .autograd import (
    apply_of_plans,
    needs_reference,
    planned_gradients,
    ready_gradients,
    reference_gradients,
    requires_grad,
    save,
    saved,
    scaled,
)
from .class_sharded import class_sharded_loss
from .registration import define, define_backward, differentiate, flatten, unflatten

# ---------------------------------------------------------------------------------------------- scalar loss


class _ScalarLoss(torch.autograd.Function):
    """A computed loss, whose computed gradient the first backward hands to the student without a copy."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, done: Done) -> Tensor:  # noqa: ARG004
        (value, gradient, _), backend, tensors, rest, plan = done
        ctx.save_for_backward(*tensors, gradient)
        ctx.call = backend, rest, plan
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None]:
        backend, rest, plan = ctx.call
        kept = ctx.saved_tensors
        if (gradients := planned_gradients(ctx, kept, grad_output, -1, plan)) is not None:
            return gradients[0], None

        def problem() -> DistillProblem:
            return _PLANS.problem(rest, iter(kept))

        if needs_reference(grad_output):
            return _second_order(problem(), grad_output), None

        def again() -> list[Tensor | None]:
            p = problem()
            return [row_backend(backend).scalar(p.rows, p.loss, needs_grad=True, parts=False).student]

        return ready_gradients(ctx, kept[-1:], grad_output, backend, again)[0], None


def _second_order(p: DistillProblem, grad_output: Tensor) -> Tensor | None:
    """d loss/d student that can be differentiated again."""

    def value(leaves: list[Tensor]) -> list[Tensor]:
        return [combine(p.rows.replace(student=leaves[0], teachers=leaves[1:]), p.loss)]

    leaves, needs = (p.rows.student, *p.rows.teachers), (True, *(False for _ in p.rows.teachers))
    return reference_gradients(leaves, value, [grad_output], needs)[0]


# ------------------------------------------------------------------------------------------- per-row terms


class _RowTerms(torch.autograd.Function):
    """soft [N] and hard [N], differentiable to all that :func:`_leaves` lists, by recomputation."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: RowProblem,
        backend: str,
        terms: bool,
        *leaves: Tensor | None,  # noqa: ARG004
    ) -> tuple[Tensor | None, ...]:
        soft, hard, statistics, extra = row_backend(backend).per_row(rows, terms=terms)
        save(ctx, (rows,), statistics)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in extra or () if t is not None))
        return soft, hard, *(extra or ())

    @staticmethod
    def backward(ctx: Any, grad_soft: Tensor | None, grad_hard: Tensor | None, *_: Any) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[3:]
        if grad_soft is None and grad_hard is None:
            return (None,) * (3 + len(needs))
        (rows,), (statistics,) = saved(ctx)
        if needs_reference(grad_soft, grad_hard):
            found = reference_gradients(
                _leaves(rows), lambda leaves: _values(rows, leaves), (grad_soft, grad_hard), needs
            )
            return None, None, None, *found
        backend = row_backend(ctx.backend)
        wanted = unflatten(RowNeeds, needs, len(rows.teachers))
        return (
            None,
            None,
            None,
            *flatten(_row_gradients(rows, statistics, grad_soft, grad_hard, wanted, backend.per_row_backward)),
        )


def _leaves(rows: RowProblem) -> tuple[Tensor | None, ...]:
    """student, temperature, teacher_temperature, teacher_weights, teachers; None for a number."""
    # A tensor that serves both sides receives the sum of both gradients from autograd.
    temperatures = (t if isinstance(t, Tensor) else None for t in (rows.temperature, rows.teacher_temperature))
    return rows.student, *temperatures, rows.teacher_weights, *rows.teachers


def _values(rows: RowProblem, leaves: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """soft and hard of the reference, of these leaves."""
    student, temperature, teacher_temperature, weights, *teachers = leaves
    changed = rows.replace(
        student=student,
        temperature=rows.temperature if temperature is None else temperature,
        own_teacher_temperature=rows.teacher_temperature if teacher_temperature is None else teacher_temperature,
        teacher_weights=weights,
        teachers=teachers,
    )
    return reference_terms(changed)[:2]


def _row_gradients(
    rows: RowProblem,
    statistics: Tensor,
    grad_soft: Tensor | None,
    grad_hard: Tensor | None,
    needs: RowNeeds,
    run: Callable[..., RowGradients],
) -> RowGradients:
    """``run`` gives one value per row of temperatures and weights; of what all rows share it is summed."""
    zero = statistics.new_zeros(()).expand(rows.n_rows)
    ups = (zero if grad is None else upstream(grad) for grad in (grad_soft, grad_hard))
    found = run(rows, statistics, *ups, needs)

    def shared(gradient: Tensor | None, leaf: Any, dim: int) -> Tensor | None:
        per_row = gradient is None or not isinstance(leaf, Tensor) or leaf.dim() != dim
        return gradient if per_row or gradient is None else gradient.sum(0)

    return found._replace(
        temperature=shared(found.temperature, rows.temperature, 0),
        teacher_temperature=shared(found.teacher_temperature, rows.teacher_temperature, 0),
        teacher_weights=shared(found.teacher_weights, rows.teacher_weights, 1),
    )


def row_terms(rows: RowProblem, backend: str, terms: bool) -> tuple[Any, ...]:
    """soft, hard and, if asked, the by-products as ``[N]`` tensors."""
    if is_recorded():
        return by_pytorch(rows.op, rows.named_tensors, lambda: _recorded_terms(rows, backend, terms))
    result: tuple[Any, ...] = _RowTerms.apply(rows, backend, terms, *_leaves(rows))
    return result


# -------------------------------------------------------------------------------------------- registered ops


def _chosen(backend: str | None, rows: RowProblem) -> Any:
    return row_backend(choose("distill_loss", rows, backend))


def _run_loss(
    backend: str | None, rows: RowProblem, loss: RowLoss, needs_grad: bool, parts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    value, gradient, found = _chosen(backend, rows).scalar(rows, loss, needs_grad=needs_grad, parts=parts)
    gradient = value.new_empty(0, dtype=rows.student.dtype) if gradient is None else gradient
    return value, gradient, value.new_empty(0) if found is None else found


def _fake_loss(
    rows: RowProblem,
    loss: RowLoss,  # noqa: ARG001
    needs_grad: bool,
    parts: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    student = rows.student
    value, gradient = student.new_empty((), dtype=rows.dtype), student.new_empty(student.shape if needs_grad else (0,))
    return value, gradient, value.new_empty(4 if parts else 0)


def _loss_backward(_: str, problems: Any, kept: Any, grads: Any, need: Any) -> dict[tuple[int, str], Any]:  # noqa: ARG001
    if torch.is_grad_enabled():  # create_graph=True: the saved gradient is a constant, not an expression
        raise RuntimeError(
            "mfd_fast::distill_loss has no second derivatives; call mfd_fast.distill_loss eagerly for them, "
            "or with backend='reference'"
        )
    (gradient,), grad_loss = kept, grads[0]
    return {} if grad_loss is None else {(0, "student"): scaled(gradient, grad_loss)}


def _run_rows(backend: str | None, rows: RowProblem, terms: bool) -> tuple[Tensor, ...]:
    soft, hard, statistics, extra = _chosen(backend, rows).per_row(rows, terms=terms)
    if extra is None:
        return soft, hard, statistics, soft.new_empty(4, 0), soft.new_empty(0, dtype=torch.bool)
    *values, agreement = extra
    zeros = torch.zeros_like(soft)
    return soft, hard, statistics, torch.stack([zeros if v is None else v for v in values]), agreement


def _fake_rows(rows: RowProblem, terms: bool) -> tuple[Tensor, ...]:
    n, extra = rows.n_rows, rows.n_rows if terms else 0
    empty = rows.student.new_empty
    columns = [empty(shape, dtype=rows.dtype) for shape in ((n,), (n,), (n, STATISTICS), (4, extra))]
    return *columns, empty(extra, dtype=torch.bool)


def _run_rows_backward(
    backend: str | None, rows: RowProblem, statistics: Tensor, grad_soft: Tensor, grad_hard: Tensor, needs: list[bool]
) -> RowGradients:
    wanted = unflatten(RowNeeds, needs, len(rows.teachers))
    found: RowGradients = _chosen(backend, rows).per_row_backward(rows, statistics, grad_soft, grad_hard, wanted)
    return found


def _like_rows(rows: RowProblem) -> RowGradients:
    column = rows.student.new_empty(rows.n_rows, dtype=rows.dtype)
    weights = rows.student.new_empty(rows.n_rows, len(rows.teachers), dtype=rows.dtype)
    return RowGradients(rows.student, column, column, weights, list(rows.teachers))


def _rows_backward(
    backend: str, problems: list[RowProblem], kept: list[Tensor], grads: tuple[Any, ...], need: Callable[..., Any]
) -> dict[tuple[int, str], Any]:
    (rows,), (statistics,) = problems, kept
    one = rows.own_teacher_temperature is None
    of_teachers = need(0, "teachers")
    of_teachers = of_teachers if isinstance(of_teachers, (list, tuple)) else [of_teachers] * len(rows.teachers)
    temperature, own = need(0, "temperature"), need(0, "own_teacher_temperature")
    needs = RowNeeds(
        need(0, "student"), temperature, temperature if one else own, need(0, "teacher_weights"), of_teachers
    )

    def run(rows: RowProblem, *args: Any) -> RowGradients:
        *args_, wanted = args
        flat = _op_rows_backward(backend, [rows], *args_, flatten(wanted))
        found = [g if need else None for g, need in zip(flat, flatten(wanted), strict=True)]
        gradients: RowGradients = unflatten(RowGradients, found, len(rows.teachers))
        return gradients

    found = _row_gradients(rows, statistics, grads[0], grads[1], needs, run)
    of_temperature, of_own = found.temperature, found.teacher_temperature
    if one and of_temperature is not None and of_own is not None:
        # One temperature on both sides: its gradient is the sum of both sides'.
        of_temperature, of_own = of_temperature + of_own, None

    def at(gradient: Tensor | None, leaf: Any) -> Tensor | None:
        return None if gradient is None else gradient.to(leaf.device)

    return {
        (0, "student"): found.student,
        (0, "temperature"): at(of_temperature, rows.temperature),
        (0, "own_teacher_temperature"): at(of_own, rows.own_teacher_temperature),
        (0, "teacher_weights"): found.teacher_weights,
        (0, "teachers"): found.teachers,
    }


_op_loss = define(
    "distill_loss",
    (RowProblem, RowLoss),
    "bool needs_grad, bool parts",
    "(Tensor, Tensor, Tensor)",
    _run_loss,
    _fake_loss,
)
_op_rows = define(
    "distill_rows", (RowProblem,), "bool terms", "(Tensor, Tensor, Tensor, Tensor, Tensor)", _run_rows, _fake_rows
)
_op_rows_backward = define_backward(
    "distill_rows",
    (RowProblem,),
    "Tensor statistics, Tensor grad_soft, Tensor grad_hard",
    _run_rows_backward,
    _like_rows,
)
differentiate("distill_loss", (RowProblem, RowLoss), lambda out: out[1:2], lambda out: out[1:], _loss_backward)
differentiate("distill_rows", (RowProblem,), lambda out: out[2:3], lambda out: out[2:], _rows_backward)


def _recorded_terms(rows: RowProblem, backend: str, terms: bool) -> tuple[Tensor | None, ...]:
    soft, hard, _, values, agreement = _op_rows(backend, [rows], terms)
    return (soft, hard, values[0], values[1], values[2], values[3], agreement) if terms else (soft, hard)


# ------------------------------------------------------------------------------------------ public functions


@overload
def distill_loss(
    student: Tensor,
    teacher: Tensor | TopK | Sequence[Tensor] | None,
    labels: Tensor | None = None,
    *,
    return_parts: Literal[False] = False,
    **options: Any,
) -> Tensor: ...


@overload
def distill_loss(
    student: Tensor,
    teacher: Tensor | TopK | Sequence[Tensor] | None,
    labels: Tensor | None = None,
    *,
    return_parts: bool,
    **options: Any,
) -> Tensor | DistillOutput: ...


def distill_loss(  # type: ignore[misc]  # the options are these
    student: Tensor,
    teacher: Tensor | TopK | Sequence[Tensor] | None,
    labels: Tensor | None = None,
    *,
    teacher_weights: Tensor | None = None,
    divergence: str | Divergence = "forward_kl",
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    soft_weight: float | Tensor = 1.0,
    hard_weight: float | Tensor = 0.0,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    ignored_labels: str = "row",
    student_transform: LogitTransform | None = None,
    teacher_transform: LogitTransform | None = None,
    scale_by_temperature: bool = True,
    reduction: str = "mean",
    normalizer: Normalizer = None,
    return_parts: bool = False,
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor | DistillOutput:
    """Distillation loss ``weight · (soft_weight·T²·D(p, q) + hard_weight·CE)`` over rows of logits.

    p is the teacher and q the student, both softened; the divergences D are in :mod:`mfd_fast.divergences`.

    Args:
        student, teacher: ``[..., C]`` raw logits; float16, bfloat16, float32 or float64 (the two may
            differ), any strides. Never written. ``teacher`` may also be a :class:`~mfd_fast.TopK` of which K
            classes are known, a sequence of tensors: then the teacher is the weighted mean of their
            softened probabilities (not of their logits), or None where ``soft_weight`` is the number 0.
        labels: int64 ``[...]`` classes in [0, C), or ``ignore_index``, see ``ignored_labels``.
        teacher_weights: of several teachers, floating ``[K]`` or ``[..., K]``, >= 0; divided by their sum (so that
            only their ratios matter). None: equal.
        divergence: a name or a :class:`~mfd_fast.Divergence`; some need ``labels``.
        temperature: number > 0, 0-d tensor, or one per row ``[...]``; may require grad.
        teacher_temperature: the same for the teacher's side; None uses ``temperature``.
        soft_weight, hard_weight: number or 0-d tensor. A term whose weight is the number 0 is not computed.
        label_smoothing: ε in [0, 1] of the hard term.
        mask: bool ``[...]``; rows that are False do not exist: not read, not counted.
        weight: ``[...]`` factor of both terms per row; a row of weight 0 still counts in the mean.
        ignored_labels: "row": a row whose label is ``ignore_index`` counts as masked. "term": it has no hard term but
            keeps the soft one, and each term is divided by its own count: the hard term by the rows that have a label,
            as ``F.cross_entropy(ignore_index=...)``, the soft one by all. Not for DKD and NKD, whose soft term compares
            the label's class with the others: a row without a label has none.
        student_transform, teacher_transform: :class:`~mfd_fast.LogitTransform`.
        scale_by_temperature: multiply the soft term by temperature² (per row).
        reduction: "mean" (sum over rows / number of counted rows, 0 if there are none), "sum", or
            "none" (per row, 0 on rows that are not counted).
        normalizer: number > 0 or 0-d tensor that replaces the row count of "mean" (gradient accumulation), or a pair
            of them for the soft and the hard term.
        return_parts: return the detached parts as well.
        process_group: of torch.distributed, whose ranks hold the classes in turn; see
            :func:`mfd_fast.linear_distill_loss`. The student alone is differentiated, in plain PyTorch.
        backend: "reference", "cpu", "triton", "cuda" or None for the fastest that can run.

    Returns:
        float32 tensor (float64 if either side is float64), 0-d or ``[...]``. Differentiable to ``student``, and to
        ``teacher`` (the values of a TopK), ``teacher_weights``, the temperatures, ``weight``, ``soft_weight``,
        ``hard_weight`` and ``normalizer`` where they require grad. Second derivatives are computed by the reference.
        With ``return_parts`` a :class:`~mfd_fast.DistillOutput` of it and of the terms and entropies.

    Raises:
        TypeError, ValueError: an argument breaks the contract; raised before any work. Labels out of
            range raise on a CPU and give NaN for their row on a GPU and where torch.compile traces a small call.
        BackendError: the backend asked for cannot run.

    Formula: Hinton, Vinyals, Dean, arXiv:1503.02531.

    >>> import torch, mfd_fast as mfd
    >>> student = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    >>> loss = mfd.distill_loss(student, torch.tensor([[3.0, 2.0, 1.0]]), temperature=2.0)
    >>> loss.backward()
    >>> round(loss.item(), 4)
    1.2806
    """
    arguments = (
        *(student, teacher, labels, teacher_weights, divergence, temperature, teacher_temperature, soft_weight),
        *(hard_weight, label_smoothing, mask, weight, ignore_index, ignored_labels, student_transform),
        *(teacher_transform, scale_by_temperature, reduction, normalizer, return_parts, process_group, backend),
    )
    if not torch.compiler.is_compiling() and (done := _PLANS.run(arguments)) is not None:
        value = done[0][0] if done[2] is None else _apply(student, done)
        return DistillOutput(value, *done[0][2].unbind()) if return_parts else value

    check_not_traced("distill_loss", backend)
    problem = _PLANS.check(arguments)
    rows, loss = problem.rows, problem.loss
    if process_group is not None and return_parts:
        raise ValueError("distill_loss: return_parts must be False with process_group, got True")
    if process_group is not None:
        return class_sharded_loss("distill_loss", problem, process_group)
    recorded = is_recorded()
    if recorded:
        name = choose_recorded("distill_loss", rows, backend)
    else:
        name = choose("distill_loss", rows, backend, beside=loss)
    if name == "reference":
        of_reference: Callable[..., Any] = combine_with_parts if return_parts else combine
        return by_pytorch("distill_loss", problem.named_tensors, lambda: of_reference(rows, loss))

    recompute = (
        reduction == "none"
        # float16 gradients would underflow before a loss scale reaches them.
        or rows.student.dtype == torch.float16
        or requires_grad(*rows.teachers, rows.teacher_weights, rows.temperature, rows.own_teacher_temperature)
        or requires_grad(loss.weight, loss.soft_weight, loss.hard_weight, loss.normalizer, loss.hard_normalizer)
    )
    if recompute:
        seen = rows if loss.use_soft else rows.without_teacher()
        soft, hard, *extra = row_terms(seen, name, return_parts)
        value = combine_rows(rows, loss, soft, hard)
        parts = parts_of(rows, loss, soft, hard, extra[0], extra[1]) if return_parts else []
    elif recorded:
        needs_grad = requires_grad(rows.student)
        value, _, found = by_pytorch(
            "distill_loss", problem.named_tensors, lambda: _op_loss(name, (rows, loss), needs_grad, return_parts)
        )
        parts = list(found.unbind()) if return_parts else []
    else:
        needs_grad = requires_grad(rows.student)
        with torch.no_grad():
            value, gradient, found = row_backend(name).scalar(rows, loss, needs_grad=needs_grad, parts=return_parts)
        parts = [] if found is None else list(found.unbind())
        # A plan has a number where it reads one.
        plan = None if isinstance(normalizer, (tuple, list)) else getattr(row_backend(name), "call_plan", None)
        done = _PLANS.computed((value, gradient, found), name, problem, arguments, plan, rows, loss, return_parts)
        if needs_grad:
            value = _ScalarLoss.apply(rows.student, done)
    return DistillOutput(value, *parts) if return_parts else value


_apply = apply_of_plans(_ScalarLoss)
_PLANS = Plans(
    distill_loss, check_loss, numbers=("temperature", "teacher_temperature", "soft_weight", "hard_weight", "normalizer")
)
