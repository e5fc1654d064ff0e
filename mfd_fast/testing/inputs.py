"""Seeded sample inputs, and the memory layouts an op must accept.

The distance between teacher and student matters as much as their size: a random pair hides the cancellation
that makes a divergence of nearly equal distributions wrong (or negative) in low precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Standard deviation of ``teacher - student``; None draws the teacher independently.
DISTANCES: dict[str, float | None] = {"far": None, "near": 0.1, "almost": 1e-3}


@dataclass(frozen=True)
class DistillInputs:
    """One sample: ``student [..., C]``, ``teacher [..., C]``, ``labels [...]`` (int64, within the classes)."""

    student: Tensor
    teacher: Tensor
    labels: Tensor


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distill_inputs(
    shape: tuple[int, ...],
    *,
    distance: str = "far",
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    spread: float = 3.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> DistillInputs:
    """Logits of a student and a teacher, and labels.

    Args:
        shape: ``[..., C]``, any sizes including 0.
        distance: a key of :data:`DISTANCES`.
        dtype: of the student.
        teacher_dtype: of the teacher; None for the student's.
        spread: standard deviation of the logits.
        seed: the same seed gives the same bits on every machine.
        device: where the sample goes (it is drawn on the CPU).

    Example:
        >>> sample = distill_inputs((2, 5), distance="near", seed=1)
        >>> sample.student.shape, sample.labels.dtype
        (torch.Size([2, 5]), torch.int64)
    """
    rng = _generator(seed)
    student = spread * torch.randn(shape, generator=rng, dtype=torch.float64)
    noise = torch.randn(shape, generator=rng, dtype=torch.float64)
    deviation = DISTANCES[distance]
    teacher = spread * noise if deviation is None else student + deviation * noise
    labels = torch.randint(max(shape[-1], 1), shape[:-1], generator=rng)
    return DistillInputs(student.to(device, dtype), teacher.to(device, teacher_dtype or dtype), labels.to(device))


def modal_inputs(
    batch: int,
    modalities: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Features (M of ``[B, D]``), query ``[D]``, bias ``[M]``, present ``[B, M]`` (about a third absent)."""
    rng = _generator(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(device, dtype)

    features = [draw(batch, width) for _ in range(modalities)]
    query, bias = draw(width), draw(modalities)
    present = (torch.rand(batch, modalities, generator=rng) > 1 / 3).to(device)
    return features, query, bias, present


def _fill(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A fresh buffer whose unused elements would show: NaN, or a far-off integer, or True."""
    if x.dtype.is_floating_point:
        return torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)
    return torch.full(shape, 1 if x.dtype == torch.bool else -(2**30), dtype=x.dtype, device=x.device)


def contiguous(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def transposed(x: Tensor) -> Tensor:
    """The last dimension has the largest stride."""
    if x.dim() < 2:
        return contiguous(x)
    return x.movedim(-1, 0).clone(memory_format=torch.contiguous_format).movedim(0, -1)


def padded(x: Tensor) -> Tensor:
    """Columns 2 .. C+2 of wider rows: a row stride larger than C, and NaN around every row."""
    if x.dim() == 0:
        return misaligned(x)
    wide = _fill(x, (*x.shape[:-1], x.shape[-1] + 5))
    view = wide[..., 2 : 2 + x.shape[-1]]
    view.copy_(x)
    return view


def shifted(x: Tensor) -> Tensor:
    """``logits[..., :-1, :]``, the next-token shift: leading dimensions that do not collapse into one."""
    if x.dim() < 2:
        return padded(x)
    longer = _fill(x, (*x.shape[:-2], x.shape[-2] + 1, x.shape[-1]))
    view = longer[..., :-1, :]
    view.copy_(x)
    return view


def every_other(x: Tensor) -> Tensor:
    """Last-dimension stride 2."""
    if x.dim() == 0:
        return misaligned(x)
    wide = _fill(x, (*x.shape[:-1], 2 * x.shape[-1]))
    view = wide[..., ::2]
    view.copy_(x)
    return view


def misaligned(x: Tensor) -> Tensor:
    """Storage offset of one element: no vector load is aligned."""
    buffer = _fill(x, (x.numel() + 2,))
    view = buffer[1 : 1 + x.numel()].view(x.shape)
    view.copy_(x)
    return view


def expanded(x: Tensor) -> Tensor:
    """The first row seen as every row: stride 0 in all leading dimensions. Changes values."""
    if x.dim() < 2 or x.numel() == 0:
        return contiguous(x)
    return x.flatten(0, -2)[0].clone().expand(x.shape)


def stride_zero(x: Tensor) -> Tensor:
    """The first element seen everywhere, as ``loss.sum().backward()`` sends grad_output. Changes values."""
    if x.numel() == 0:
        return contiguous(x)
    return x.flatten()[0].clone().expand(x.shape)


#: name -> a function that returns the tensor in that layout. ``expanded`` and ``stride_zero`` repeat values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": contiguous,
    "transposed": transposed,
    "padded": padded,
    "shifted": shifted,
    "every_other": every_other,
    "misaligned": misaligned,
    "expanded": expanded,
    "stride_zero": stride_zero,
}
