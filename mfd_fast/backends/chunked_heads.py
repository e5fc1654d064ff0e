"""Row losses of two heads by chunks: logits by products, rows by a backend's kernels, gradients by products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problems.linear import HeadProblem
from ..problems.rows import RowLoss, RowProblem
from ..reference.linear_distill_loss import without_autocast
from . import allocate, products, row_backend
from .class_sharded import ClassSharded
from .protocol import RowNeeds


class LinearGradients(NamedTuple):
    """One entry per differentiable tensor: its gradient, the tensor itself, or whether its gradient is wanted."""

    student_hidden: Any = None
    student_weight: Any = None
    student_bias: Any = None
    teacher_hidden: Any = None
    teacher_weight: Any = None
    teacher_bias: Any = None
    teacher: Any = None
    temperature: Any = None
    teacher_temperature: Any = None

    @property
    def student_head(self) -> tuple[Any, Any, Any]:
        return self.student_hidden, self.student_weight, self.student_bias

    @property
    def teacher_head(self) -> tuple[Any, Any, Any]:
        return self.teacher_hidden, self.teacher_weight, self.teacher_bias


NOTHING = LinearGradients()
HEADS = HeadProblem.TENSORS
MATRICES = tuple(name for name in HEADS if not name.endswith("bias"))


def leaves_of(rows: RowProblem, heads: HeadProblem) -> LinearGradients:
    own, other = (t if isinstance(t, Tensor) else None for t in (rows.temperature, rows.teacher_temperature))
    teacher = rows.teacher if heads.teacher_weight is None else None
    return LinearGradients(**{name: getattr(heads, name) for name in HEADS}, teacher=teacher)._replace(
        temperature=own, teacher_temperature=other
    )


class Terms(NamedTuple):
    """``[N]`` each, 0 in rows that are not counted, and the gradients of Σ grad_soft·soft + grad_hard·hard."""

    soft: Tensor
    hard: Tensor
    student_entropy: Tensor
    gradients: LinearGradients


def run(
    backend: str,
    rows: RowProblem,
    loss: RowLoss,
    heads: HeadProblem,
    grad_soft: Tensor | None = None,
    grad_hard: Tensor | None = None,
    needs: LinearGradients = NOTHING,
    sharded: ClassSharded | None = None,
) -> Terms:
    """Every chunk's logits, row losses and gradients. Sums over rows run in a fixed order.

    At a time there are the logits of one chunk of both sides, over which their gradients are written. The number of
    counted rows is read, for which the host waits off the CPU.
    """
    counted, dtype, leaves = rows.counted(), rows.dtype, leaves_of(rows, heads)
    index = None if counted is None else counted.nonzero().squeeze(-1)
    if index is not None and index.shape[0] == rows.n_rows:
        index = None
    n = rows.n_rows if index is None else index.shape[0]
    total = LinearGradients(*(_start(leaf, need, rows) for leaf, need in zip(leaves, needs, strict=True)))
    step = int(heads.chunk_rows)
    kernels = sharded or row_backend(backend)
    of_student, of_teacher = any(needs.student_head), any((*needs.teacher_head, needs.teacher))
    wanted = RowNeeds(of_student, bool(needs.temperature), bool(needs.teacher_temperature), False, [of_teacher])
    # Logits that were given are the caller's.
    in_place = not of_teacher or heads.teacher_weight is not None
    zero = torch.zeros((), dtype=dtype, device=rows.device)
    # What has no view as [N, H], or lies as no product reads it, is copied once, not by each product of each chunk.
    rows = rows.replace(teachers=[_flat(rows.teacher)])
    matrices = {name: matrix for name in MATRICES if (matrix := getattr(heads, name)) is not None}
    heads = heads.replace(**{name: products.readable(_flat(matrix)) for name, matrix in matrices.items()})
    narrow = products.gradient_dtype(heads.student_hidden, heads.student_weight, dtype, backend)
    # On a GPU both products take the narrow gradient; a CPU adds to the weight's from float32 operands.
    student_dtype = narrow if products.has_wide_sums(rows.device) else dtype

    def values_of(part: Any, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """One chunk's soft, hard and entropy; its gradients go to ``total``."""
        chunk = _chunk(backend, rows, loss, heads, part, count)
        soft, hard, statistics, by_products = kernels.per_row(chunk, terms=True)
        if any(needs):
            soft_up, hard_up = (zero.expand(count) if g is None else g[part] for g in (grad_soft, grad_hard))
            found = kernels.per_row_backward(
                chunk, statistics, soft_up, hard_up, wanted, in_place=in_place, student_dtype=student_dtype
            )
            del chunk  # its memory serves what follows
            _add_head(total.student_head, found.student, heads.student_hidden, heads.student_weight, part, narrow)
            if heads.teacher_weight is not None:
                _add_head(
                    total.teacher_head, found.teachers[0], heads.teacher_hidden, heads.teacher_weight, part, dtype
                )
            else:
                _add(total.teacher, found.teachers[0], part)
            _add(total.temperature, found.temperature, part)
            _add(total.teacher_temperature, found.teacher_temperature, part)
        return soft, hard, by_products.student_entropy  # type: ignore[union-attr]

    def column(values: list[Tensor]) -> Tensor:
        """``[N]`` of all chunks' values."""
        together = torch.cat(values) if values else zero.expand(0)
        return together if index is None else zero.repeat(rows.n_rows).index_copy_(0, index, together)

    with without_autocast(rows.device):
        spans = [(first, min(first + step, n)) for first in range(0, n, step)]
        found = [values_of(slice(*span) if index is None else index[slice(*span)], span[1] - span[0]) for span in spans]
    soft, hard, entropy = (column([values[k] for values in found]) for k in range(3))
    if sharded is not None and total.student_hidden is not None:
        sharded.add_up(total.student_hidden)  # each rank has its classes' share
    # Rounded once.
    cast = (g if g is None or leaf is None else g.to(leaf.dtype) for g, leaf in zip(total, leaves, strict=True))
    return Terms(soft, hard, entropy, LinearGradients(*cast))


def _chunk(backend: str, rows: RowProblem, loss: RowLoss, heads: HeadProblem, part: Any, count: int) -> RowProblem:
    """The rows ``part``, all counted, with the logits in the dtype of the losses."""

    def of(value: Any) -> Any:
        return value[part] if isinstance(value, Tensor) and value.dim() else value

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = bias if bias is None else bias[: rows.classes]
        return products.logits(hidden[part], weight[: rows.classes], bias, rows.dtype, backend)

    z = logits(heads.student_hidden, heads.student_weight, heads.student_bias)
    if heads.teacher_hidden is not None and heads.teacher_weight is not None:
        t = logits(heads.teacher_hidden, heads.teacher_weight, heads.teacher_bias)
    else:
        t = rows.teacher[part] if loss.use_soft else z
    return rows.replace(
        student=z,
        teachers=[t],
        labels=of(rows.labels) if loss.use_hard or rows.divergence.needs_labels else None,
        mask=None,
        temperature=of(rows.temperature),
        own_teacher_temperature=of(rows.own_teacher_temperature),
        indices=of(rows.indices),
        n_rows=count,
    )


def _flat(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])


def _start(leaf: Tensor | None, need: Any, rows: RowProblem) -> Tensor | None:
    """Where a gradient is summed: zeros of the leaf's shape (of a number's: 0-d) in the dtype of the arithmetic."""
    shape = torch.Size() if leaf is None else leaf.shape
    return allocate.empty_large(shape, rows.dtype, rows.device).zero_() if need else None


def _add_head(
    total: Sequence[Any], d_logits: Tensor | None, hidden: Any, weight: Tensor, part: Any, narrow: torch.dtype
) -> None:
    """Adds a chunk's gradients to those of ``(hidden, weight, bias)``; ``narrow``: see products.gradient_dtype."""
    if d_logits is None:
        return
    d_hidden, d_weight, d_bias = total
    classes = d_logits.shape[1]
    if d_weight is not None:
        products.add_weight_gradient(d_weight[:classes], d_logits, hidden[part])
    if d_bias is not None:
        d_bias[:classes] += d_logits.sum(0, dtype=d_bias.dtype)
    if d_hidden is not None:
        if d_logits.dtype != narrow:
            d_logits = allocate.empty_large(d_logits.shape, narrow, d_logits.device).copy_(d_logits)
        operands = d_logits, weight[:classes], d_hidden.dtype
        if isinstance(part, slice):
            products.hidden_gradient(*operands, _flat(d_hidden)[part])
        else:
            _flat(d_hidden)[part] = products.hidden_gradient(*operands)


def _add(total: Tensor | None, found: Tensor | None, part: Any) -> None:
    """One value or row per row, or their sum where all rows share one."""
    if total is None or found is None:
        return
    if not total.dim():
        total += found.sum()
    elif found.dim() == 1:
        total[part] = found
    else:
        _flat(total)[part] = found
