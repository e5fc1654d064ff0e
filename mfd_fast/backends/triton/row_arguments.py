"""Arguments that the row kernels of distill_loss share: addresses, strides, numbers, tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...divergences import DKD, JSD, NKD, AlphaBeta, CrossEntropy, Divergence, ForwardKL, SkewKL, SkewReverseKL
from ...problems.rows import RowProblem
from ...problems.teachers import TopKRows
from ...types import LogitTransform
from .. import allocate
from ..layout import row_layout
from .blocks import (
    LONG,
    BlockSizes,
    choose_blocks,
    choose_plain_blocks,
    choose_row_blocks,
    common_unit,
    power_of_two,
)
from .launch import aligned, constants, kernels, number

# The names of the divergences in kernels/triton/distill/divergences.py.
KINDS = {
    "forward_kl": "FORWARD",
    "cross_entropy": "CROSS_ENTROPY",
    "reverse_kl": "REVERSE",
    "jsd": "JSD",
    "skew_kl": "SKEW",
    "skew_reverse_kl": "SKEW_REVERSE",
    "tvd": "TVD",
    "alpha_beta": "ALPHA_BETA",
    "dkd": "DKD",
    "nkd": "NKD",
}

# Of a teacher that need not sum to 1.
POINTS = {ForwardKL: "FORWARD_POINT", CrossEntropy: "CROSS_ENTROPY_POINT"}


def constant(module: str, name: str) -> int:
    """A number that the kernels know by a name."""
    return int(getattr(kernels(module), name).value)


def kind_of(divergence: Divergence | None) -> int:
    """DIVERGENCE of the kernels, None: no soft term. From REVERSE on they are pointwise, which takes more registers."""
    return constant("distill.divergences", "NONE" if divergence is None else KINDS[divergence.name])


def parameters(divergence: Divergence) -> tuple[float, float]:
    """a and b of the kernels: of a mixture the shares of the teacher and of the student."""
    first, second = divergence.parameters
    if isinstance(divergence, (JSD, SkewKL)):
        return first, 1.0 - first
    if isinstance(divergence, SkewReverseKL):
        return 1.0 - first, first
    return first, second


class RowArguments(NamedTuple):
    """What the row kernels share: the argument tuple of the rows (`structs.RowProblem`) and, of a sparse teacher, its
    list (`values.Listed`), run-time numbers by their names, fields of `structs.How`, the tile, and what strides and
    widths are divided by.
    """

    problem: Any
    listed: Any
    numbers: dict[str, Any]
    options: dict[str, Any]
    blocks: BlockSizes
    unit: int

    def how(self, *, soft: bool = True, hard: bool, smooth: bool, terms: bool = False) -> Any:
        """`structs.How` with or without the soft term, labels, their smoothing and by-products."""
        options = self.options if soft else self.options | {"DIVERGENCE": kind_of(None)}
        options = options | {"HARD": hard, "SMOOTH": hard and smooth, "TERMS": terms}
        return kernels("rows.structs").How(**constants(options))


def row_arguments(rows: RowProblem, widths: tuple[int, ...], heavy: bool = False, plain: bool = False) -> RowArguments:
    """``widths``: row lengths of the gradients to be written."""
    student, s_inner, s_outer, s_row = row_layout(rows.student)
    (teacher, t_inner, t_outer, t_row), *more = [row_layout(logits) for logits in rows.teachers]
    # Within one level the outer stride plays no part.
    s_flat, t_flat = s_inner >= rows.n_rows, t_inner >= rows.n_rows
    s_outer, t_outer = 0 if s_flat else s_outer, 0 if t_flat else t_outer
    strides = [stride for _, _, *outer_and_row in more for stride in outer_and_row]
    sparse = rows.topk is not None
    unit = common_unit(rows.classes, s_outer, s_row, *(() if sparse else (t_outer, t_row)), *strides, *widths)
    t_unit = 1 if sparse else unit
    every = [student, teacher, *(logits for logits, *_ in more)]
    aligned_unit = 1 if any(logits.data_ptr() % 16 for logits in every[: 1 if sparse else None]) else unit
    longest = max((rows.classes, *widths))
    if plain:
        widest = max(x.element_size() for x in every)
        heavy = not isinstance(rows.divergence, ForwardKL)
        blocks = choose_plain_blocks(longest, widest, aligned_unit, heavy)
    else:
        blocks = _blocks(rows, every, longest, aligned_unit, heavy)
    structs = kernels("rows.structs")
    temperature, temperature_ptr = number(rows.temperature, student)
    teacher_temperature, teacher_temperature_ptr = number(rows.teacher_temperature, student)
    a, b = parameters(rows.divergence)
    s_scale, s_softcap, s_flags = _transform(rows.student_transform)
    t_scale, t_softcap, t_flags = _transform(rows.teacher_transform)
    problem = structs.RowProblem(
        student=logits_argument(student, temperature_ptr, unit, s_flat, *s_flags),
        teacher=logits_argument(teacher, teacher_temperature_ptr, t_unit, t_flat, *t_flags),
        labels_ptr=aligned(rows.labels),
        mask_ptr=aligned(rows.mask),
        more_ptrs=tuple(logits for logits, *_ in more) or None,
        more_inner=tuple(inner for _, inner, _, _ in more) or None,
        more_outer=tuple(outer // unit for _, _, outer, _ in more) or None,
        more_row=tuple(row // unit for _, _, _, row in more) or None,
        weights_ptr=aligned(rows.teacher_weights),
        **constants(
            {
                "WEIGHTS_PER_ROW": rows.teacher_weights is not None and rows.teacher_weights.dim() == 2,
                "KEEPS_IGNORED": rows.ignored_labels == "term",
            }
        ),
    )
    numbers = {
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "smoothing": float(rows.label_smoothing),
        "s_scale": s_scale,
        "s_softcap": s_softcap,
        "t_scale": t_scale,
        "t_softcap": t_softcap,
        "a": a,
        "b": b,
        "n_rows": rows.n_rows,
        "ignore_index": rows.ignore_index,
        "classes": rows.classes // unit,
        "s_inner": s_inner,
        "s_outer": s_outer // unit,
        "s_row": s_row // unit,
        "t_inner": t_inner,
        "t_outer": t_outer // t_unit,
        "t_row": t_row // t_unit,
    }
    options = {
        "DIVERGENCE": kind_of(rows.divergence),
        "SQUARED": rows.scale_by_temperature,
        # 16-bit logits do not deserve the slower exponentials; float64 has its own.
        "EXACT": any(logits.dtype == torch.float32 for logits in every) or rows.dtype == torch.float64,
        "FLOAT64": rows.dtype == torch.float64,
        "CONTIGUOUS": blocks.contiguous,
        "LOOP": blocks.loop,
        "ROWS": blocks.rows,
        "LANES": blocks.lanes,
        "VEC": blocks.vec,
    }
    if rows.topk is None:
        return RowArguments(problem, None, numbers, options, blocks, unit)
    numbers |= {"n_listed": rows.teacher.shape[-1]}
    if rows.topk.tail == "zero" and type(rows.divergence) in POINTS:
        options["DIVERGENCE"] = constant("distill.divergences", POINTS[type(rows.divergence)])
    whole = {"SQUARED": False, "CONTIGUOUS": True, "LOOP": False, "ROWS": 1, "LANES": slots(rows), "VEC": 1}
    tile = RowArguments(problem, None, numbers, options | whole, blocks, unit).how(hard=False, smooth=False)
    return RowArguments(problem, _listed(rows, rows.topk, tile), numbers, options, blocks, unit)


def plain_registers(rows: RowProblem, blocks: BlockSizes, widest: int) -> int:
    """Of a thread of `plain_scalar`: so that 24 warps are resident where rows stream past (of the longest 16), 16 or 12
    where they are held, by the bytes of a logit.
    """
    if blocks.loop:
        # The skewed divergences beside smoothed labels spill into 80 on sm_100.
        most = isinstance(rows.divergence, (SkewKL, SkewReverseKL)) and rows.label_smoothing != 0
        return 80 if blocks.warps <= 8 and not most else 128
    return 128 if widest == 2 else 168


def careful(how: Any, warps: int) -> Any:
    """``how`` with a tile that needs few registers: a column per thread."""
    lanes = max(32 * warps // how.ROWS.value, 1)
    return how._replace(**constants({"CONTIGUOUS": True, "LOOP": True, "LANES": lanes, "VEC": 1}))


def logits_argument(
    ptr: Tensor,
    temperature_ptr: Tensor | None,
    unit: int,
    flat: bool,
    scaled: bool = False,
    capped: bool = False,
    standard: bool = False,
) -> Any:
    """`structs.Logits`."""
    step = 0 if temperature_ptr is None or temperature_ptr.dim() == 0 else 1
    flags = {"UNIT": unit, "FLAT": flat, "STEP": step, "SCALED": scaled, "CAPPED": capped, "STANDARD": standard}
    return kernels("rows.structs").Logits(ptr, temperature_ptr, **constants(flags))


def _blocks(rows: RowProblem, logits: list[Tensor], columns: int, unit: int, heavy: bool) -> BlockSizes:
    """The tile of a program; ``unit``: what addresses and strides of the rows share."""
    if rows.topk is not None:
        return choose_row_blocks(columns, rows.student.element_size(), unit, slots(rows))
    pointwise = kind_of(rows.divergence) >= constant("distill.divergences", "REVERSE")
    pair = isinstance(rows.divergence, (DKD, NKD))
    standardized = any(map(is_standardized, (rows.student_transform, rows.teacher_transform)))
    heaviest = isinstance(rows.divergence, AlphaBeta) or len(logits) > 2
    heavy |= heaviest
    heavy |= rows.classes > LONG and (pair or pointwise or standardized)
    widest = max(x.element_size() for x in logits)
    # JSD of 16-bit logits, twice as many to a vector, does not fit into the registers of 16 warps on sm_100.
    heaviest |= isinstance(rows.divergence, JSD) and widest == 2
    # Nor does the forward KL of float32 logits, with the exact exponentials.
    heaviest |= isinstance(rows.divergence, (ForwardKL, CrossEntropy)) and widest == 4
    return choose_blocks(columns, widest, unit, heavy, heaviest)


def slots(rows: RowProblem) -> int:
    """Room for the listed classes and the rest as one more: a power of two."""
    return power_of_two(rows.teacher.shape[-1] + 1)


def _listed(rows: RowProblem, topk: TopKRows, tile: Any) -> Any:
    flags = {"TAIL": constant("topk.values", topk.tail.upper()), "LOGPROBS": topk.logprobs, "SLOTS": slots(rows)}
    bits = allocate.empty((rows.n_rows, -(-rows.classes // 32)), torch.int32, rows.device)
    return kernels("topk.values").Listed(aligned(rows.indices), bits, **constants(flags), tile=tile)


def is_standardized(transform: LogitTransform | None) -> bool:
    return transform is not None and transform.standardize


def _transform(transform: LogitTransform | None) -> tuple[float, float, tuple[bool, bool, bool]]:
    """scale, softcap, and whether there is a scale, a cap, a standardisation."""
    if transform is None:
        return 1.0, 1.0, (False, False, False)
    softcap = transform.softcap
    flags = (transform.scale != 1.0, softcap is not None, transform.standardize)
    return transform.scale, 1.0 if softcap is None else softcap, flags
