"""distill_terms: the two terms of distill_loss row by row, with the by-products of the same pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..backends import check_not_traced, choose
from ..divergences import Divergence
from ..problems.checks import by_pytorch, is_recorded
from ..problems.rows import check_rows
from ..reference.distill_loss import row_terms as reference_terms
from ..types import DistillTerms, LogitTransform, TopK
from .distill_loss import row_terms


def distill_terms(
    student: Tensor,
    teacher: Tensor | TopK | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    teacher_weights: Tensor | None = None,
    divergence: str | Divergence = "forward_kl",
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    ignored_labels: str = "row",
    student_transform: LogitTransform | None = None,
    teacher_transform: LogitTransform | None = None,
    scale_by_temperature: bool = True,
    backend: str | None = None,
) -> DistillTerms:
    """The terms of :func:`distill_loss` per row, unweighted, with the by-products of the same pass.

    Args: as in :func:`distill_loss`. With ``ignored_labels="term"`` a row without a label has 0 in ``hard`` and in the
    label probabilities, and everything else.

    Returns:
        :class:`~mfd_fast.DistillTerms` of ``[...]`` tensors. ``soft`` (with its T²) and ``hard`` are
        differentiable one by one. Entropies (nats) and label probabilities are those of the softened
        distributions; ``agreement`` is true where both sides have the same argmax (first index on ties,
        false with a NaN). ``hard`` and the label probabilities are None without labels.

    Raises:
        TypeError, ValueError, BackendError: as in :func:`distill_loss`.

    >>> import torch, mfd_fast as mfd
    >>> terms = mfd.distill_terms(torch.zeros(1, 4), torch.zeros(1, 4))
    >>> terms.soft.item(), round(terms.student_entropy.item(), 4), terms.agreement.item()
    (0.0, 1.3863, True)
    """
    check_not_traced("distill_terms", backend)
    rows = check_rows(
        "distill_terms",
        student,
        teacher,
        labels,
        teacher_weights=teacher_weights,
        divergence=divergence,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        label_smoothing=label_smoothing,
        mask=mask,
        ignore_index=ignore_index,
        ignored_labels=ignored_labels,
        student_transform=student_transform,
        teacher_transform=teacher_transform,
        scale_by_temperature=scale_by_temperature,
    )
    name = backend or "" if is_recorded() else choose("distill_loss", rows, backend, "distill_terms")
    if name == "reference":
        values = list(by_pytorch(rows.op, rows.named_tensors, lambda: reference_terms(rows, rows.op)))
    else:
        values = list(row_terms(rows, name, True))
    if labels is None:
        values[1] = values[4] = values[5] = None
    leading = rows.student.shape[:-1]
    return DistillTerms(*(None if v is None else v.reshape(leading) for v in values))  # type: ignore[arg-type]
