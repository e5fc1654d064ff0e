"""distill_loss on Triton: arguments, allocation and launches. The kernels are in ``kernels/triton/distill`` and
``kernels/triton/topk``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...codes import STATISTICS
from ...divergences import JSD, NKD, TVD, ForwardKL, ReverseKL, SkewKL, SkewReverseKL
from ...problems.rows import DistillProblem, RowLoss, RowProblem, Scalar, check_indices, check_labels_in_range
from .. import allocate
from ..plans import Places, label_places
from ..protocol import ByProducts, RowGradients, RowNeeds, RowOutputs, ScalarLoss
from . import program, why_not_device
from .launch import aligned, constants, finish, gradient, kernels, launch, number, realigned, taken
from .row_arguments import RowArguments, careful, plain_registers, row_arguments
from .scale import like_gradient, scale_gradients_
from .teachers import has_exponents, mixture_backward

__all__ = ["call_plan", "can_run", "per_row", "per_row_backward", "scalar"]

COUNT_BLOCK, COUNT_WARPS = 8192, 16
COUNTED_AT_ONCE = 32768  # rows that one program counts: so every other program has one number to read
MAX_COUNTS = 128
REDUCE_BLOCK = 1024
PARTS = 4  # of `reduce_loss`
# Numbers of the backward pass that the forward pass of topk_rows does not look at.
UPSTREAM = ("grad_soft_stride", "grad_hard_stride", "s_width")
# Beside the forward KL, of 16-bit logits.
POINTWISE = (ReverseKL, JSD, SkewKL, SkewReverseKL, TVD)
MAX_TEACHERS = 8  # the kernels are unrolled over them
MAX_COLUMNS = 2**31 - 2**16  # column numbers of a tile are int32


def can_run(rows: RowProblem) -> str | None:
    """None if the kernels cover this call, else the reason."""
    if len(rows.teachers) > MAX_TEACHERS:
        return f"at most {MAX_TEACHERS} teachers"
    if max(logits.shape[-1] for logits in (rows.student, *rows.teachers)) > MAX_COLUMNS:
        return f"at most {MAX_COLUMNS} columns"
    return why_not_device(rows.device) or rows.divergence.why_no_kernel()


def scalar(rows: RowProblem, loss: RowLoss, *, needs_grad: bool, parts: bool) -> ScalarLoss:
    """The scalar loss and, if asked, its parts and its gradient to the student, in one pass over the rows."""
    check_labels_in_range(rows.op, rows)
    check_indices(rows.op, rows)
    soft, hard = loss.use_soft, rows.labels is not None and loss.use_hard
    value = allocate.empty((), rows.dtype, rows.device)
    written, grad = gradient(rows.student) if needs_grad else (None, None)
    if rows.n_rows == 0 or not (soft or hard):
        value.zero_()
        return ScalarLoss(value, None if grad is None else grad.zero_(), value.new_zeros(4) if parts else None)

    whole, loss = loss, loss.folded()
    counts, n_counts = None, 0
    divisor: Scalar = 1.0
    if loss.reduction == "mean" and loss.normalizer is not None:
        divisor = loss.normalizer
    elif loss.reduction == "mean":
        divisor = float(rows.n_rows)
        if rows.labels is not None or rows.mask is not None:
            counts, n_counts = _count(rows)
    sparse = soft and rows.topk is not None
    if rows.topk is not None and not sparse:  # the teacher is not read
        rows = rows.replace(topk=None, indices=None, teachers=[rows.student])
    plain = soft and is_plain(rows) and not parts
    common = row_arguments(rows, (rows.student.shape[-1],), heavy=parts, plain=plain)
    programs = -(-rows.n_rows // common.blocks.rows)
    partial = allocate.empty((programs,), torch.float64, rows.device)
    of_terms = allocate.empty((PARTS,), rows.dtype, rows.device) if parts else None
    partial_parts = allocate.empty((PARTS, programs), torch.float64, rows.device) if parts else None
    terms, numbers = loss_arguments(rows, loss, divisor)
    flags = constants({"COUNTS": 1 if n_counts <= 1 else MAX_COUNTS})
    terms = terms._replace(partial_ptr=partial, parts_ptr=partial_parts, grad_ptr=written, counts_ptr=counts, **flags)
    arguments = common.numbers | numbers | {"n_counts": n_counts, "width": rows.student.shape[-1] // common.unit}
    arguments |= {"p": common.problem, "listed": common.listed, "loss": terms}
    arguments["how"] = common.how(soft=soft, hard=hard, smooth=rows.label_smoothing != 0, terms=parts and soft)
    kernel = kernels("topk.scalar").topk_scalar if sparse else kernels("distill.scalar").distill_scalar
    more = {}
    if plain:
        kernel = kernels("distill.plain").plain_scalar
        arguments["careful"] = careful(arguments["how"], common.blocks.warps)
        widest = max(rows.student.element_size(), rows.teacher.element_size())
        more = {"maxnreg": plain_registers(rows, common.blocks, widest)}
    launch(kernel, programs, rows.device, common.blocks.warps, taken(kernel, arguments), **more)
    _reduce(terms, numbers["normalizer"], programs, n_counts, value, of_terms)
    if of_terms is not None and whole.hard_normalizer is not None:  # the launch has summed up
        of_terms = _over(of_terms, whole.normalizer, whole.hard_normalizer)
    return ScalarLoss(value, None if grad is None or written is None else finish(written, grad), of_terms)


def call_plan(rows: RowProblem, loss: RowLoss, parts: bool, places: Places) -> Any:  # noqa: ARG001
    """The native plan of :func:`scalar` for calls like this one, or None."""
    if not program.can_plan(places):
        return None
    needs_grad = rows.student.requires_grad and torch.is_grad_enabled()

    def forward(problem: DistillProblem) -> Any:
        return lambda: tuple(scalar(problem.rows, problem.loss, needs_grad=needs_grad, parts=parts))

    gradients = [like_gradient(rows.student)] if needs_grad else []
    labels = label_places(places, rows)
    return program.plan(places, rows.dtype, forward, labels, scale=scale_gradients_, gradients=gradients)


def is_plain(rows: RowProblem) -> bool:
    """Whether `plain_scalar` has a hot loop for the soft term of these rows."""
    sixteen = max(rows.student.element_size(), rows.teacher.element_size()) == 2
    return (
        rows.topk is None
        and rows.ignored_labels == "row"
        and len(rows.teachers) == 1
        and (isinstance(rows.divergence, ForwardKL) or (isinstance(rows.divergence, POINTWISE) and sixteen))
        and rows.student_transform is None
        and rows.teacher_transform is None
        and rows.dtype == torch.float32
    )


def loss_arguments(rows: RowProblem, loss: RowLoss, divisor: Scalar) -> tuple[Any, dict[str, float]]:
    """`structs.Loss` without outputs and counts, and the numbers that go with it."""
    soft_number, soft_ptr = number(loss.soft_weight, rows.student)
    hard_number, hard_ptr = number(loss.hard_weight, rows.student)
    divisor_number, divisor_ptr = number(divisor, rows.student)
    pointers = (None, None, None, aligned(loss.weight), soft_ptr, hard_ptr, divisor_ptr, None)
    terms = kernels("rows.structs").Loss(
        *pointers, **constants({"COUNTS": MAX_COUNTS, "APART": loss.counts_apart(rows)})
    )
    return terms, {"soft_weight": soft_number, "hard_weight": hard_number, "normalizer": divisor_number}


def _over(parts: Tensor, *normalizers: Scalar | None) -> Tensor:
    """``parts`` over the normalizer of the soft or of the hard term."""
    of_soft, of_hard = (n.to(parts) if isinstance(n, Tensor) else parts.new_full((), n) for n in normalizers)  # type: ignore[arg-type]
    return parts / torch.stack((of_soft, of_hard, of_soft, of_soft))


def _reduce(terms: Any, normalizer: float, programs: int, n_counts: int, loss: Tensor, parts: Tensor | None) -> None:
    """The second stage of the loss and of its parts: the partial sums in a fixed order, over the divisor."""
    tl = kernels("rows.reduce").tl
    arguments = {
        "out_ptr": loss,
        "parts_ptr": parts,
        "loss": terms._replace(grad_ptr=None, weight_ptr=None, soft_weight_ptr=None, hard_weight_ptr=None),
        "normalizer": normalizer,
        "n_partials": programs,
        "n_counts": n_counts,
        "DTYPE": tl.float64 if loss.dtype == torch.float64 else tl.float32,
        "BLOCK": REDUCE_BLOCK,
    }
    launch(kernels("rows.reduce").reduce_loss, 1, loss.device, 4, arguments)


def per_row(rows: RowProblem, *, terms: bool) -> RowOutputs:
    """soft [N], hard [N], stats [N, STATISTICS] and, if asked, the by-products."""
    check_labels_in_range(rows.op, rows)
    check_indices(rows.op, rows)
    n, dtype, device = rows.n_rows, rows.dtype, rows.device
    soft, hard = allocate.empty((n,), dtype, device), allocate.empty((n,), dtype, device)
    stats = allocate.empty((n, STATISTICS), dtype, device)
    extra: list[Tensor | None] = [None] * 5
    if terms:
        of_labels = 4 if rows.labels is not None else 2
        extra[:of_labels] = [allocate.empty((n,), dtype, device) for _ in range(of_labels)]
        extra[4] = allocate.empty((n,), torch.bool, device)
    if n:
        common = row_arguments(rows, (), heavy=terms)
        arguments = common.numbers | {"p": common.problem, "listed": common.listed}
        arguments |= {
            "out": kernels("distill.per_row").RowTerms(soft, hard, stats, *extra),
            "of": _nothing(kernels("distill.backward").RowGradients),
        }
        arguments |= {"how": _per_row_how(rows, common, terms), **dict.fromkeys(UPSTREAM, 0)}
        kernel = kernels("distill.per_row").distill_rows if rows.topk is None else kernels("topk.per_row").topk_rows
        launch(kernel, -(-n // common.blocks.rows), device, common.blocks.warps, taken(kernel, arguments))
    by_products = ByProducts(*extra) if terms else None  # type: ignore[arg-type]
    return RowOutputs(soft, hard, stats, by_products)


def per_row_backward(
    rows: RowProblem,
    stats: Tensor,
    grad_soft: Tensor,
    grad_hard: Tensor,
    needs: RowNeeds,
    *,
    in_place: bool = False,
    student_dtype: torch.dtype | None = None,
) -> RowGradients:
    """Gradients of Σ grad_soft·soft + grad_hard·hard to all logits and, per row, temperatures and weights."""
    n, several = rows.n_rows, len(rows.teachers) > 1
    # A program has loaded the classes that it stores, but for the logit of a label and those that a TopK lists.
    apart = rows.topk is None and not rows.divergence.needs_labels
    like: Any = (lambda logits: (logits, logits)) if in_place and apart else gradient
    of_student = rows.student.dtype if student_dtype is None else student_dtype
    own = like if of_student == rows.student.dtype else (lambda logits: gradient(logits, of_student))
    student, d_student = own(rows.student) if needs.student else (None, None)
    teacher, d_teacher = like(rows.teacher) if needs.teachers[0] and not several else (None, None)
    need_teachers = any(needs.teachers) or needs.teacher_temperature or needs.teacher_weights
    mixed = exponents = None
    if several and need_teachers:
        mixed = allocate.empty((n, rows.classes), rows.dtype, rows.device)
        if has_exponents(rows.divergence):
            exponents = allocate.empty((n, rows.classes), rows.dtype, rows.device)
    at_one = allocate.empty((n,), rows.dtype, rows.device) if several and isinstance(rows.divergence, NKD) else None
    wanted = (needs.temperature, needs.teacher_temperature and not several)
    per_side = [allocate.empty((n,), rows.dtype, rows.device) if need else None for need in wanted]
    common = None
    if n and (needs.student or needs.temperature or need_teachers):
        widths = (rows.student.shape[-1], *(logits.shape[-1] for logits in rows.teachers if rows.topk is None))
        common = row_arguments(rows, widths)
        if of_student.itemsize == 2 and not (needs.temperature or need_teachers):
            # A 16-bit gradient does not deserve the slower exponentials.
            common = common._replace(options=common.options | {"EXACT": False})
        grad_soft, grad_hard = realigned(grad_soft), realigned(grad_hard)
        outputs = kernels("distill.backward").RowGradients(
            stats_ptr=aligned(stats),
            grad_soft_ptr=grad_soft,
            grad_hard_ptr=grad_hard,
            d_student_ptr=student,
            d_teacher_ptr=teacher if mixed is None else mixed,
            d_exponent_ptr=exponents,
            d_temperature_ptr=per_side[0],
            d_teacher_temperature_ptr=per_side[1],
            at_one_ptr=at_one,
        )
        arguments = common.numbers | {"p": common.problem, "listed": common.listed, "of": outputs}
        arguments["out"] = _nothing(kernels("distill.per_row").RowTerms)
        arguments |= {
            "how": _per_row_how(rows, common),
            "grad_soft_stride": grad_soft.stride(0),
            "grad_hard_stride": grad_hard.stride(0),
            "s_width": widths[0] // common.unit,
            "t_width": (rows.classes if several else widths[-1]) // common.unit,
        }
        if rows.topk is None:
            kernel = kernels("distill.backward").distill_rows_backward
        else:
            kernel = kernels("topk.per_row").topk_rows
        launch(kernel, -(-n // common.blocks.rows), rows.device, common.blocks.warps, taken(kernel, arguments))
    first = None if student is None or d_student is None else finish(student, d_student)
    if several:
        of_teachers = mixture_backward(rows, common, mixed, exponents, at_one, needs)
        return of_teachers._replace(student=first, temperature=per_side[0])
    second = None if teacher is None or d_teacher is None else finish(teacher, d_teacher)
    return RowGradients(first, per_side[0], per_side[1], None, [second])


def _nothing(of: Any) -> Any:
    """The argument tuple ``of`` where nothing of it is asked for."""
    return of(*(None,) * len(of._fields))


def _per_row_how(rows: RowProblem, common: RowArguments, terms: bool = False) -> Any:
    return common.how(hard=rows.labels is not None, smooth=rows.label_smoothing != 0, terms=terms)


def _count(rows: RowProblem) -> tuple[Tensor, int]:
    """Partial counts of the counted rows, and how many there are; with them those of the labels, if they differ."""
    programs = 1 if rows.n_rows <= COUNTED_AT_ONCE else min(-(-rows.n_rows // COUNT_BLOCK), MAX_COUNTS)
    keeps_ignored = rows.ignored_labels == "term"
    counts = allocate.empty((2 * programs if keeps_ignored else programs,), torch.int64, rows.device)
    arguments = {
        "labels_ptr": aligned(rows.labels),
        "mask_ptr": aligned(rows.mask),
        "counts_ptr": counts,
        "n_rows": rows.n_rows,
        "ignore_index": rows.ignore_index,
        "KEEPS_IGNORED": keeps_ignored,
        "BLOCK": COUNT_BLOCK,
    }
    launch(kernels("rows.reduce").count_rows, programs, rows.device, COUNT_WARPS, arguments)
    return counts, programs
