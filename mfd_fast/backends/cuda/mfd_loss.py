"""mfd_loss on the CUDA C++ kernels: one launch for the loss and all row gradients.

The head weight's gradient is one library GEMM. Calls whose logits do not fit into a block's shared memory, and the
others that the kernel does not cover, run as a chain of the other ops (:func:`has_one_pass`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...codes import DTYPES, FEATURE_KINDS
from ...problems.checks import is_used, temperature_range
from ...problems.mfd import MFDProblem
from ...problems.rows import Scalar, check_labels_in_range
from ...types import MFDOutput
from .. import allocate
from ..native import NO_ROWS, address, dense, feature_gradients, reads_mfd, row_matrix
from ..plans import Places
from ..products import head_gradient
from ..protocol import MFDGradients, MFDNeeds
from . import distill_loss, native
from . import modal_pool as pooling
from .launch import number, where, workspace

__all__ = ["call_plan", "can_run", "has_one_pass", "scalar"]

#: Each block counts the rows for itself; beyond these the library's GEMMs have the better tiles.
MAX_ROWS = 8192


def can_run(problem: MFDProblem) -> str | None:
    """None if the kernels cover this call, else the reason."""
    return pooling.can_run(problem.pool) or distill_loss.can_run(problem.rows)


def has_one_pass(p: MFDProblem) -> bool:
    """Whether the single launch covers this call: a matter of shapes, dtypes, options and device, never of values."""
    rows = p.rows
    return (
        rows.dtype == torch.float32
        and p.loss.hard_normalizer is None
        and (p.loss.use_soft or p.loss.use_hard)
        and rows.n_rows <= MAX_ROWS
        and bool(native().cuda.mfd_fits(p.pool.width, rows.classes, where(p.device)[0]))
    )


def _operand_dtype(p: MFDProblem) -> torch.dtype:
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


def call_plan(p: MFDProblem, places: Places) -> Any:
    """The native plan of :func:`scalar` for calls like this one; None where :func:`reads_mfd` says so, and where the
    kernel reads a copy of the head.
    """
    rows, loss, pool, module, operand = p.rows, p.loss, p.pool, native(), _operand_dtype(p)
    if not hasattr(module.cuda, "MFDPlan") or not rows.n_rows or not reads_mfd(p, places, False):
        return None
    if p.head_weight.dtype is not operand or _aligned(p.head_weight) is not p.head_weight:
        return None
    use_target = p.teacher_features is not None and is_used(p.feature_weight)
    keep: list[Any] = []
    return module.cuda.MFDPlan(
        distill_loss.row_description(module, rows, keep),
        *pooling.pool_description(module, pool, keep),
        loss.use_soft,
        rows.labels is not None and loss.use_hard,
        row_matrix(p.teacher_features, keep) if use_target and p.teacher_features is not None else NO_ROWS,
        FEATURE_KINDS[p.feature_kind],
        p.teacher_pool_weights is not None and is_used(p.pool_weight),
        DTYPES[operand],
        p.head_weight.stride(0),
        0 if p.head_bias is None else DTYPES[p.head_bias.dtype],
        loss.reduction == "mean",
        pool.stacked,
        *temperature_range(rows.dtype),
        *places.first(),
        head_gradient,
    )


def scalar(p: MFDProblem, needs: MFDNeeds) -> tuple[MFDOutput, MFDGradients]:
    """The outputs and, from the same launch, all gradients."""
    rows, pool, loss, device, dtype = p.rows, p.pool, p.loss, p.device, p.rows.dtype
    check_labels_in_range(rows.op, rows)
    module, n, classes, width = native(), rows.n_rows, rows.classes, pool.width
    need_pool = needs.query or needs.bias or any(needs.features)
    d_features, addresses, row_stride = feature_gradients(
        pool.features, needs.features, pool.stacked, pool.modalities, width
    )

    def gradient(need: bool, like: Tensor | None) -> Tensor | None:
        return allocate.empty(tuple(like.shape), like.dtype, device) if need and like is not None else None

    sums = [gradient(needs.query, pool.query), gradient(needs.bias, pool.bias), gradient(needs.head_bias, p.head_bias)]
    terms = [allocate.empty((), dtype, device) for _ in range(4)]
    weights = allocate.empty((*p.leading, pool.modalities), dtype, device)
    predictions = allocate.empty(tuple(p.leading), torch.int64, device)
    d_head_weight = None
    if n == 0:
        for out in (*terms, *sums, *d_features):
            if out is not None:
                out.zero_()
        d_head_weight = torch.zeros_like(p.head_weight) if needs.head_weight else None
    else:
        keep: list[Any] = []
        operand = _operand_dtype(p)
        head = _aligned(p.head_weight.to(operand))
        head_bias = None if p.head_bias is None else p.head_bias.contiguous()
        dz_stride = -(-classes // 8) * 8
        y = allocate.empty((n, width), operand, device) if needs.head_weight else None
        dz = allocate.empty((n, dz_stride), operand, device) if needs.head_weight else None
        blocks = -(-n // module.cuda.mfd_rows)
        length = module.cuda.mfd_terms + sum(t.numel() for t in sums if t is not None)
        partial = allocate.empty((blocks, length), torch.float64, device)
        tickets = workspace(device, 4 * (1 + -(-blocks // module.cuda.mfd_group)), "tickets")
        count = loss.reduction == "mean" and loss.normalizer is None
        divisor: Scalar = 1.0
        if loss.reduction == "mean":
            divisor = float(n) if loss.normalizer is None else loss.normalizer
        target = p.teacher_features
        parts = (loss.soft_weight, loss.hard_weight, p.feature_weight, p.pool_weight, divisor)
        module.cuda.mfd_loss(
            distill_loss.row_description(module, rows, keep),
            *pooling.pool_description(module, pool, keep),
            loss.use_soft,
            rows.labels is not None and loss.use_hard,
            address(loss.weight),
            [number(value, dtype, device, keep) for value in parts],
            count and not (rows.labels is None and rows.mask is None),
            NO_ROWS if target is None or not is_used(p.feature_weight) else row_matrix(target, keep),
            FEATURE_KINDS[p.feature_kind],
            dense(p.teacher_pool_weights, dtype, keep) if is_used(p.pool_weight) else 0,
            (head.data_ptr(), DTYPES[operand]),
            head.stride(0),
            (0, 0) if head_bias is None else (head_bias.data_ptr(), DTYPES[head_bias.dtype]),
            [t.data_ptr() for t in (weights, predictions, *terms)],
            need_pool or needs.head_weight or needs.head_bias,
            need_pool,
            (address(y), address(dz), dz_stride),
            addresses,
            row_stride,
            [address(t) for t in sums],
            partial.data_ptr(),
            tickets.data_ptr(),
            *where(device),
        )
        if dz is not None and y is not None:
            d_head_weight = head_gradient(dz, y, classes).to(p.head_weight.dtype)
    d_query, d_bias, d_head_bias = sums
    gradients = MFDGradients(d_query, d_bias, d_head_weight, d_head_bias, d_features)
    value, soft, hard, feature = terms
    return MFDOutput(value, soft, hard, feature, weights, predictions), gradients
