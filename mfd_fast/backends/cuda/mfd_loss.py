"""mfd_loss on the CUDA C++ kernels: one launch for the loss and all row gradients.

The head weight's gradient is one library GEMM. Calls whose logits do not fit into a block's shared memory, and the
others that the kernel does not cover, run as a chain of the other ops (:func:`has_one_pass`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...contract import check_labels_in_range
from ...reference.feature_loss import KINDS
from ...rows import is_used
from .. import allocate
from ..cpu.distill_loss import DTYPES
from ..cpu.modal_pool import feature_gradients
from ..cpu.rows import NO_ROWS, address, dense, rows_argument
from . import distill_loss, native
from . import modal_pool as pooling
from .launch import number, where, workspace

__all__ = ["can_run", "has_one_pass", "scalar"]

#: Each block counts the rows for itself; beyond these the library's GEMMs have the better tiles.
MAX_ROWS = 8192


def can_run(problem: Any) -> str | None:
    """None if the kernels cover this call, else the reason."""
    return pooling.can_run(problem.pool) or distill_loss.can_run(problem.rows)


def has_one_pass(p: Any) -> bool:
    """Whether the single launch covers this call: a matter of shapes, dtypes, options and device, never of values."""
    rows = p.rows
    return (
        rows.dtype == torch.float32
        and (is_used(p.soft_weight) or is_used(p.hard_weight))
        and rows.n_rows <= MAX_ROWS
        and bool(native().cuda.mfd_fits(p.pool.width, rows.classes, where(p.device)[0]))
    )


def _operand_dtype(p: Any) -> torch.dtype:
    """Dtype of the matrix products' operands: bfloat16 on tensor cores where features and head have it."""
    narrow = all(x.dtype == torch.bfloat16 for x in (p.head_weight, *p.pool.features))
    return torch.bfloat16 if narrow else torch.float32


def _aligned(head: Tensor) -> Tensor:
    """``head`` as the kernel reads it: rows that begin on 16 bytes, of a multiple of 8 columns; a copy where needed."""
    missing = -head.shape[1] % 8
    sixteen = head.data_ptr() % 16 == 0 and head.stride(0) * head.itemsize % 16 == 0
    if missing == 0 and sixteen and head.stride(1) == 1:
        return head
    return torch.constant_pad_nd(head, (0, missing)).contiguous()


def scalar(p: Any, needs: Sequence[bool]) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """The fields of MFDOutput, and the gradients of query, bias, head weight, head bias and each of the features."""
    rows, pool, device, dtype = p.rows, p.pool, p.device, p.rows.dtype
    check_labels_in_range(rows.op, rows)
    module, n, classes, width = native(), rows.n_rows, rows.classes, pool.width
    need_query, need_bias, need_head_weight, need_head_bias, *need_features = needs
    d_features, addresses, row_stride = feature_gradients(
        pool.features, need_features, pool.stacked, pool.modalities, width
    )

    def gradient(need: bool, like: Tensor | None) -> Tensor | None:
        return allocate.empty(tuple(like.shape), like.dtype, device) if need and like is not None else None

    sums = [gradient(need_query, pool.query), gradient(need_bias, pool.bias), gradient(need_head_bias, p.head_bias)]
    terms = [allocate.empty((), dtype, device) for _ in range(4)]
    weights = allocate.empty((*p.leading, pool.modalities), dtype, device)
    predictions = allocate.empty(tuple(p.leading), torch.int64, device)
    d_head_weight = None
    if n == 0:
        for out in (*terms, *sums, *d_features):
            if out is not None:
                out.zero_()
        d_head_weight = torch.zeros_like(p.head_weight) if need_head_weight else None
    else:
        keep: list[Tensor] = []
        operand = _operand_dtype(p)
        head = _aligned(p.head_weight.to(operand))
        head_bias = None if p.head_bias is None else p.head_bias.contiguous()
        dz_stride = -(-classes // 8) * 8
        y = allocate.empty((n, width), operand, device) if need_head_weight else None
        dz = allocate.empty((n, dz_stride), operand, device) if need_head_weight else None
        blocks = -(-n // module.cuda.mfd_rows)
        length = module.cuda.mfd_terms + sum(t.numel() for t in sums if t is not None)
        partial = allocate.empty((blocks, length), torch.float64, device)
        tickets = workspace(device, 4 * (1 + -(-blocks // module.cuda.mfd_group)), "tickets")
        count = p.reduction == "mean" and p.normalizer is None
        divisor = 1.0 if p.reduction == "sum" else float(n) if count else p.normalizer
        parts = (p.soft_weight, p.hard_weight, p.feature_weight, p.pool_weight, divisor)
        module.cuda.mfd_loss(
            distill_loss._problem(module, rows, keep),
            *pooling.native_pool(module, pool, keep),
            is_used(p.soft_weight),
            rows.labels is not None and is_used(p.hard_weight),
            address(p.weight),
            [number(value, dtype, device, keep) for value in parts],
            count and not (rows.labels is None and rows.mask is None),
            rows_argument(p.teacher_features, keep) if is_used(p.feature_weight) else NO_ROWS,
            KINDS.index(p.feature_kind),
            dense(p.teacher_pool_weights, dtype, keep) if is_used(p.pool_weight) else 0,
            (head.data_ptr(), DTYPES[operand]),
            head.stride(0),
            (0, 0) if head_bias is None else (head_bias.data_ptr(), DTYPES[head_bias.dtype]),
            [t.data_ptr() for t in (weights, predictions, *terms)],
            any(needs),
            need_query or need_bias or any(need_features),
            (address(y), address(dz), dz_stride),
            addresses,
            row_stride,
            [address(t) for t in sums],
            partial.data_ptr(),
            tickets.data_ptr(),
            *where(device),
        )
        if dz is not None and y is not None:
            with torch.autocast(device.type, enabled=False):
                d_head_weight = (dz[:, :classes].t() @ y).to(p.head_weight.dtype)
    d_query, d_bias, d_head_bias = sums
    return (*terms, weights, predictions), [d_query, d_bias, d_head_weight, d_head_bias, *d_features]
