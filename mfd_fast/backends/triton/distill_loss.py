"""distill_loss on Triton: arguments, allocation and launches. The kernels are in ``kernels/triton/distill_loss.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...contract import check_labels_in_range
from ...divergences import JSD, AlphaBeta, Divergence, SkewKL, SkewReverseKL
from ...rows import Rows
from ...types import LogitTransform
from .. import allocate
from ..layout import STATISTICS, row_layout
from . import interpreting
from .blocks import LONG, Blocks, choose_blocks, common_unit
from .launch import finish, gradient, kernels, launch, number
from .scale import scale_gradient_
from .teachers import mixture_backward

__all__ = ["can_run", "per_row", "per_row_backward", "scalar", "scale_gradient_"]

COUNT_BLOCK = 1024
MAX_COUNTS = 128
REDUCE_BLOCK = 1024
# The names of the divergences in kernels/triton/divergences.py.
KINDS = {
    "forward_kl": "FORWARD",
    "reverse_kl": "REVERSE",
    "jsd": "JSD",
    "skew_kl": "SKEW",
    "skew_reverse_kl": "SKEW_REVERSE",
    "tvd": "TVD",
    "alpha_beta": "ALPHA_BETA",
    "dkd": "DKD",
    "nkd": "NKD",
}
MAX_TEACHERS = 8  # the kernels are unrolled over them
MAX_COLUMNS = 2**31 - 2**16  # column numbers of a tile are int32


def can_run(rows: Rows) -> str | None:
    """None if the kernels cover this call, else the reason."""
    if rows.divergence.name not in KINDS:
        return f"no kernel for {rows.divergence}"
    if rows.topk is not None:
        return "no kernel for a TopK teacher yet"
    if rows.divergence.near_a_limit:
        return f"{rows.divergence} is so close to a limit that the kernel would lose its digits"
    if len(rows.teachers) > 1:
        if len(rows.teachers) > MAX_TEACHERS:
            return f"at most {MAX_TEACHERS} teachers"
        if rows.divergence.name == "nkd":
            return "no kernel for NKD of several teachers"
        if _standardized(rows.teacher_transform):
            return "no kernel for several standardized teachers"
    if max(logits.shape[-1] for logits in (rows.student, *rows.teachers)) > MAX_COLUMNS:
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
        "KIND": common["KIND"] if soft else _kind("NONE"),
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
        common, blocks = _common(rows, (), heavy=terms)
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
    rows: Rows, stats: Tensor, grad_soft: Tensor, grad_hard: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of Σ grad_soft·soft + grad_hard·hard to student, teacher and, per row, both temperatures.

    With several teachers also to the weights [N, K] and to each further teacher.
    """
    n, several = rows.n_rows, len(rows.teachers) > 1
    of_teachers = (needs[1], *needs[5:])
    student, d_student = gradient(rows.student) if needs[0] else (None, None)
    teacher, d_teacher = gradient(rows.teacher) if needs[1] and not several else (None, None)
    mixed = None
    if several and (any(of_teachers) or any(needs[3:5])):
        mixed = allocate.empty((n, rows.classes), rows.dtype, rows.device)
    per_side = [allocate.empty((n,), rows.dtype, rows.device) if need else None for need in needs[2:4]]
    common: dict[str, Any] = {}
    blocks = None
    if n and any(needs):
        widths = (rows.student.shape[-1], *(logits.shape[-1] for logits in rows.teachers))
        common, blocks = _common(rows, widths)
        arguments = common | {
            "d_student_ptr": student,
            "d_teacher_ptr": teacher if mixed is None else mixed,
            "d_temperature_ptr": per_side[0],
            "d_teacher_temperature_ptr": None if several else per_side[1],
            "stats_ptr": stats.contiguous(),
            "grad_soft_ptr": grad_soft,
            "grad_hard_ptr": grad_hard,
            "grad_soft_stride": grad_soft.stride(0),
            "grad_hard_stride": grad_hard.stride(0),
            "s_width": widths[0] // common["UNIT"],
            "t_width": (rows.classes if several else widths[1]) // common["UNIT"],
            "HARD": rows.labels is not None,
            "SMOOTH": rows.labels is not None and rows.label_smoothing != 0,
            "LOOP": blocks.loop,
        }
        kernel = kernels("distill_loss_backward").distill_rows_backward
        launch(kernel, -(-n // blocks.rows), rows.device, blocks.warps, arguments)
    first = None if student is None or d_student is None else finish(student, d_student)
    if several:
        found = mixture_backward(rows, common, blocks, mixed, (*needs[3:5], *of_teachers))
        return first, found.teachers[0], per_side[0], found.temperature, found.weights, *found.teachers[1:]
    return (
        first,
        None if teacher is None or d_teacher is None else finish(teacher, d_teacher),
        *per_side,
    )


def _kind(name: str) -> int:
    """KIND of the kernels; from REVERSE on the divergences are pointwise, which takes more registers."""
    return int(getattr(kernels("divergences"), name).value)


def _parameters(divergence: Divergence) -> tuple[float, float]:
    """a and b of the kernels: of a mixture the shares of the teacher and of the student."""
    first, second = divergence.parameters
    if isinstance(divergence, (JSD, SkewKL)):
        return first, 1.0 - first
    if isinstance(divergence, SkewReverseKL):
        return 1.0 - first, first
    return first, second


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


def _common(rows: Rows, widths: tuple[int, ...], heavy: bool = False) -> tuple[dict[str, Any], Blocks]:
    """Arguments that all row kernels share. ``widths``: row lengths of the gradients to be written."""
    student, s_inner, s_outer, s_row = row_layout(rows.student)
    (teacher, t_inner, t_outer, t_row), *more = [row_layout(logits) for logits in rows.teachers]
    # Within one level the outer stride plays no part.
    s_flat, t_flat = s_inner >= rows.n_rows, t_inner >= rows.n_rows
    s_outer, t_outer = 0 if s_flat else s_outer, 0 if t_flat else t_outer
    strides = [stride for _, _, *outer_and_row in more for stride in outer_and_row]
    unit = common_unit(rows.classes, s_outer, s_row, t_outer, t_row, *strides, *widths)
    kind = _kind(KINDS[rows.divergence.name])
    aligned = unit
    every = [student, teacher, *(logits for logits, *_ in more)]
    if any(logits.data_ptr() % 16 for logits in every):
        aligned = 1
    standardized = _standardized(rows.student_transform), _standardized(rows.teacher_transform)
    heavy |= isinstance(rows.divergence, AlphaBeta) or bool(more)
    heavy |= rows.classes > LONG and (kind >= _kind("REVERSE") or any(standardized))
    widest = max(logits.element_size() for logits in every)
    blocks = choose_blocks(max((rows.classes, *widths)), widest, aligned, heavy)
    tl = kernels("distill_loss").tl
    temperature, temperature_ptr = number(rows.temperature, student)
    teacher_temperature, teacher_temperature_ptr = number(rows.teacher_temperature, student)
    parameters = _parameters(rows.divergence)
    s_scale, s_softcap, s_scaled, s_capped = _transform(rows.student_transform)
    t_scale, t_softcap, t_scaled, t_capped = _transform(rows.teacher_transform)
    arguments = {
        "student_ptr": student,
        "teacher_ptr": teacher,
        "more_ptrs": tuple(logits for logits, *_ in more) or None,
        "more_inner": tuple(inner for _, inner, _, _ in more) or None,
        "more_outer": tuple(outer // unit for _, _, outer, _ in more) or None,
        "more_row": tuple(row // unit for _, _, _, row in more) or None,
        "weights_ptr": rows.teacher_weights,
        "WEIGHTS_PER_ROW": rows.teacher_weights is not None and rows.teacher_weights.dim() == 2,
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
        "KIND": kind,
        "a": parameters[0],
        "b": parameters[1],
        "S_STANDARD": standardized[0],
        "T_STANDARD": standardized[1],
        "T_SCALED": t_scaled,
        "T_CAPPED": t_capped,
        "DTYPE": tl.float64 if rows.dtype == torch.float64 else tl.float32,
        # 16-bit logits do not deserve the slower exponentials; float64 has its own.
        "EXACT": any(logits.dtype == torch.float32 for logits in every) or rows.dtype == torch.float64,
        "CONTIGUOUS": blocks.contiguous,
        "ROWS": blocks.rows,
        "LANES": blocks.lanes,
        "VEC": blocks.vec,
    }
    return arguments, blocks


def _standardized(transform: LogitTransform | None) -> bool:
    return transform is not None and transform.standardize


def _transform(transform: LogitTransform | None) -> tuple[float, float, bool, bool]:
    """scale, softcap, whether there is a scale, whether there is a cap."""
    if transform is None:
        return 1.0, 1.0, False, False
    softcap = transform.softcap
    return transform.scale, 1.0 if softcap is None else softcap, transform.scale != 1.0, softcap is not None
