"""What the harness knows of a measured op, and how inputs are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mfd_fast as mfd
from mfd_fast.testing import DISTANCES

Arguments = dict[str, Any]
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Work:
    """Bytes that must cross the memory bus, and GEMMs (m, k, n) that must be done.

    ``exact``: by no library whose sums round more than those of ``torch.mm``, which the gate would not let pass.
    """

    nbytes: int
    products: tuple[tuple[int, int, int], ...] = ()
    exact: bool = False

    @property
    def flops(self) -> int:
        return sum(2 * m * k * n for m, k, n in self.products)


@dataclass(frozen=True)
class BenchOp:
    """One record per op.

    Attributes:
        sizes: names and defaults; the first is the batch, the only one that the row arguments' dimension 0 follows.
        options: names and defaults of what reaches the calls.
        inputs: ``(sizes, dtype, distance, seed) -> arguments`` on the CPU.
        rows: names of the arguments whose dimension 0 is the batch.
        leaves: names of the arguments that receive a gradient.
        call: ``(options, backend) -> f(**arguments) -> Tensor`` through the public API.
        eager: ``f(**arguments, **options) -> Tensor``.
        choice: ``(arguments, options, backend) -> Choice``: what ``call`` would run on; raises as the op would.
        work: ``(sizes, item size, training) -> Work``.
        public: the public op that it calls; "" for a module.
        mean: whether the result is a mean over rows (else one value per row, weighted by a given upstream gradient).
        lenience: how many times eager's error is allowed to mfd_fast: 1 where a kernel of ours does the arithmetic.
            Where it is library GEMMs in another order, both sides round equally often and their 16-bit maxima come
            out within some 10 % of each other, either way (60 draws).
    """

    name: str
    sizes: Mapping[str, int]
    options: Mapping[str, Any]
    inputs: Callable[[Sizes, torch.dtype, str, int], Arguments]
    rows: frozenset[str]
    leaves: frozenset[str]
    call: Callable[[Mapping[str, Any], str | None], Callable[..., Tensor]]
    eager: Callable[..., Tensor]
    choice: Callable[[Arguments, Mapping[str, Any], str | None], mfd.Choice]
    work: Callable[[Sizes, int, bool], Work]
    public: str = ""
    mean: bool = True
    lenience: float = 1.0

    @property
    def batch(self) -> str:
        return next(iter(self.sizes))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=generator(seed))).to(dtype)


def near(student: Tensor, distance: str, seed: int) -> Tensor:
    """A teacher's tensor at a :data:`~mfd_fast.testing.DISTANCES` distance from the student's."""
    noise = torch.randn(student.shape, generator=generator(seed))
    deviation = DISTANCES[distance]
    teacher = noise if deviation is None else student.float() + deviation * noise
    return teacher.to(student.dtype)
