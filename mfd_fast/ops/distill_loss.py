"""distill_loss and distill_terms: softened divergence and labels over rows of logits.

Per counted row, with x, y the transformed student and teacher logits, q = softmax(x/T), p = softmax(y/T):
    loss = weight · (soft_weight · T² D(p, q) + hard_weight · CE(x, label))
Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv:1503.02531.

A scalar loss computes its gradient in the forward pass: 3 passes over the logits (read student, read
teacher, write the gradient). Everything else keeps O(N) statistics and recomputes in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import contract
from ..backends import check_not_traced, choose, implementation
from ..divergences import Divergence, ForwardKL
from ..reference.distill_loss import combine, combine_rows
from ..reference.distill_loss import row_terms as reference_terms
from ..rows import Rows, is_used
from ..types import DistillTerms, LogitTransform, TopK
from . import distill_registered as registered

# ---------------------------------------------------------------------------------------------- scalar loss


class _ScalarLoss(torch.autograd.Function):
    """loss with d loss/d student computed beside it and handed to the first backward without a copy."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, rows: Rows, backend: str, recorded: bool, options: dict[str, Any]) -> Tensor:
        # Under no_grad (`recorded` is False) autograd still says that a leaf needs its gradient.
        needs_grad = recorded and ctx.needs_input_grad[0]
        loss, gradient = implementation(backend, "distill_loss").scalar(rows, needs_grad=needs_grad, **options)
        if needs_grad:
            ctx.gradient = gradient
            ctx.call = (rows, backend, options)
            ctx.save_for_backward(student, *rows.teachers)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        rows, backend, options = ctx.call
        if torch.is_grad_enabled():
            return _differentiable_gradient(ctx, grad_output), None, None, None, None
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:  # a second backward: the buffer was given away, so the pass is run again
            again = _with_logits(rows, *ctx.saved_tensors)
            gradient = implementation(backend, "distill_loss").scalar(again, needs_grad=True, **options)[1]
        return _scale(gradient, contract.upstream(grad_output), backend), None, None, None, None


def _with_logits(rows: Rows, student: Tensor, *teachers: Tensor) -> Rows:
    return rows.replace(student=student, teacher=teachers[0], more_teachers=teachers[1:])


def _scale(gradient: Tensor, factor: Tensor, backend: str) -> Tensor:
    """``gradient *= factor`` without a wait for the device, and without a pass where the factor is 1."""
    if backend in ("cuda", "triton"):
        scaled: Tensor = implementation(backend, "distill_loss").scale_gradient_(gradient, factor)
        return scaled
    value = factor.item() if factor.device.type == "cpu" else None
    return gradient if value == 1.0 else gradient.mul_(factor if value is None else value)


def _differentiable_gradient(ctx: Any, grad_output: Tensor) -> Tensor:
    """backward(create_graph=True): the same gradient as a differentiable expression, by the reference."""
    rows, _, options = ctx.call
    student, *teachers = (t.view_as(t) for t in ctx.saved_tensors)  # several roles, also where they are one tensor
    loss = combine(
        _with_logits(rows, student, *teachers),
        options["weight"],
        options["soft_weight"],
        options["hard_weight"],
        "mean" if options["mean"] else "sum",
        options["normalizer"],
    )
    return torch.autograd.grad(loss, student, grad_output, create_graph=True)[0]


# ------------------------------------------------------------------------------------------- per-row terms


class _RowTerms(torch.autograd.Function):
    """soft [N] and hard [N], differentiable to all that :func:`_leaves` lists, by recomputation."""

    @staticmethod
    def forward(ctx: Any, rows: Rows, backend: str, terms: bool, *leaves: Tensor | None) -> tuple[Tensor | None, ...]:
        soft, hard, stats, extra = implementation(backend, "distill_loss").per_row(rows, terms=terms)
        ctx.save_for_backward(*leaves, stats)
        ctx.call = (rows, backend)
        ctx.set_materialize_grads(False)
        extra = extra or ()
        ctx.mark_non_differentiable(*(t for t in extra if t is not None))
        return soft, hard, *extra

    @staticmethod
    def backward(ctx: Any, grad_soft: Tensor | None, grad_hard: Tensor | None, *_: Any) -> tuple[Any, ...]:
        needs = tuple(ctx.needs_input_grad[3:])
        if grad_soft is None and grad_hard is None:
            return (None,) * (3 + len(needs))
        rows, backend = ctx.call
        *leaves, stats = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, None, None, *_differentiable_row_gradients(rows, leaves, grad_soft, grad_hard, needs)
        zero = stats.new_zeros(()).expand(rows.n_rows)
        gradients = list(
            implementation(backend, "distill_loss").per_row_backward(
                _with_logits(rows, leaves[0], leaves[1], *leaves[5:]),
                stats,
                zero if grad_soft is None else contract.upstream(grad_soft),
                zero if grad_hard is None else contract.upstream(grad_hard),
                needs if len(leaves) > 5 else needs[:4],
            )
        )
        gradients += [None] * (len(leaves) - len(gradients))
        for k, dim in ((2, 0), (3, 0), (4, 1)):  # one value per row, of something that all rows share
            gradient, leaf = gradients[k], leaves[k]
            if gradient is not None and leaf is not None and leaf.dim() == dim:
                gradients[k] = gradient.sum(0)
        return None, None, None, *gradients


def _leaves(rows: Rows) -> tuple[Tensor | None, ...]:
    """student, teacher, temperature, teacher_temperature, teacher_weights, further teachers; None if a number."""
    temperatures = (t if isinstance(t, Tensor) else None for t in (rows.temperature, rows.teacher_temperature))
    return rows.student, rows.teacher, *temperatures, rows.teacher_weights, *rows.teachers[1:]


def _differentiable_row_gradients(
    rows: Rows,
    leaves: Sequence[Tensor | None],
    grad_soft: Tensor | None,
    grad_hard: Tensor | None,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """backward(create_graph=True) of the per-row terms, by the reference."""
    # One alias per role: a tensor that serves in two of them gets each role's gradient once.
    leaves = [None if leaf is None else leaf.view_as(leaf) for leaf in leaves]
    student, teacher, temperature, teacher_temperature, weights, *more = leaves
    values = reference_terms(
        rows.replace(
            student=student,
            teacher=teacher,
            temperature=rows.temperature if temperature is None else temperature,
            teacher_temperature=rows.teacher_temperature if teacher_temperature is None else teacher_temperature,
            teacher_weights=weights,
            more_teachers=tuple(more),
        )
    )
    outputs, upstream = [], []
    for value, gradient in ((values.soft, grad_soft), (values.hard, grad_hard)):
        if gradient is not None and value.requires_grad:
            outputs.append(value)
            upstream.append(gradient)
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need and leaf is not None]
    found = iter(torch.autograd.grad(outputs, wanted, upstream, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def row_terms(rows: Rows, backend: str, terms: bool, compiling: bool) -> tuple[Any, ...]:
    """soft, hard and, if asked, the by-products as ``[N]`` tensors."""
    if compiling:
        return contract.by_pytorch(rows.op, rows.tensors(), lambda: registered.row_terms(rows, backend, terms))
    # A tensor that serves both sides receives the sum of both gradients from autograd.
    result: tuple[Any, ...] = _RowTerms.apply(rows, backend, terms, *_leaves(rows))
    return result


def _requires_grad(*values: object) -> bool:
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


# ------------------------------------------------------------------------------------------ public functions


class LossOptions(NamedTuple):
    """Checked factors of the two terms, per row ``[N]`` and for all, and what replaces the row count."""

    weight: Tensor | None
    soft_weight: float | Tensor
    hard_weight: float | Tensor
    normalizer: float | Tensor | None

    def tensors(self) -> dict[str, Tensor | None]:
        """Every tensor by the name of its argument."""
        return {k: v for k, v in self._asdict().items() if isinstance(v, Tensor)}


def check_loss(
    op: str,
    student: Tensor,
    teacher: Tensor | TopK | Sequence[Tensor],
    labels: Tensor | None,
    soft_weight: float | Tensor,
    hard_weight: float | Tensor,
    weight: Tensor | None,
    reduction: str,
    normalizer: float | Tensor | None,
    **options: Any,
) -> tuple[Rows, LossOptions]:
    """The whole contract of distill_loss; ``options`` are those of :func:`contract.check_rows`."""
    rows = contract.check_rows(op, student, teacher, labels, **options)
    soft_weight = contract.check_scalar(op, "soft_weight", soft_weight, dtype=rows.dtype)
    hard_weight = contract.check_scalar(op, "hard_weight", hard_weight, dtype=rows.dtype)
    if labels is None and is_used(hard_weight):
        raise contract.value_error(op, "labels", labels, "given when hard_weight is not 0")
    weight = contract.check_weight(op, weight, rows.student.shape[:-1], rows.device, rows.dtype)
    normalizer = contract.check_reduction(op, reduction, normalizer, rows.dtype)
    return rows, LossOptions(weight, soft_weight, hard_weight, normalizer)


def distill_loss(
    student: Tensor,
    teacher: Tensor | TopK | Sequence[Tensor],
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
    student_transform: LogitTransform | None = None,
    teacher_transform: LogitTransform | None = None,
    scale_by_temperature: bool = True,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Distillation loss ``weight · (soft_weight·T²·D(p, q) + hard_weight·CE)`` over rows of logits.

    p is the teacher and q the student, both softened; the divergences D are in :mod:`mfd_fast.divergences`.

    Args:
        student, teacher: ``[..., C]`` raw logits; float16, bfloat16, float32 or float64 (the two may
            differ), any strides. Never written. ``teacher`` may also be a :class:`~mfd_fast.TopK` of which K
            classes are known, or a sequence of tensors: then the teacher is the weighted mean of their
            softened probabilities (not of their logits).
        labels: int64 ``[...]`` classes in [0, C), or ``ignore_index``: such rows count as masked.
        teacher_weights: of several teachers, floating ``[K]`` or ``[..., K]``, >= 0; divided by their sum (so that
            only their ratios matter). None: equal.
        divergence: a name or a :class:`~mfd_fast.Divergence`; some need ``labels``.
        temperature: number > 0, 0-d tensor, or one per row ``[...]``; may require grad.
        teacher_temperature: the same for the teacher's side; None uses ``temperature``.
        soft_weight, hard_weight: number or 0-d tensor. A term whose weight is the number 0 is not computed.
        label_smoothing: ε in [0, 1] of the hard term.
        mask: bool ``[...]``; rows that are False do not exist: not read, not counted.
        weight: ``[...]`` factor of both terms per row; a row of weight 0 still counts in the mean.
        student_transform, teacher_transform: :class:`~mfd_fast.LogitTransform`.
        scale_by_temperature: multiply the soft term by temperature² (per row).
        reduction: "mean" (sum over rows / number of counted rows, 0 if there are none), "sum", or
            "none" (per row, 0 on rows that are not counted).
        normalizer: number > 0 or 0-d tensor that replaces the row count of "mean" (gradient accumulation).
        backend: "reference", "cpu", "triton", "cuda" or None for the fastest that can run.

    Returns:
        float32 tensor (float64 if either side is float64), 0-d or ``[...]``. Differentiable to ``student``, and to
        ``teacher`` (the values of a TopK), ``teacher_weights``, the temperatures, ``weight``, ``soft_weight``,
        ``hard_weight`` and ``normalizer`` where they require grad. Second derivatives are computed by the reference.

    Raises:
        TypeError, ValueError: an argument breaks the contract; raised before any work. Labels out of
            range raise on a CPU and give NaN for their row on a GPU.
        BackendError: the backend asked for cannot run.

    Formula: Hinton, Vinyals, Dean, arXiv:1503.02531.

    >>> import torch, mfd_fast as mfd
    >>> student = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    >>> loss = mfd.distill_loss(student, torch.tensor([[3.0, 2.0, 1.0]]), temperature=2.0)
    >>> loss.backward()
    >>> round(loss.item(), 4)
    1.2806
    """
    check_not_traced("distill_loss", backend)
    rows, (weight, soft_weight, hard_weight, normalizer) = check_loss(
        "distill_loss",
        student,
        teacher,
        labels,
        soft_weight,
        hard_weight,
        weight,
        reduction,
        normalizer,
        teacher_weights=teacher_weights,
        divergence=divergence,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        label_smoothing=label_smoothing,
        mask=mask,
        ignore_index=ignore_index,
        student_transform=student_transform,
        teacher_transform=teacher_transform,
        scale_by_temperature=scale_by_temperature,
    )
    compiling = contract.is_recorded()
    # Under torch.compile the registered op chooses when it runs: no choice is baked into the graph.
    name = backend or "" if compiling else choose("distill_loss", rows, backend)
    if name == "reference":
        return contract.by_pytorch(
            "distill_loss",
            rows.tensors(),
            lambda: combine(rows, weight, soft_weight, hard_weight, reduction, normalizer),
        )

    recompute = (
        reduction == "none"
        # float16 gradients would underflow before a loss scale reaches them.
        or student.dtype == torch.float16
        or _requires_grad(*rows.teachers, teacher_weights, temperature, teacher_temperature, weight)
        or _requires_grad(soft_weight, hard_weight, normalizer)
    )
    if recompute:
        if not isinstance(soft_weight, Tensor) and soft_weight == 0:  # the teacher has no part in the loss
            rows = rows.replace(
                divergence=ForwardKL(),
                teacher=student.detach(),
                more_teachers=(),
                teacher_weights=None,
                topk=None,
                teacher_transform=rows.student_transform,
                teacher_temperature=rows.temperature,
            )
        soft, hard, *_ = row_terms(rows, name, False, compiling)
        return combine_rows(rows, soft, hard, weight, soft_weight, hard_weight, reduction, normalizer)
    options = {
        "weight": weight,
        "soft_weight": soft_weight,
        "hard_weight": hard_weight,
        "mean": reduction == "mean",
        "normalizer": normalizer,
    }
    if compiling:
        return contract.by_pytorch(rows.op, rows.tensors(), lambda: registered.loss(rows, name, options))
    loss: Tensor = _ScalarLoss.apply(student, rows, name, torch.is_grad_enabled(), options)
    return loss


def distill_terms(
    student: Tensor,
    teacher: Tensor | TopK | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    teacher_weights: Tensor | None = None,
    divergence: str | Divergence = "forward_kl",
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    student_transform: LogitTransform | None = None,
    teacher_transform: LogitTransform | None = None,
    scale_by_temperature: bool = True,
    backend: str | None = None,
) -> DistillTerms:
    """The terms of :func:`distill_loss` per row, unweighted, with the by-products of the same pass.

    Args: as in :func:`distill_loss`.

    Returns:
        :class:`~mfd_fast.DistillTerms` of ``[...]`` tensors. ``soft`` (with its T²) and ``hard`` are
        differentiable one by one. Entropies (nats) and label probabilities are those of the softened
        distributions; ``agreement`` is true where both sides have the same argmax (first index on ties,
        false with a NaN). ``hard`` and the label probabilities are None without labels.

    Raises:
        TypeError, ValueError, BackendError: as in :func:`distill_loss`.

    >>> import torch, mfd_fast as mfd
    >>> terms = mfd.distill_terms(torch.zeros(1, 4), torch.zeros(1, 4))
    >>> terms.soft.item(), round(terms.student_entropy.item(), 4), terms.agreement.item()
    (0.0, 1.3863, True)
    """
    check_not_traced("distill_terms", backend)
    rows = contract.check_rows(
        "distill_terms",
        student,
        teacher,
        labels,
        teacher_weights=teacher_weights,
        divergence=divergence,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        label_smoothing=label_smoothing,
        mask=mask,
        ignore_index=ignore_index,
        student_transform=student_transform,
        teacher_transform=teacher_transform,
        scale_by_temperature=scale_by_temperature,
    )
    compiling = contract.is_recorded()
    name = backend or "" if compiling else choose("distill_loss", rows, backend, "distill_terms")
    if name == "reference":
        found: tuple[Any, ...] = contract.by_pytorch(
            "distill_terms", rows.tensors(), lambda: reference_terms(rows, "distill_terms")
        )
    else:
        found = row_terms(rows, name, True, compiling)
    values = list(found)
    if labels is None:
        values[1] = values[4] = values[5] = None
    leading = student.shape[:-1]
    return DistillTerms(*(None if v is None else v.reshape(leading) for v in values))  # type: ignore[arg-type]
