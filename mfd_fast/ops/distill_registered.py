"""The ``torch.library`` face of the row losses: what torch.compile sees instead of the autograd functions.

    mfd_fast::distill_loss            scalar loss and its gradient with respect to the student
    mfd_fast::distill_rows            per-row terms, statistics and by-products
    mfd_fast::distill_rows_backward   gradients from the statistics

Temperatures and weights are tensors here, so changing them never recompiles. ``backend`` "" means: choose
when the op runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import choose, implementation
from ..backends.layout import STATISTICS
from ..divergences import divergence_from
from ..rows import Rows, TopKRows, is_used
from ..types import LogitTransform

# The problem as an op schema knows it: nine tensors (or lists of them), then its options.
_SCHEMA = (
    "Tensor student, Tensor teacher, Tensor temperature, Tensor? teacher_temperature, Tensor? teacher_weights, "
    "Tensor[] more_teachers, Tensor? labels, Tensor? mask, Tensor? topk_indices, "
    "SymInt classes, int ignore_index, float label_smoothing, bool scale_by_temperature, "
    "float student_scale, float student_softcap, bool student_standardize, "
    "float teacher_scale, float teacher_softcap, bool teacher_standardize, "
    "str topk_tail, bool topk_logprobs, str divergence, float[] divergence_parameters, str backend"
)
_TENSORS = 9
_N = 24  # arguments in _SCHEMA

_library = torch.library.Library("mfd_fast", "DEF")
_library.define(
    f"distill_loss({_SCHEMA}, Tensor? weight, Tensor soft_weight, Tensor? hard_weight, bool use_soft, "
    "bool mean, Tensor? normalizer, bool needs_grad) -> (Tensor, Tensor)"
)
_library.define(f"distill_rows({_SCHEMA}, bool terms) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define(
    f"distill_rows_backward({_SCHEMA}, Tensor stats, Tensor grad_soft, Tensor grad_hard, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])"
)


def _zero_dim(value: float | Tensor, dtype: torch.dtype) -> Tensor:
    # A CPU scalar on every device: reading it back at run time waits for nothing.
    # A product: torch.compile keeps a traced number symbolic in arithmetic, but bakes it into torch.full.
    return value if isinstance(value, Tensor) else torch.ones((), dtype=dtype) * value


def _pack(rows: Rows, backend: str) -> tuple[Any, ...]:
    student, teacher = rows.student_transform or LogitTransform(), rows.teacher_transform or LogitTransform()
    same = rows.teacher_temperature is rows.temperature
    indices, tail, logprobs = rows.topk or (None, "", False)
    return (
        rows.student,
        rows.teacher,
        _zero_dim(rows.temperature, rows.dtype),
        None if same else _zero_dim(rows.teacher_temperature, rows.dtype),
        rows.teacher_weights,
        list(rows.teachers[1:]),
        rows.labels,
        rows.mask,
        indices,
        rows.classes,
        rows.ignore_index,
        float(rows.label_smoothing),
        rows.scale_by_temperature,
        float(student.scale),
        float(student.softcap or 0.0),
        student.standardize,
        float(teacher.scale),
        float(teacher.softcap or 0.0),
        teacher.standardize,
        tail,
        logprobs,
        rows.divergence.name,
        list(rows.divergence.parameters),
        backend,
    )


def _number(value: Tensor | None) -> float | Tensor | None:
    """CPU scalars become numbers; device scalars stay where the kernel reads them."""
    return value.item() if value is not None and value.dim() == 0 and value.device.type == "cpu" else value


def _transform(scale: float, softcap: float, standardize: bool) -> LogitTransform | None:
    transform = LogitTransform(scale=scale, softcap=softcap or None, standardize=standardize)
    return transform if transform.changes_values else None


def _unpack(*args: Any) -> tuple[Rows, str]:
    student, teacher, temperature, teacher_temperature, weights, more, labels, mask, indices = args[:_TENSORS]
    classes, ignore_index, smoothing, scaled = args[_TENSORS : _TENSORS + 4]
    tail, logprobs, divergence, parameters, backend = args[_N - 5 : _N]
    first = _number(temperature)
    rows = Rows(
        student.detach(),
        teacher.detach(),
        labels,
        mask,
        first,  # type: ignore[arg-type]
        first if teacher_temperature is None else _number(teacher_temperature),  # type: ignore[arg-type]
        divergence_from(divergence, tuple(parameters)),
        smoothing,
        ignore_index,
        _transform(*args[_TENSORS + 4 : _TENSORS + 7]),
        _transform(*args[_TENSORS + 7 : _TENSORS + 10]),
        scaled,
        student.shape[:-1].numel(),
        classes,
        _loss_dtype(*args),
        topk=None if indices is None else TopKRows(indices, tail, logprobs),
        more_teachers=tuple(t.detach() for t in more),
        teacher_weights=weights,
    )
    return rows, choose("distill_loss", rows, backend or None)


def _loss_dtype(*args: Any) -> torch.dtype:
    """Of the arithmetic, from the arguments of an op."""
    return torch.float64 if torch.float64 in (t.dtype for t in (args[0], args[1], *args[5])) else torch.float32


# ------------------------------------------------------------------------------------------------- scalar op


def _loss_impl(*args: Any) -> tuple[Tensor, Tensor]:
    rows, backend = _unpack(*args[:_N])
    weight, soft_weight, hard_weight, use_soft, mean, normalizer, needs_grad = args[_N:]
    loss, gradient = implementation(backend, "distill_loss").scalar(
        rows,
        weight=weight,
        soft_weight=_number(soft_weight) if use_soft else 0.0,
        hard_weight=0.0 if hard_weight is None else _number(hard_weight),
        mean=mean,
        normalizer=_number(normalizer),
        needs_grad=needs_grad,
    )
    return loss, gradient if gradient is not None else loss.new_empty(0, dtype=rows.student.dtype)


def _loss_fake(*args: Any) -> tuple[Tensor, Tensor]:
    student, needs_grad = args[0], args[-1]
    loss = student.new_empty((), dtype=_loss_dtype(*args))
    return loss, student.new_empty(student.shape if needs_grad else (0,))


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.more, ctx.arguments = len(inputs[5]), len(inputs)


def _loss_backward(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():  # create_graph=True: the saved gradient is a constant, not an expression
        raise RuntimeError(
            "mfd_fast::distill_loss has no second derivatives; call mfd_fast.distill_loss eagerly for them, "
            "or with backend='reference'"
        )
    (gradient,) = ctx.saved_tensors
    student = None if grad_loss is None else gradient * grad_loss.to(gradient.dtype)
    return student, None, None, None, None, [None] * ctx.more, *(None,) * (ctx.arguments - 6)


# -------------------------------------------------------------------------------------------------- per row


def _rows_impl(*args: Any) -> tuple[Tensor, ...]:
    rows, backend = _unpack(*args[:_N])
    soft, hard, stats, extra = implementation(backend, "distill_loss").per_row(rows, terms=args[_N])
    if extra is None:
        return soft, hard, stats, soft.new_empty(4, 0), soft.new_empty(0, dtype=torch.bool)
    *values, agreement = extra
    zeros = torch.zeros_like(soft)
    return soft, hard, stats, torch.stack([zeros if v is None else v for v in values]), agreement


def _rows_fake(*args: Any) -> tuple[Tensor, ...]:
    student, terms = args[0], args[_N]
    n, dtype = student.shape[:-1].numel(), _loss_dtype(*args)
    extra = n if terms else 0
    return (
        student.new_empty(n, dtype=dtype),
        student.new_empty(n, dtype=dtype),
        student.new_empty(n, STATISTICS, dtype=dtype),
        student.new_empty(4, extra, dtype=dtype),
        student.new_empty(extra, dtype=torch.bool),
    )


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*inputs[:5], *inputs[6:_TENSORS], output[2], *inputs[5])
    ctx.options = inputs[_TENSORS:_N]


def _rows_backward(ctx: Any, grad_soft: Tensor | None, grad_hard: Tensor | None, *_: Any) -> tuple[Any, ...]:
    student, teacher, temperature, teacher_temperature, weights, labels, mask, indices, stats, *more = ctx.saved_tensors
    zero = stats.new_zeros(stats.shape[0])
    first, second, *shared, of_weights, of_more = ctx.needs_input_grad[:6]
    # One temperature on both sides: its gradient is the sum of both sides'.
    one = teacher_temperature is None
    needs = [first, second, shared[0], shared[0] if one else shared[1]]
    if more:
        needs += [of_weights, *(of_more if isinstance(of_more, (list, tuple)) else [of_more] * len(more))]
    *found, d_more = torch.ops.mfd_fast.distill_rows_backward(
        *(student, teacher, temperature, teacher_temperature, weights, more, labels, mask, indices),
        *ctx.options,
        stats,
        zero if grad_soft is None else grad_soft,
        zero if grad_hard is None else grad_hard,
        needs,
    )
    out: list[Tensor | None] = [g if need else None for g, need in zip(found, [*needs, False][:5], strict=True)]
    if one and out[2] is not None and out[3] is not None:
        out[2], out[3] = out[2] + out[3], None
    for k, value, dim in ((2, temperature, 0), (3, teacher_temperature, 0), (4, weights, 1)):
        gradient = out[k]
        if gradient is not None and value.dim() == dim:
            out[k] = gradient.sum(0).to(value.device)
    of_list = [g if need else None for g, need in zip(d_more, needs[5:], strict=True)]
    return *out, of_list, *(None,) * (_N + 1 - 6)


def _rows_backward_impl(*args: Any) -> tuple[Any, ...]:
    rows, backend = _unpack(*args[:_N])
    stats, grad_soft, grad_hard, needs = args[_N:]
    found = implementation(backend, "distill_loss").per_row_backward(rows, stats, grad_soft, grad_hard, tuple(needs))
    filled = [stats.new_empty(0) if g is None else g for g in found]
    filled += [stats.new_empty(0)] * (5 - len(filled))
    return *filled[:5], filled[5:]


def _rows_backward_fake(*args: Any) -> tuple[Any, ...]:
    student, teacher, more, stats, needs = args[0], args[1], args[5], args[_N], args[-1]
    per_row = stats[:, 0]
    like = (student, teacher, per_row, per_row, stats.new_empty(stats.shape[0], 1 + len(more)), *more)
    needs = [*needs, False] if len(needs) == 4 else needs
    out = [t.new_empty(t.shape) if need else stats.new_empty(0) for t, need in zip(like, needs, strict=True)]
    return *out[:5], out[5:]


for _name, _impl, _fake in (
    ("distill_loss", _loss_impl, _loss_fake),
    ("distill_rows", _rows_impl, _rows_fake),
    ("distill_rows_backward", _rows_backward_impl, _rows_backward_fake),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mfd_fast::{_name}", _fake, lib=_library)
torch.library.register_autograd("mfd_fast::distill_loss", _loss_backward, setup_context=_loss_setup, lib=_library)
torch.library.register_autograd("mfd_fast::distill_rows", _rows_backward, setup_context=_rows_setup, lib=_library)


def _no_second_derivatives(*_: Any) -> tuple[Any, ...]:
    raise RuntimeError(
        "mfd_fast::distill_rows_backward has no derivatives; call mfd_fast.distill_loss or distill_terms eagerly "
        "for second derivatives, or with backend='reference'"
    )


torch.library.register_autograd("mfd_fast::distill_rows_backward", _no_second_derivatives, lib=_library)


# ----------------------------------------------------------------------------------------- calls under compile


def loss(rows: Rows, backend: str, options: dict[str, Any]) -> Tensor:
    """The scalar loss as one node of the graph."""
    soft_weight, hard_weight, normalizer = (
        options["soft_weight"],
        options["hard_weight"],
        options["normalizer"],
    )
    use_soft = is_used(soft_weight)
    use_hard = is_used(hard_weight)
    needs_grad = torch.is_grad_enabled() and rows.student.requires_grad
    out: Tensor = torch.ops.mfd_fast.distill_loss(
        *_pack(rows, backend),
        options["weight"],
        _zero_dim(soft_weight, rows.dtype),
        _zero_dim(hard_weight, rows.dtype) if use_hard else None,
        use_soft,
        options["mean"],
        None if normalizer is None else _zero_dim(normalizer, rows.dtype),
        needs_grad,
    )[0]
    return out


def row_terms(rows: Rows, backend: str, terms: bool) -> tuple[Tensor | None, ...]:
    """soft, hard and, if asked, the by-products as ``[N]`` tensors."""
    soft, hard, _, values, agreement = torch.ops.mfd_fast.distill_rows(*_pack(rows, backend), terms)
    return (soft, hard, values[0], values[1], values[2], values[3], agreement) if terms else (soft, hard)
