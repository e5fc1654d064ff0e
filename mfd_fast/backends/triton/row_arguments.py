"""Arguments that the row kernels of distill_loss share: addresses, strides, numbers, tiles."""

from __future__ import annotations

from typing import Any

import torch

from ...divergences import DKD, JSD, NKD, AlphaBeta, Divergence, ForwardKL, SkewKL, SkewReverseKL
from ...rows import Rows, TopKRows
from ...types import LogitTransform
from .. import allocate
from ..layout import row_layout
from .blocks import LONG, Blocks, choose_blocks, choose_row_blocks, common_unit, power_of_two
from .launch import kernels, number

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


def constant(module: str, name: str) -> int:
    """A number that the kernels know by a name."""
    return int(getattr(kernels(module), name).value)


def kind_of(divergence: Divergence | None) -> int:
    """KIND of the kernels, None: no soft term. From REVERSE on they are pointwise, which takes more registers."""
    return constant("divergences", "NONE" if divergence is None else KINDS[divergence.name])


def parameters(divergence: Divergence) -> tuple[float, float]:
    """a and b of the kernels: of a mixture the shares of the teacher and of the student."""
    first, second = divergence.parameters
    if isinstance(divergence, (JSD, SkewKL)):
        return first, 1.0 - first
    if isinstance(divergence, SkewReverseKL):
        return 1.0 - first, first
    return first, second


def row_arguments(rows: Rows, widths: tuple[int, ...], heavy: bool = False) -> tuple[dict[str, Any], Blocks]:
    """Arguments that all row kernels share. ``widths``: row lengths of the gradients to be written."""
    student, s_inner, s_outer, s_row = row_layout(rows.student)
    (teacher, t_inner, t_outer, t_row), *more = [row_layout(logits) for logits in rows.teachers]
    # Within one level the outer stride plays no part.
    s_flat, t_flat = s_inner >= rows.n_rows, t_inner >= rows.n_rows
    s_outer, t_outer = 0 if s_flat else s_outer, 0 if t_flat else t_outer
    strides = [stride for _, _, *outer_and_row in more for stride in outer_and_row]
    sparse = rows.topk is not None
    unit = common_unit(rows.classes, s_outer, s_row, *(() if sparse else (t_outer, t_row)), *strides, *widths)
    t_unit = 1 if sparse else unit
    kind = kind_of(rows.divergence)
    aligned = unit
    every = [student, teacher, *(logits for logits, *_ in more)]
    if any(logits.data_ptr() % 16 for logits in every[: 1 if sparse else None]):
        aligned = 1
    standardized = is_standardized(rows.student_transform), is_standardized(rows.teacher_transform)
    heaviest = isinstance(rows.divergence, AlphaBeta)
    heavy |= heaviest or bool(more)
    pair = isinstance(rows.divergence, (DKD, NKD))
    heavy |= rows.classes > LONG and (pair or kind >= constant("divergences", "REVERSE") or any(standardized))
    columns = max((rows.classes, *widths))
    if sparse:
        blocks = choose_row_blocks(columns, student.element_size(), aligned, slots(rows))
    else:
        widest = max(logits.element_size() for logits in every)
        # JSD of 16-bit logits, twice as many to a vector, does not fit into the registers of 16 warps on sm_100.
        heaviest |= isinstance(rows.divergence, JSD) and widest == 2
        blocks = choose_blocks(columns, widest, aligned, heavy, heaviest)
    tl = kernels("distill_loss").tl
    temperature, temperature_ptr = number(rows.temperature, student)
    teacher_temperature, teacher_temperature_ptr = number(rows.teacher_temperature, student)
    a, b = parameters(rows.divergence)
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
        "t_outer": t_outer // t_unit,
        "t_row": t_row // t_unit,
        "UNIT": unit,
        "S_FLAT": s_flat,
        "T_FLAT": t_flat,
        "T_STEP": 0 if temperature_ptr is None or temperature_ptr.dim() == 0 else 1,
        "TT_STEP": 0 if teacher_temperature_ptr is None or teacher_temperature_ptr.dim() == 0 else 1,
        "SQUARED": rows.scale_by_temperature,
        "S_SCALED": s_scaled,
        "S_CAPPED": s_capped,
        "KIND": kind,
        "a": a,
        "b": b,
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
    if rows.topk is not None:
        arguments |= _of_topk(rows, rows.topk)
    return arguments, blocks


def slots(rows: Rows) -> int:
    """Room for the listed classes and the rest as one more: a power of two."""
    return power_of_two(rows.teacher.shape[-1] + 1)


def _of_topk(rows: Rows, topk: TopKRows) -> dict[str, Any]:
    words = -(-rows.classes // 32)
    point = topk.tail == "zero" and isinstance(rows.divergence, ForwardKL)
    return {
        "indices_ptr": topk.indices,
        "bits_ptr": allocate.empty((rows.n_rows, words), torch.int32, rows.device),
        "listed": topk.indices.shape[-1],
        "words": words,
        "TAIL": constant("topk_values", topk.tail.upper()),
        "LOGPROBS": topk.logprobs,
        "SLOTS": slots(rows),
        **({"KIND": constant("divergences", "FORWARD_POINT")} if point else {}),
    }


def is_standardized(transform: LogitTransform | None) -> bool:
    return transform is not None and transform.standardize


def _transform(transform: LogitTransform | None) -> tuple[float, float, bool, bool]:
    """scale, softcap, whether there is a scale, whether there is a cap."""
    if transform is None:
        return 1.0, 1.0, False, False
    softcap = transform.softcap
    return transform.scale, 1.0 if softcap is None else softcap, transform.scale != 1.0, softcap is not None
