"""linear_distill_loss in plain PyTorch: the heads' logits in full, then the row losses.

    z = student_hidden·student_weightᵀ + student_bias,  t = teacher_hidden·teacher_weightᵀ + teacher_bias
and the terms of :mod:`mfd_fast.reference.distill_loss` on the rows z, t. Products are summed in the dtype of the
losses (float32, or float64 where an input is), never rounded to 16 bits.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ..problems.linear import HeadProblem
from ..problems.rows import RowLoss, RowProblem
from .distill_loss import RowTerms, row_terms


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Products in the dtypes of their operands."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def head_logits(rows: RowProblem, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[N, C]`` logits of ``hidden [..., H]`` in the dtype of the rows, of the classes that are used.

    Whatever stands in a row that is not counted must not reach the gradient of the weight.
    """
    flat, counted, used = hidden.reshape(-1, hidden.shape[-1]).to(rows.dtype), rows.counted(), rows.classes
    if counted is not None:
        flat = torch.where(counted[:, None], flat, torch.zeros_like(flat))
    with without_autocast(hidden.device):
        out = flat @ weight[:used].to(rows.dtype).t()
        return out if bias is None else out + bias[:used].to(rows.dtype)


def linear_row_terms(rows: RowProblem, loss: RowLoss, heads: HeadProblem) -> RowTerms:
    """The per-row terms; a term whose weight is the number 0 is zeros."""
    h = heads
    z = head_logits(rows, h.student_hidden, h.student_weight, h.student_bias)
    if h.teacher_hidden is not None and h.teacher_weight is not None:
        t = head_logits(rows, h.teacher_hidden, h.teacher_weight, h.teacher_bias)
    elif loss.use_soft:
        t = rows.teacher.reshape(-1, rows.teacher.shape[-1])
    else:
        t = z.detach()
    return row_terms(rows.replace(student=z, teachers=[t]), rows.op, soft=loss.use_soft, hard=loss.use_hard)
