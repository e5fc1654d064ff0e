"""linear_distill_loss: the distillation loss from hidden states; logits exist for some rows at a time only.

Per counted row, with z = student_hidden·student_weightᵀ + student_bias and t the teacher's logits likewise:
    loss = weight · (soft_weight · T² D(p, q) + hard_weight · CE(z, label)),  the row losses of `distill_loss`.
With dz the row losses' gradient:
    d hidden = dz·weight,  d weight = Σ over chunks of dzᵀ·hidden,  d bias = Σ over rows of dz.
The chunked head: Hsu et al., Liger Kernel, arXiv:2410.10989.

Masked and ignored rows are dropped before any product. A scalar loss computes its gradients in the forward pass:
4 products, ``2·N·C·(Ht + 3·Hs)`` FLOP. Everything else computes the logits again in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import check_not_traced, choose
from ..backends.chunked_heads import HEADS, LinearGradients, Terms, leaves_of, run
from ..backends.class_sharded import ClassSharded
from ..divergences import Divergence
from ..problems.checks import by_pytorch, is_recorded, upstream
from ..problems.linear import HeadProblem, LinearProblem, check_linear_distill_loss, default_chunk_rows
from ..problems.rows import Normalizer, RowLoss, RowProblem, check_indices, check_labels_in_range
from ..reference.distill_loss import combine_rows, reduce_rows, row_factors
from ..reference.linear_distill_loss import linear_row_terms
from ..types import LinearDistillOutput, LogitTransform, TopK
from .autograd import ready_gradients, reference_gradients, requires_grad, save, saved, scaled
from .class_sharded import check_class_sharded, wants_reference
from .registration import define, define_backward, differentiate

# -------------------------------------------------------------------------------------------------- autograd


def _values(rows: RowProblem, loss: RowLoss, heads: HeadProblem, leaves: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """soft and hard of the reference, of these leaves."""
    of = LinearGradients(*leaves)
    changed = rows.replace(
        teachers=[rows.teacher if of.teacher is None else of.teacher],
        temperature=rows.temperature if of.temperature is None else of.temperature,
        own_teacher_temperature=rows.teacher_temperature if of.teacher_temperature is None else of.teacher_temperature,
    )
    soft, hard, *_ = linear_row_terms(changed, loss, heads.replace(**dict(zip(HEADS, leaves, strict=False))))
    return soft, hard


def _scalar(
    backend: str, rows: RowProblem, loss: RowLoss, heads: HeadProblem, needs: LinearGradients, sharded: Any = None
) -> Terms:
    """The terms, and the gradients of the scalar loss."""
    return run(backend, rows, loss, heads, *row_factors(rows, loss), needs, sharded)


class _ScalarLoss(torch.autograd.Function):
    """The loss with its gradients computed beside it, and per row soft, hard and entropy."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: RowProblem,
        loss: RowLoss,
        heads: HeadProblem,
        backend: str,
        sharded: ClassSharded | None,
        grad_enabled: bool,
        *leaves: Tensor | None,  # noqa: ARG004
    ) -> tuple[Tensor, ...]:
        # Under no_grad (`grad_enabled` is False) autograd still says that a leaf needs its gradient.
        needs = LinearGradients(*(grad_enabled and need for need in ctx.needs_input_grad[6:]))
        soft, hard, entropy, gradients = _scalar(backend, rows, loss, heads, needs, sharded)
        if any(needs):
            save(ctx, (rows, loss, heads), *gradients)
            ctx.backend, ctx.sharded = backend, sharded
        ctx.mark_non_differentiable(soft, hard, entropy)
        return combine_rows(rows, loss, soft, hard), soft, hard, entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
        needs, kept = ctx.needs_input_grad[6:], ctx.saved_tensors
        if wants_reference("linear_distill_loss", ctx.sharded, grad_loss):
            rows, loss, heads = saved(ctx, kept)[0]

            def value(leaves: list[Any]) -> list[Tensor]:
                return [combine_rows(rows, loss, *_values(rows, loss, heads, leaves))]

            return (*(None,) * 6, *reference_gradients(leaves_of(rows, heads), value, [grad_loss], needs))

        def again() -> LinearGradients:
            rows, loss, heads = saved(ctx, kept)[0]
            return _scalar(ctx.backend, rows, loss, heads, LinearGradients(*needs), ctx.sharded).gradients

        return *(None,) * 6, *ready_gradients(ctx, kept[ctx.count :], grad_loss, ctx.backend, again)


class _RowTerms(torch.autograd.Function):
    """soft, hard [N], differentiable to every leaf by recomputation, and the entropy, which is not."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: RowProblem,
        loss: RowLoss,
        heads: HeadProblem,
        backend: str,
        sharded: ClassSharded | None,
        *leaves: Tensor | None,  # noqa: ARG004
    ) -> tuple[Tensor, ...]:
        soft, hard, entropy, _ = run(backend, rows, loss, heads, sharded=sharded)
        save(ctx, (rows, loss, heads))
        ctx.backend, ctx.sharded = backend, sharded
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(entropy)
        return soft, hard, entropy

    @staticmethod
    def backward(ctx: Any, grad_soft: Tensor | None, grad_hard: Tensor | None, *_: Any) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[5:]
        if grad_soft is None and grad_hard is None:
            return (None,) * (5 + len(needs))
        rows, loss, heads = saved(ctx)[0]
        if wants_reference("linear_distill_loss", ctx.sharded, grad_soft, grad_hard):
            found: Sequence[Any] = reference_gradients(
                leaves_of(rows, heads), lambda v: _values(rows, loss, heads, v), (grad_soft, grad_hard), needs
            )
        else:
            soft, hard = (None if g is None else upstream(g) for g in (grad_soft, grad_hard))
            found = run(ctx.backend, rows, loss, heads, soft, hard, LinearGradients(*needs), ctx.sharded).gradients
        return *(None,) * 5, *found


# -------------------------------------------------------------------------------------------- registered ops

_PROBLEMS = (RowProblem, RowLoss, HeadProblem)
_STUDENT = HEADS[:3]


def _check_values(rows: RowProblem) -> None:
    """Before the first chunk, in which a row has another number. A recorded call had no values to look at."""
    check_labels_in_range("linear_distill_loss", rows)
    check_indices("linear_distill_loss", rows)


def _chosen(backend: str | None, rows: RowProblem, loss: RowLoss, heads: HeadProblem) -> str:
    beside = LinearProblem(rows=rows, loss=loss, heads=heads)
    return choose("distill_loss", rows, backend, "linear_distill_loss", beside=beside)


def _run_loss(
    backend: str | None, rows: RowProblem, loss: RowLoss, heads: HeadProblem, needs: list[bool]
) -> tuple[Tensor, ...]:
    _check_values(rows)
    wanted = LinearGradients(*needs)
    soft, hard, entropy, found = _scalar(_chosen(backend, rows, loss, heads), rows, loss, heads, wanted)
    gradients = (soft.new_empty(0) if g is None else g for g in found.student_head)
    return combine_rows(rows, loss, soft, hard), soft, hard, entropy, *gradients


def _fake_loss(rows: RowProblem, loss: RowLoss, heads: HeadProblem, needs: list[bool]) -> tuple[Tensor, ...]:  # noqa: ARG001
    empty = rows.student.new_empty
    leaves = (getattr(heads, name) for name in _STUDENT)
    gradients = [t.new_empty(t.shape) if need else empty(0) for t, need in zip(leaves, needs, strict=True)]
    return empty(()), *(empty(rows.n_rows) for _ in range(3)), *gradients


def _loss_backward(_: str, problems: Any, kept: Any, grads: Any, need: Any) -> dict[tuple[int, str], Any]:  # noqa: ARG001
    if torch.is_grad_enabled():  # create_graph=True: the saved gradients are constants, not expressions
        raise RuntimeError(
            "mfd_fast::linear_distill_loss has no second derivatives; call mfd_fast.linear_distill_loss eagerly for "
            "them, or with backend='reference'"
        )
    found = ((name, g) for name, g in zip(_STUDENT, kept, strict=True) if grads[0] is not None and need(2, name))
    return {(2, name): scaled(g, grads[0]) for name, g in found}


def _run_rows(backend: str | None, rows: RowProblem, loss: RowLoss, heads: HeadProblem) -> tuple[Tensor, ...]:
    _check_values(rows)
    return run(_chosen(backend, rows, loss, heads), rows, loss, heads)[:3]


def _fake_rows(rows: RowProblem, loss: RowLoss, heads: HeadProblem) -> tuple[Tensor, ...]:  # noqa: ARG001
    return tuple(rows.student.new_empty(rows.n_rows) for _ in range(3))


def _run_rows_backward(
    backend: str | None,
    rows: RowProblem,
    loss: RowLoss,
    heads: HeadProblem,
    grad_soft: Tensor | None,
    grad_hard: Tensor | None,
    needs: list[bool],
) -> LinearGradients:
    name = _chosen(backend, rows, loss, heads)
    return run(name, rows, loss, heads, grad_soft, grad_hard, LinearGradients(*needs)).gradients


def _rows_backward(
    backend: str,
    problems: list[Any],
    kept: Any,  # noqa: ARG001
    grads: tuple[Any, ...],
    need: Any,
) -> dict[tuple[int, str], Any]:
    rows, loss, heads = problems
    if grads[0] is None and grads[1] is None:
        return {}
    one = rows.own_teacher_temperature is None
    of_teacher = need(0, "teachers")
    of_teacher = of_teacher[0] if isinstance(of_teacher, (list, tuple)) else of_teacher
    temperature = need(0, "temperature")
    needs = LinearGradients(
        **{name: need(2, name) for name in HEADS},
        teacher=of_teacher and heads.teacher_weight is None,
        temperature=temperature,
        teacher_temperature=temperature if one else need(0, "own_teacher_temperature"),
    )
    flat = _op_rows_backward(backend, [rows, loss, heads], grads[0], grads[1], list(needs))
    found = LinearGradients(*(g if wanted else None for g, wanted in zip(flat, needs, strict=True)))
    of_temperature, of_own = found.temperature, found.teacher_temperature
    if one and of_temperature is not None:
        # One temperature on both sides: its gradient is the sum of both sides'.
        of_temperature, of_own = of_temperature + of_own, None
    return {
        **{(2, name): getattr(found, name) for name in HEADS},
        (0, "teachers"): [found.teacher],
        (0, "temperature"): of_temperature,
        (0, "own_teacher_temperature"): of_own,
    }


_op_loss = define(
    "linear_distill_loss",
    _PROBLEMS,
    "bool[] needs",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda backend, rows, loss, heads, needs: _run_loss(backend, rows, loss, heads, [*needs, *[False] * 6]),
    _fake_loss,
)
_op_rows = define("linear_distill_rows", _PROBLEMS, "", "(Tensor, Tensor, Tensor)", _run_rows, _fake_rows)
_op_rows_backward = define_backward(
    "linear_distill_rows",
    _PROBLEMS,
    "Tensor? grad_soft, Tensor? grad_hard",
    _run_rows_backward,
    lambda rows, loss, heads: leaves_of(rows, heads),  # noqa: ARG005
)
differentiate("linear_distill_loss", _PROBLEMS, lambda out: out[4:], lambda out: out[1:], _loss_backward)
differentiate("linear_distill_rows", _PROBLEMS, lambda out: (), lambda out: out[2:], _rows_backward)  # noqa: ARG005


# ------------------------------------------------------------------------------------------- public function


def linear_distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | TopK | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
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
    chunk_rows: int | None = None,
    process_group: Any = None,
    backend: str | None = None,
) -> LinearDistillOutput:
    """:func:`mfd_fast.distill_loss` of two heads' logits that are never all in memory.

    Args:
        student_hidden, student_weight, student_bias: ``[..., Hs]``, ``[C, Hs]`` and ``[C]`` or None, floating.
        teacher_hidden, teacher_weight, teacher_bias: the teacher's. With ``teacher_weight=None`` the first is the
            teacher's logits ``[..., C]`` or a :class:`~mfd_fast.TopK`; None where ``soft_weight`` is the number 0.
        labels, divergence, temperature, …, normalizer: as in :func:`mfd_fast.distill_loss`. Rows that are masked or
            ignored are dropped before the products; on a GPU their number is waited for. ``classes`` of a
            transform reads only that many rows of the weight. Labels are not shifted.
        chunk_rows: rows whose logits are in memory at a time, >= 1. None: 32 MiB of one side's logits on a CPU,
            256 MiB elsewhere, at least 256 rows. The result is the same up to rounding.
        process_group: of torch.distributed, whose ranks hold the classes ``C`` in turn: weights, biases and teacher
            logits are this rank's, hidden states and labels are the same on all. Forward KL, reverse KL, JSD and the
            hard term; the student's head alone is differentiated, and the gradient of its hidden states is the sum
            over the ranks. The rows are computed in plain PyTorch; not under torch.compile.
        backend: "reference", "cpu", "triton", "cuda" or None for the fastest that can run.

    Returns:
        :class:`~mfd_fast.types.LinearDistillOutput`. ``loss`` is differentiable to hidden states, weights and biases
        of both sides and to all that distill_loss differentiates to; the other fields are detached. Logits and the
        sums of all gradients are float32 (float64 where an input is); each gradient is rounded once.

    Raises:
        TypeError, ValueError: an argument breaks the contract; raised before any work. BackendError: the backend
            asked for cannot run.

    >>> import torch, mfd_fast as mfd
    >>> student, teacher = torch.randn(6, 8), torch.randn(6, 16)
    >>> out = mfd.linear_distill_loss(student, torch.randn(50, 8), teacher, torch.randn(50, 16), temperature=2.0)
    >>> out.loss.shape, out.rows.item()
    (torch.Size([]), 6)
    """
    op = "linear_distill_loss"
    check_not_traced(op, backend)
    problem = check_linear_distill_loss(
        op,
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        weight=weight,
        reduction=reduction,
        normalizer=normalizer,
        chunk_rows=chunk_rows,
        divergence=divergence,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        label_smoothing=label_smoothing,
        mask=mask,
        ignore_index=ignore_index,
        ignored_labels=ignored_labels,
        student_transform=student_transform,
        teacher_transform=teacher_transform,
        scale_by_temperature=scale_by_temperature,
    )
    rows, loss, heads = problem.rows, problem.loss, problem.heads
    recorded, sharded = is_recorded(), None
    if process_group is not None:
        check_class_sharded(op, rows, problem.widths, process_group, [*leaves_of(rows, heads)[3:], *loss.tensors()])
        sharded = ClassSharded(process_group, rows.classes, rows.device)
        if chunk_rows is None:  # the same on all ranks, whose all-reduces meet
            heads = heads.replace(chunk_rows=default_chunk_rows(sharded.most, rows.dtype, rows.device))
    parts = rows, loss, heads
    _check_values(rows if sharded is None else rows.replace(classes=sharded.classes))
    # Under torch.compile the registered op chooses when it runs: no choice is baked into the graph.
    name = backend or "" if recorded else _chosen(backend, *parts)
    leaves = leaves_of(rows, heads)
    recompute = (
        loss.reduction == "none"
        # float16 gradients would underflow before a loss scale reaches them.
        or any(leaf is not None and leaf.dtype == torch.float16 for leaf in leaves[:3])
        or requires_grad(*leaves[3:], *loss.tensors())
    )

    def terms() -> tuple[Tensor, ...]:
        if name == "reference" and sharded is None:
            return tuple(linear_row_terms(rows, loss, heads)[:3])
        found: tuple[Tensor, ...] = (
            _op_rows(name, parts) if recorded else _RowTerms.apply(*parts, name, sharded, *leaves)
        )
        return found

    def whole() -> tuple[Tensor, ...]:
        needs = [requires_grad(leaf) for leaf in leaves[:3]]
        found: tuple[Tensor, ...] = (
            _op_loss(name, parts, needs)[:4]
            if recorded
            else _ScalarLoss.apply(*parts, name, sharded, torch.is_grad_enabled(), *leaves)
        )
        return found

    if recompute or (name == "reference" and sharded is None):
        soft, hard, entropy = by_pytorch(op, problem.named_tensors, terms)
        value = combine_rows(rows, loss, soft, hard)
        if not (loss.use_soft or loss.use_hard):  # a loss without terms can still be differentiated
            value = value + heads.student_hidden[..., :0].sum().to(value.dtype)
    else:
        value, soft, hard, entropy = by_pytorch(op, problem.named_tensors, whole)
    counted = rows.counted()
    count = torch.full((), rows.n_rows, device=rows.device) if counted is None else counted.sum()
    with torch.no_grad():
        soft, hard = (
            reduce_rows(term.detach() if used else torch.zeros_like(term), rows, loss, hard=of_labels).detach()
            for term, used, of_labels in ((soft, loss.use_soft, False), (hard, loss.use_hard, True))
        )
        return LinearDistillOutput(value, soft, hard, entropy.detach().sum(), count)
