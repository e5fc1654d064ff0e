"""What an op of a backend gets and returns. Each backend has one module per op it has kernels for.

Every module answers ``can_run(problem)``: None, or the reason why its kernels cannot take this call. Gradients and
``needs`` have the same fields in the same order: ``needs`` says which gradients are wanted, the others are None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..problems.features import FeatureProblem, check_feature_loss
from ..problems.linear import check_linear_distill_loss
from ..problems.mfd import MFDProblem, check_mfd_loss
from ..problems.pool import PoolProblem, check_pool
from ..problems.rows import RowLoss, RowProblem, check_loss, check_rows
from ..types import MFDOutput
from .environment import BACKENDS

# ------------------------------------------------------------------------------------------------------ row losses


class RowNeeds(NamedTuple):
    student: bool
    temperature: bool
    teacher_temperature: bool
    teacher_weights: bool
    teachers: Sequence[bool]


class RowGradients(NamedTuple):
    """Of logits in their shape and dtype; of the temperatures ``[N]`` and of the teachers' weights, which already sum
    to 1, ``[N, teachers]``: one value per row, in the dtype of the arithmetic. Of a sparse teacher that of its values.
    """

    student: Tensor | None
    temperature: Tensor | None
    teacher_temperature: Tensor | None
    teacher_weights: Tensor | None
    teachers: Sequence[Tensor | None]

    def with_student_of(self, dtype: torch.dtype | None) -> RowGradients:
        """The same with the student's in ``dtype``; None: as it is."""
        return self if dtype is None or self.student is None else self._replace(student=self.student.to(dtype))


class ByProducts(NamedTuple):
    """``[N]`` each; the label's are None without labels."""

    student_entropy: Tensor
    teacher_entropy: Tensor
    student_label_prob: Tensor | None
    teacher_label_prob: Tensor | None
    agreement: Tensor


class RowOutputs(NamedTuple):
    """soft ``[N]``, hard ``[N]`` (zeros without labels), the statistics ``[N, STATISTICS]`` that only the backward of
    the same backend reads, and the by-products if they were asked for.
    """

    soft: Tensor
    hard: Tensor
    statistics: Tensor
    by_products: ByProducts | None


class ScalarLoss(NamedTuple):
    """A scalar loss and, if asked for, its gradient with respect to the student and its parts: ``[4]``, the fields of
    :class:`~mfd_fast.DistillOutput` after the loss.
    """

    loss: Tensor
    student: Tensor | None
    parts: Tensor | None


class RowBackend(Protocol):
    def can_run(self, rows: RowProblem, /) -> str | None: ...

    def scalar(self, rows: RowProblem, loss: RowLoss, /, *, needs_grad: bool, parts: bool) -> ScalarLoss:
        """The scalar loss in one pass; ``loss.reduction`` is "mean" or "sum"."""

    def per_row(self, rows: RowProblem, /, *, terms: bool) -> RowOutputs:
        """Both terms of every row; ``terms``: and the by-products."""

    def per_row_backward(
        self,
        rows: RowProblem,
        statistics: Tensor,
        grad_soft: Tensor,
        grad_hard: Tensor,
        needs: RowNeeds,
        /,
        *,
        in_place: bool = False,
        student_dtype: torch.dtype | None = None,
    ) -> RowGradients:
        """Gradients of Σ grad_soft·soft + grad_hard·hard; the upstream gradients ``[N]`` have any stride.

        ``in_place``: the logits, contiguous, are not read again, so their gradients may take their memory.
        ``student_dtype``: of the gradient of the student's logits, if it is not theirs.
        """


# ------------------------------------------------------------------------------------------------------------ pool


class PoolNeeds(NamedTuple):
    query: bool
    scores: bool
    bias: bool
    temperature: bool
    features: Sequence[bool]


class PoolGradients(NamedTuple):
    query: Tensor | None
    scores: Tensor | None
    bias: Tensor | None
    temperature: Tensor | None
    features: Sequence[Tensor | None]


class PoolBackend(Protocol):
    def can_run(self, problem: PoolProblem, /) -> str | None: ...

    def forward(self, p: PoolProblem, /) -> tuple[Tensor, Tensor]:
        """pooled ``[..., D]`` and weights ``[..., M]``."""

    def backward(
        self, p: PoolProblem, weights: Tensor, d_pooled: Tensor | None, d_weights: Tensor | None, needs: PoolNeeds, /
    ) -> PoolGradients: ...


# -------------------------------------------------------------------------------------------------------- features


class FeatureNeeds(NamedTuple):
    students: Sequence[bool]
    teachers: Sequence[bool]


class FeatureGradients(NamedTuple):
    students: Sequence[Tensor | None]
    teachers: Sequence[Tensor | None]


class FeatureBackend(Protocol):
    """Projectors are applied before a backend is called."""

    def can_run(self, problem: FeatureProblem, /) -> str | None: ...

    def scalar(self, problem: FeatureProblem, needs: Sequence[bool], /) -> tuple[Tensor, list[Tensor | None]]:
        """The scalar loss and, from the same pass, its gradient with respect to each student that needs one."""

    def distances(self, problem: FeatureProblem, /) -> list[Tensor]:
        """``[...]`` distances of each tap, 0 on masked rows."""

    def distances_backward(
        self, problem: FeatureProblem, grad_distances: Sequence[Tensor], needs: FeatureNeeds, /
    ) -> FeatureGradients:
        """Gradients of ``Σ_k sum(grad_k·distances_k)``."""


# ----------------------------------------------------------------------------------------------------- single pass


class MFDNeeds(NamedTuple):
    query: bool
    bias: bool
    head_weight: bool
    head_bias: bool
    features: Sequence[bool]


class MFDGradients(NamedTuple):
    query: Tensor | None
    bias: Tensor | None
    head_weight: Tensor | None
    head_bias: Tensor | None
    features: Sequence[Tensor | None]


class MFDBackend(Protocol):
    def can_run(self, problem: MFDProblem, /) -> str | None: ...

    def has_one_pass(self, p: MFDProblem, /) -> bool:
        """Whether one pass covers this call, never a matter of values; else it runs as a chain of the other ops."""

    def scalar(self, p: MFDProblem, needs: MFDNeeds, /) -> tuple[MFDOutput, MFDGradients]: ...


class ScaleBackend(Protocol):
    def scale_gradients_(self, gradients: Sequence[Tensor], factor: Tensor, /) -> None:
        """Each of the contiguous ``gradients`` ``*= factor`` (0-d, same device); the host waits for no device."""


# ------------------------------------------------------------------------------------------------- the public ops


class Op(NamedTuple):
    """``check`` builds the problem from all arguments; ``kernels`` is the module that runs it, of each of ``backends``,
    and ``border`` what that has. ``backends``: best first; :mod:`.choice` says from what, and holds exceptions.
    """

    check: Callable[..., Any]
    kernels: str
    border: type
    backends: tuple[str, ...] = BACKENDS


#: The one record of each public op: the choice of a backend, `explain`, `mfd-fast check` and the records of the tests
#: follow from it.
OPS: dict[str, Op] = {
    "distill_loss": Op(check_loss, "distill_loss", RowBackend),
    "distill_terms": Op(check_rows, "distill_loss", RowBackend),
    "linear_distill_loss": Op(check_linear_distill_loss, "distill_loss", RowBackend),
    "modal_pool": Op(check_pool, "modal_pool", PoolBackend),
    "feature_loss": Op(check_feature_loss, "feature_loss", FeatureBackend),
    "mfd_loss": Op(check_mfd_loss, "mfd_loss", MFDBackend),
}
