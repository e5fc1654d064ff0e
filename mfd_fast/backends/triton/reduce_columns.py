"""The second stage of sums over rows: one launch for any number of matrices of partial sums."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import allocate
from . import interpreting
from .launch import kernels, launch

BLOCK_P = 64
BLOCK_C = 32


class ColumnSums:
    """Collects matrices ``[n_partials, length]`` and where their column sums go; ``run`` launches once for all."""

    def __init__(self, n_partials: int, device: torch.device) -> None:
        self.n_partials = n_partials
        self.device = device
        self.partials: list[Tensor] = []
        self.written: list[Tensor] = []
        self.outs: list[Tensor] = []

    def add(self, shape: tuple[int, ...], dtype: torch.dtype, partial_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(partial sums ``[n_partials, numel]`` for a kernel to fill, result of ``shape`` after :meth:`run`)."""
        length = torch.Size(shape).numel()
        partial = allocate.empty((self.n_partials, length), partial_dtype, self.device)
        out = allocate.empty(shape, dtype, self.device)
        # The interpreter's conversion to bfloat16 loses the carry into the exponent.
        rounds = interpreting() and dtype == torch.bfloat16
        self.partials.append(partial)
        self.written.append(allocate.empty(shape, torch.float32, self.device) if rounds else out)
        self.outs.append(out)
        return partial, out

    def zero(self) -> None:
        """Instead of :meth:`run` where there are no rows."""
        for tensor in (*self.written, *self.outs):
            tensor.zero_()

    def run(self) -> None:
        lengths = tuple(t.numel() for t in self.outs)
        if not lengths:
            return
        launch(
            kernels("rows.reduce_columns").reduce_columns,
            sum(-(-length // BLOCK_C) for length in lengths),
            self.device,
            4,
            {
                "partial_ptrs": tuple(self.partials),
                "out_ptrs": tuple(self.written),
                "strides": lengths,
                "lengths": lengths,
                "n_partials": self.n_partials,
                "COUNT": len(lengths),
                "BLOCK_P": BLOCK_P,
                "BLOCK_C": BLOCK_C,
            },
        )
        for written, out in zip(self.written, self.outs, strict=True):
            if written is not out:
                out.copy_(written)
