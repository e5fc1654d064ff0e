"""linear_distill_loss in plain PyTorch: the heads' logits in full, then the row losses.

    z = student_hidden·student_weightᵀ + student_bias,  t = teacher_hidden·teacher_weightᵀ + teacher_bias
and the terms of :mod:`mfd_fast.reference.distill_loss` on the rows z, t. Products are summed in the dtype of the
losses (float32, or float64 where an input is), never rounded to 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..problems.linear import HeadProblem
from ..problems.rows import RowLoss, RowProblem
from .distill_loss import RowTerms, row_terms


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``[N, C]`` logits of ``hidden [..., H]`` in ``dtype``."""
    with torch.autocast(hidden.device.type, enabled=False):
        out = hidden.reshape(-1, hidden.shape[-1]).to(dtype) @ weight.to(dtype).t()
        return out if bias is None else out + bias.to(dtype)


def linear_row_terms(rows: RowProblem, loss: RowLoss, heads: HeadProblem) -> RowTerms:
    """The per-row terms; a term whose weight is the number 0 is zeros."""
    h = heads
    z = head_logits(h.student_hidden, h.student_weight, h.student_bias, rows.dtype)
    if h.teacher_hidden is not None and h.teacher_weight is not None:
        t = head_logits(h.teacher_hidden, h.teacher_weight, h.teacher_bias, rows.dtype)
    elif loss.use_soft:
        t = rows.teacher.reshape(-1, rows.teacher.shape[-1])
    else:
        t = z.detach()
    return row_terms(rows.replace(student=z, teachers=[t]), rows.op, soft=loss.use_soft, hard=loss.use_hard)
