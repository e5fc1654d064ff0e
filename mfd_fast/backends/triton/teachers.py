"""Backward of several teachers on Triton; the kernel is ``kernels/triton/mixture_backward.py``."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ...rows import Rows
from .. import allocate
from .blocks import Blocks
from .launch import finish, gradient, kernels, launch

# Arguments of the row kernels that the kernel shares.
SHARED = (
    "teacher_ptr",
    "more_ptrs",
    "more_inner",
    "more_outer",
    "more_row",
    "weights_ptr",
    "labels_ptr",
    "mask_ptr",
    "teacher_temperature_ptr",
    "teacher_temperature",
    "t_scale",
    "t_softcap",
    "n_rows",
    "ignore_index",
    "classes",
    "t_inner",
    "t_outer",
    "t_row",
    "UNIT",
    "T_FLAT",
    "TT_STEP",
    "T_SCALED",
    "T_CAPPED",
    "T_STANDARD",
    "DTYPE",
    "EXACT",
    "WEIGHTS_PER_ROW",
    "CONTIGUOUS",
    "ROWS",
    "LANES",
    "VEC",
)


class TeacherGradients(NamedTuple):
    """Of the teachers' temperature [N], their weights [N, K] and their logits; None where not wanted."""

    temperature: Tensor | None
    weights: Tensor | None
    teachers: list[Tensor | None]


def mixture_backward(
    rows: Rows, common: dict[str, Any], blocks: Blocks | None, mixed: Tensor | None, needs: tuple[bool, ...]
) -> TeacherGradients:
    """``mixed`` [N, classes]: the gradient with respect to the mixture's logits T log p, None if not needed.

    ``needs``: whether the temperature, the weights and each of the teachers wants a gradient.
    """
    n, count = rows.n_rows, len(rows.teachers)
    temperature = allocate.empty((n,), rows.dtype, rows.device) if needs[0] else None
    weights = allocate.empty((n, count), rows.dtype, rows.device) if needs[1] else None
    pairs = [gradient(logits) for logits in rows.teachers] if any(needs[2:]) else []
    if mixed is not None and blocks is not None:
        widths = tuple(logits.shape[-1] for logits in rows.teachers)
        arguments = {name: common[name] for name in SHARED} | {
            "grad_ptr": mixed,
            "d_ptrs": tuple(written for written, _ in pairs) or None,
            "d_widths": tuple(width // common["UNIT"] for width in widths) if pairs else None,
            "d_weights_ptr": weights,
            "d_temperature_ptr": temperature,
            "width": max(widths) // common["UNIT"] if pairs else common["classes"],
        }
        kernel = kernels("mixture_backward").mixture_backward
        launch(kernel, -(-n // blocks.rows), rows.device, blocks.warps, arguments)
    found = [finish(written, out) if need else None for (written, out), need in zip(pairs, needs[2:], strict=False)]
    return TeacherGradients(temperature, weights, found or [None] * count)
