"""feature_loss on Triton: every tap in one launch. The kernels are in ``kernels/triton/features``."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...codes import FEATURE_KINDS
from ...problems.features import FeatureProblem, Tap
from .. import allocate
from ..layout import RowLayout, row_layout
from ..plans import Places, each
from ..protocol import FeatureGradients, FeatureNeeds
from . import program, why_not_device
from .launch import aligned, finish, gradient, kernels, launch, number
from .reduce_columns import ColumnSums
from .scale import like_gradient, scale_gradients_

MAX_TAPS = 32  # the kernel is unrolled over them
MAX_WIDTH = 2**31 - 2**16  # column numbers are int32
MAX_HELD = 4096  # elements of a row that a program of 4 warps holds, twice
TILE = 2048  # elements of the tiles of others
COUNT_ROWS = 1 << 15  # masked rows that every program counts for itself
WARPS = 4


def can_run(problem: FeatureProblem) -> str | None:
    """None if the kernels cover this call, else the reason."""
    if len(problem.taps) > MAX_TAPS:
        return f"the kernel is unrolled over at most {MAX_TAPS} taps, not {len(problem.taps)}"
    if any(tap.teacher.shape[-1] > MAX_WIDTH for tap in problem.taps):
        return f"at most {MAX_WIDTH} columns"
    return why_not_device(problem.device)


def _tile(width: int, double: bool) -> tuple[bool, int, int]:
    """(whether a row takes several tiles, rows, columns of a tile)."""
    size = 1 << (width - 1).bit_length()
    most, tile = (MAX_HELD // 2, TILE // 2) if double else (MAX_HELD, TILE)
    return (True, 1, tile) if size > most else (False, max(1, min(16, tile // size)), size)


def _programs(problem: FeatureProblem, tiles: Sequence[tuple[bool, int, int]]) -> int:
    return sum(-(-tap.student.shape[:-1].numel() // tile[1]) for tap, tile in zip(problem.taps, tiles, strict=True))


def _tiles(problem: FeatureProblem) -> tuple[tuple[bool, int, int], ...]:
    return tuple(_tile(tap.student.shape[-1], problem.dtype == torch.float64) for tap in problem.taps)


def _run(
    problem: FeatureProblem, tiles: tuple[tuple[bool, int, int], ...], partial: Tensor | None, **per_tap: Any
) -> None:
    """``per_tap``: tuples of the kernel's optional arguments; those that are missing are None."""
    taps = problem.taps
    module = kernels("features.taps")
    tl = module.tl
    fields: dict[str, Any] = dict.fromkeys(module.Taps._fields, (None,) * len(taps))
    fields |= dict.fromkeys(("weights", "weights_low"), (0.0,) * len(taps))
    for side in ("student", "teacher"):
        fields |= _addresses(side, [getattr(tap, side) for tap in taps])
    fields["mask_ptrs"] = tuple(aligned(tap.mask) for tap in taps)
    arguments = {
        "taps": module.Taps(**(fields | per_tap)),
        "partial_ptr": partial,
        # Numbers in tuples compile anew where they are 1 or divisible by 16: 2n + 3 never is.
        "coded_rows": tuple(2 * tap.student.shape[:-1].numel() + 3 for tap in taps),
        "widths": tuple(tap.student.shape[-1] for tap in taps),
        "TILES": tiles,
        "FEATURE_KIND": FEATURE_KINDS[problem.feature_kind],
        "MEAN": problem.reduction == "mean",
        "DTYPE": tl.float64 if problem.dtype == torch.float64 else tl.float32,
    }
    programs = _programs(problem, tiles)
    if programs:
        launch(module.match_taps, programs, problem.device, WARPS, arguments)


def _addresses(side: str, tensors: Sequence[Tensor]) -> dict[str, Any]:
    layouts = [row_layout(x) for x in tensors]

    def level(layout: RowLayout, value: int) -> int | None:
        rows = layout.tensor.shape[:-1].numel()
        return None if layout.inner >= rows else value

    return {
        f"{side}_ptrs": tuple(layout.tensor for layout in layouts),
        f"{side}_inners": tuple(level(layout, layout.inner) for layout in layouts),
        f"{side}_outers": tuple(level(layout, layout.outer_stride) for layout in layouts),
        f"{side}_strides": tuple(layout.row_stride for layout in layouts),
    }


def _split(value: float) -> tuple[float, float]:
    """value as the sum of two float32."""
    (high,) = struct.unpack("f", struct.pack("f", value))
    return high, value - high


def scalar(problem: FeatureProblem, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
    """The scalar loss and, from the same pass, its gradient with respect to each student that needs one."""
    taps = problem.taps
    gradients = [gradient(tap.student) if need else None for tap, need in zip(taps, needs, strict=True)]
    tiles = _tiles(problem)
    sums = ColumnSums(_programs(problem, tiles), problem.device)
    partial, loss = sums.add((), problem.dtype, torch.float64)
    numbers = [number(tap.weight, tap.student) for tap in taps]
    parts = [_split(value) for value, _ in numbers]
    _run(
        problem,
        tiles,
        partial,
        weights=tuple(high for high, _ in parts),
        weights_low=tuple(low for _, low in parts),
        weight_ptrs=tuple(pointer for _, pointer in numbers),
        count_ptrs=tuple(_count(tap) for tap in taps),
        d_student_ptrs=tuple(None if pair is None else pair[0] for pair in gradients),
    )
    sums.run()
    return loss, [None if pair is None else finish(*pair) for pair in gradients]


def call_plan(problem: FeatureProblem, places: Places) -> Any:
    """The native plan of :func:`scalar` for calls like this one, or None."""
    if not program.can_plan(places) or any(place != -1 for place in each(places.tensors["projector"], 1)):
        return None
    needs = [student.requires_grad and torch.is_grad_enabled() for student in problem.students]

    def forward(again: FeatureProblem) -> Any:
        return lambda: scalar(again, needs)

    gradients = [like_gradient(student) for student, need in zip(problem.students, needs, strict=True) if need]
    return program.plan(places, problem.dtype, forward, scale=scale_gradients_, gradients=gradients)


def _count(tap: Tap) -> Tensor | None:
    """How many rows exist, where counting them in every program would cost too much."""
    return None if tap.mask is None or tap.mask.numel() <= COUNT_ROWS else tap.mask.sum()


def distances(problem: FeatureProblem) -> list[Tensor]:
    """``[...]`` distances of each tap, 0 on masked rows."""
    found = [allocate.empty(tuple(tap.student.shape[:-1]), problem.dtype, problem.device) for tap in problem.taps]
    _run(problem, _tiles(problem), None, distance_ptrs=tuple(found))
    return found


def distances_backward(
    problem: FeatureProblem, grad_distances: Sequence[Tensor], needs: FeatureNeeds
) -> FeatureGradients:
    """Gradients of ``Σ_k sum(grad_k·distances_k)``."""
    count = len(problem.students)
    sides, wanted = (*problem.students, *problem.teachers), (*needs.students, *needs.teachers)
    found = [gradient(x) if need else None for x, need in zip(sides, wanted, strict=True)]
    written = tuple(None if pair is None else pair[0] for pair in found)
    _run(
        problem,
        _tiles(problem),
        None,
        up_ptrs=tuple(aligned(grad.reshape(-1)) for grad in grad_distances),
        d_student_ptrs=written[:count],
        d_teacher_ptrs=written[count:],
    )
    finished = [None if pair is None else finish(*pair) for pair in found]
    return FeatureGradients(finished[:count], finished[count:])
