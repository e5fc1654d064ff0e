"""distill_loss on Triton: arguments, allocation and launches. The kernels are in ``kernels/triton/distill_loss.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...contract import check_labels_in_range
from ...divergences import ForwardKL
from ...rows import Rows
from ...types import LogitTransform
from .. import allocate
from ..layout import STATISTICS, row_layout
from . import interpreting
from .blocks import Blocks, choose_blocks, common_unit
from .launch import finish, gradient, kernels, launch, number
from .scale import scale_gradient_

__all__ = ["can_run", "per_row", "per_row_backward", "scalar", "scale_gradient_"]

COUNT_BLOCK = 1024
MAX_COUNTS = 128
REDUCE_BLOCK = 1024
MAX_COLUMNS = 2**31 - 2**16  # column numbers of a tile are int32


def can_run(rows: Rows) -> str | None:
    """None if the kernels cover this call, else the reason."""
    if not isinstance(rows.divergence, ForwardKL):
        return f"no kernel for {rows.divergence} yet"
    if rows.topk is not None:
        return "no kernel for a TopK teacher yet"
    if len(rows.teachers) > 1:
        return "no kernel for several teachers yet"
    for transform in (rows.student_transform, rows.teacher_transform):
        if transform is not None and transform.standardize:
            return "no kernel for LogitTransform(standardize=True) yet"
    if max(rows.student.shape[-1], rows.teacher.shape[-1]) > MAX_COLUMNS:
        return f"at most {MAX_COLUMNS} columns"
    if interpreting():
        return None if rows.device.type == "cpu" else "TRITON_INTERPRET=1 runs kernels on CPU tensors only"
    return None if rows.device.type == "cuda" else f"the tensors are on {rows.device}, not on a GPU"


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
    """The scalar loss and, if asked, its gradient with respect to the student, in one pass over the rows."""
    check_labels_in_range(rows.op, rows)
    soft = isinstance(soft_weight, Tensor) or soft_weight != 0
    hard = rows.labels is not None and (isinstance(hard_weight, Tensor) or hard_weight != 0)
    loss = allocate.empty((), rows.dtype, rows.device)
    written, grad = gradient(rows.student) if needs_grad else (None, None)
    if rows.n_rows == 0 or not (soft or hard):
        return loss.zero_(), None if grad is None else grad.zero_()

    counts, n_counts = None, 0
    if mean and normalizer is None:
        normalizer = float(rows.n_rows)
        if rows.labels is not None or rows.mask is not None:
            counts, n_counts = _count(rows)
    elif not mean:
        normalizer = 1.0
    common, blocks = _common(rows, (rows.student.shape[-1],))
    programs = -(-rows.n_rows // blocks.rows)
    partial = allocate.empty((programs,), torch.float64, rows.device)
    divisor, divisor_ptr = number(normalizer, rows.student)
    arguments = scalar_arguments(rows, common, blocks, weight, soft_weight, hard_weight, soft, hard)
    by = {
        "normalizer_ptr": divisor_ptr,
        "counts_ptr": counts,
        "normalizer": divisor,
        "n_counts": n_counts,
        "COUNTS": MAX_COUNTS,
    }
    arguments |= by | {"grad_ptr": written, "partial_ptr": partial}
    launch(kernels("distill_loss").distill_scalar, programs, rows.device, blocks.warps, arguments)
    launch(
        kernels("reduce").reduce_loss,
        1,
        rows.device,
        4,
        by
        | {
            "partial_ptr": partial,
            "loss_ptr": loss,
            "n_partials": programs,
            "DTYPE": common["DTYPE"],
            "BLOCK": REDUCE_BLOCK,
        },
    )
    return loss, None if grad is None or written is None else finish(written, grad)


def scalar_arguments(
    rows: Rows,
    common: dict[str, Any],
    blocks: Blocks,
    weight: Tensor | None,
    soft_weight: float | Tensor,
    hard_weight: float | Tensor,
    soft: bool,
    hard: bool,
) -> dict[str, Any]:
    """Arguments of ``distill_scalar`` but for its outputs and its divisor."""
    soft_number, soft_ptr = number(soft_weight, rows.student)
    hard_number, hard_ptr = number(hard_weight, rows.student)
    return common | {
        "weight_ptr": weight,
        "soft_weight_ptr": soft_ptr,
        "hard_weight_ptr": hard_ptr,
        "soft_weight": soft_number,
        "hard_weight": hard_number,
        "width": rows.student.shape[-1] // common["UNIT"],
        "SOFT": soft,
        "HARD": hard,
        "SMOOTH": hard and rows.label_smoothing != 0,
        "LOOP": blocks.loop,
    }


def per_row(rows: Rows, *, terms: bool) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...] | None]:
    """soft [N], hard [N], stats [N, STATISTICS] and, if asked, the by-products."""
    check_labels_in_range(rows.op, rows)
    n, dtype, device = rows.n_rows, rows.dtype, rows.device
    soft, hard = allocate.empty((n,), dtype, device), allocate.empty((n,), dtype, device)
    stats = allocate.empty((n, STATISTICS), dtype, device)
    extra: list[Tensor | None] = [None] * 5
    if terms:
        of_labels = 4 if rows.labels is not None else 2
        extra[:of_labels] = [allocate.empty((n,), dtype, device) for _ in range(of_labels)]
        extra[4] = allocate.empty((n,), torch.bool, device)
    if n:
        common, blocks = _common(rows, (), many_sums=terms)
        arguments = common | {
            "soft_ptr": soft,
            "hard_ptr": hard,
            "stats_ptr": stats,
            "student_entropy_ptr": extra[0],
            "teacher_entropy_ptr": extra[1],
            "student_prob_ptr": extra[2],
            "teacher_prob_ptr": extra[3],
            "agreement_ptr": extra[4],
            "HARD": rows.labels is not None,
            "SMOOTH": rows.labels is not None and rows.label_smoothing != 0,
            "TERMS": terms,
            "LOOP": blocks.loop,
        }
        kernel = kernels("distill_rows").distill_rows
        launch(kernel, -(-n // blocks.rows), device, blocks.warps, arguments)
    return soft, hard, stats, tuple(extra) if terms else None


def per_row_backward(
    rows: Rows, stats: Tensor, grad_soft: Tensor, grad_hard: Tensor, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of Σ grad_soft·soft + grad_hard·hard to student, teacher and, per row, both temperatures."""
    n = rows.n_rows
    student, d_student = gradient(rows.student) if needs[0] else (None, None)
    teacher, d_teacher = gradient(rows.teacher) if needs[1] else (None, None)
    per_side = [allocate.empty((n,), rows.dtype, rows.device) if need else None for need in needs[2:]]
    if n and any(needs):
        widths = (rows.student.shape[-1], rows.teacher.shape[-1])
        common, blocks = _common(rows, widths)
        arguments = common | {
            "d_student_ptr": student,
            "d_teacher_ptr": teacher,
            "d_temperature_ptr": per_side[0],
            "d_teacher_temperature_ptr": per_side[1],
            "stats_ptr": stats.contiguous(),
            "grad_soft_ptr": grad_soft,
            "grad_hard_ptr": grad_hard,
            "grad_soft_stride": grad_soft.stride(0),
            "grad_hard_stride": grad_hard.stride(0),
            "s_width": widths[0] // common["UNIT"],
            "t_width": widths[1] // common["UNIT"],
            "HARD": rows.labels is not None,
            "SMOOTH": rows.labels is not None and rows.label_smoothing != 0,
            "LOOP": blocks.loop,
        }
        kernel = kernels("distill_loss_backward").distill_rows_backward
        launch(kernel, -(-n // blocks.rows), rows.device, blocks.warps, arguments)
    return (
        None if student is None or d_student is None else finish(student, d_student),
        None if teacher is None or d_teacher is None else finish(teacher, d_teacher),
        per_side[0],
        per_side[1],
    )


def _count(rows: Rows) -> tuple[Tensor, int]:
    """Partial counts of the counted rows, and how many there are."""
    programs = min(-(-rows.n_rows // COUNT_BLOCK), MAX_COUNTS)
    counts = allocate.empty((programs,), torch.int64, rows.device)
    arguments = {
        "labels_ptr": rows.labels,
        "mask_ptr": rows.mask,
        "counts_ptr": counts,
        "n_rows": rows.n_rows,
        "ignore_index": rows.ignore_index,
        "BLOCK": COUNT_BLOCK,
    }
    launch(kernels("reduce").count_rows, programs, rows.device, 4, arguments)
    return counts, programs


def _common(rows: Rows, widths: tuple[int, ...], many_sums: bool = False) -> tuple[dict[str, Any], Blocks]:
    """Arguments that all row kernels share. ``widths``: row lengths of the gradients to be written."""
    student, s_inner, s_outer, s_row = row_layout(rows.student)
    teacher, t_inner, t_outer, t_row = row_layout(rows.teacher)
    # Within one level the outer stride plays no part.
    s_flat, t_flat = s_inner >= rows.n_rows, t_inner >= rows.n_rows
    s_outer, t_outer = 0 if s_flat else s_outer, 0 if t_flat else t_outer
    unit = common_unit(rows.classes, s_outer, s_row, t_outer, t_row, *widths)
    aligned = unit
    if student.data_ptr() % 16 or teacher.data_ptr() % 16:
        aligned = 1
    blocks = choose_blocks(
        max((rows.classes, *widths)), max(student.element_size(), teacher.element_size()), aligned, many_sums
    )
    tl = kernels("distill_loss").tl
    temperature, temperature_ptr = number(rows.temperature, student)
    teacher_temperature, teacher_temperature_ptr = number(rows.teacher_temperature, student)
    s_scale, s_softcap, s_scaled, s_capped = _transform(rows.student_transform)
    t_scale, t_softcap, t_scaled, t_capped = _transform(rows.teacher_transform)
    arguments = {
        "student_ptr": student,
        "teacher_ptr": teacher,
        "labels_ptr": rows.labels,
        "mask_ptr": rows.mask,
        "temperature_ptr": temperature_ptr,
        "teacher_temperature_ptr": teacher_temperature_ptr,
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "smoothing": float(rows.label_smoothing),
        "s_scale": s_scale,
        "s_softcap": s_softcap,
        "t_scale": t_scale,
        "t_softcap": t_softcap,
        "n_rows": rows.n_rows,
        "ignore_index": rows.ignore_index,
        "classes": rows.classes // unit,
        "s_inner": s_inner,
        "s_outer": s_outer // unit,
        "s_row": s_row // unit,
        "t_inner": t_inner,
        "t_outer": t_outer // unit,
        "t_row": t_row // unit,
        "UNIT": unit,
        "S_FLAT": s_flat,
        "T_FLAT": t_flat,
        "T_STEP": 0 if temperature_ptr is None or temperature_ptr.dim() == 0 else 1,
        "TT_STEP": 0 if teacher_temperature_ptr is None or teacher_temperature_ptr.dim() == 0 else 1,
        "SQUARED": rows.scale_by_temperature,
        "S_SCALED": s_scaled,
        "S_CAPPED": s_capped,
        "T_SCALED": t_scaled,
        "T_CAPPED": t_capped,
        "DTYPE": tl.float64 if rows.dtype == torch.float64 else tl.float32,
        # 16-bit logits do not deserve the slower exponentials; float64 has its own.
        "EXACT": torch.float32 in (student.dtype, teacher.dtype) or rows.dtype == torch.float64,
        "CONTIGUOUS": blocks.contiguous,
        "ROWS": blocks.rows,
        "LANES": blocks.lanes,
        "VEC": blocks.vec,
    }
    return arguments, blocks


def _transform(transform: LogitTransform | None) -> tuple[float, float, bool, bool]:
    """scale, softcap, whether there is a scale, whether there is a cap."""
    if transform is None:
        return 1.0, 1.0, False, False
    softcap = transform.softcap
    return transform.scale, 1.0 if softcap is None else softcap, transform.scale != 1.0, softcap is not None
