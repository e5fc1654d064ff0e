"""torch.nn.Module faces of the ops: they hold the options and call the functions.

Options are attributes of the module, checked when they are set; those that are tensors, parameters or schedules are
what :class:`~mfd_fast.schedules.options.OptionsModule` makes of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from .. import types
from ..ops.distill_loss import distill_loss
from ..ops.feature_loss import feature_loss
from ..ops.linear_distill_loss import linear_distill_loss
from ..ops.mfd_loss import mfd_loss
from ..ops.modal_pool import modal_pool
from ..problems import checks as contract
from ..problems.rows import Normalizer
from ..schedules.options import Check, OptionsModule
from . import _options
from ._inputs import check_size

__all__ = ["DistillationLoss", "FeatureLoss", "LinearDistillationLoss", "MFDLoss", "ModalPool"]


class _LossModule(OptionsModule, _Loss):
    """A loss module with the options of its op."""

    def __init__(self, *, reduction: str = "mean", **options: Any) -> None:
        super().__init__(reduction=_options.check_reduction(self, reduction))
        _options.check_known(self, options, self._OPTIONS)
        for name, value in options.items():
            setattr(self, name, value)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"reduction={self.reduction!r}")))


class DistillationLoss(_LossModule):
    """Module of :func:`mfd_fast.distill_loss`; ``options`` are its keyword arguments of the same names.

    A ``temperature``, ``soft_weight`` … that is a ``torch.nn.Parameter`` is learned, one that is a
    :class:`mfd_fast.schedules.Schedule` is read at every call. TypeError or ValueError for an option that breaks the
    op's contract.

    >>> import torch, mfd_fast as mfd
    >>> criterion = mfd.nn.DistillationLoss(temperature=4.0, hard_weight=0.1, soft_weight=0.9)
    >>> criterion(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1])).shape
    torch.Size([])
    """

    _OPTIONS: ClassVar[Mapping[str, Check]] = _options.of(distill_loss, ("mask", "weight", "normalizer"))

    def forward(
        self,
        student: Tensor,
        teacher: Tensor | types.TopK | Sequence[Tensor] | None,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        normalizer: Normalizer = None,
    ) -> Tensor | types.DistillOutput:
        return distill_loss(
            student,
            teacher,
            labels,
            mask=mask,
            weight=weight,
            normalizer=normalizer,
            reduction=self.reduction,
            **self.options,
        )


class LinearDistillationLoss(_LossModule):
    """Module of :func:`mfd_fast.linear_distill_loss`; ``options`` are its keyword arguments of the same names.

    The heads belong to the models: weights and biases are arguments of every call.

    >>> import torch, mfd_fast as mfd
    >>> criterion = mfd.nn.LinearDistillationLoss(temperature=2.0)
    >>> student, teacher = torch.nn.Linear(8, 50), torch.nn.Linear(16, 50)
    >>> out = criterion(
    ...     torch.randn(6, 8), student.weight, torch.randn(6, 16), teacher.weight, student_bias=student.bias
    ... )
    >>> out.loss.shape
    torch.Size([])
    """

    _OPTIONS: ClassVar[Mapping[str, Check]] = _options.of(
        linear_distill_loss, ("student_bias", "teacher_bias", "mask", "weight", "normalizer", "process_group")
    )

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | types.TopK | None,
        teacher_weight: Tensor | None,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        process_group: Any = None,
    ) -> types.LinearDistillOutput:
        return linear_distill_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            mask=mask,
            weight=weight,
            normalizer=normalizer,
            process_group=process_group,
            reduction=self.reduction,
            **self.options,
        )


class FeatureLoss(_LossModule):
    """Module of :func:`mfd_fast.feature_loss`.

    Args:
        projections: (student width, teacher width) per tap that needs one, None for the others; owned and
            learned as ``projectors``. One pair stands for a single tap.
        device, dtype: of the projectors.
        options: keyword arguments of the function (kind, weight, backend); see :class:`DistillationLoss`.

    >>> import torch, mfd_fast as mfd
    >>> criterion = mfd.nn.FeatureLoss(projections=(8, 16), kind="cosine")
    >>> criterion(torch.randn(4, 8), torch.randn(4, 16)).shape
    torch.Size([])
    """

    _OPTIONS: ClassVar[Mapping[str, Check]] = _options.of(feature_loss, ("mask", "projector"))

    def __init__(
        self,
        *,
        projections: tuple[int, int] | Sequence[tuple[int, int] | None] | None = None,
        reduction: str = "mean",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(reduction=reduction, **options)
        self.single = isinstance(projections, tuple) and any(isinstance(width, int) for width in projections)
        pairs: list[Any] = [projections] if self.single else list(projections or ())
        self.projectors = nn.ModuleList()
        for tap, pair in enumerate(pairs):
            if pair is None:
                self.projectors.append(nn.Identity())
                continue
            name = "projections" if self.single else f"projections[{tap}]"
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise contract.type_error("FeatureLoss", name, pair, "(student width, teacher width) or None")
            student, teacher = (check_size("FeatureLoss", name, width) for width in pair)
            self.projectors.append(nn.Linear(student, teacher, bias=False, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Projectors as ``torch.nn.Linear`` starts; options that are tensors get the values they were set with."""
        super().reset_parameters()
        for projector in self.projectors:
            if isinstance(projector, nn.Linear):
                projector.reset_parameters()

    def forward(
        self,
        student: Tensor | Sequence[Tensor],
        teacher: Tensor | Sequence[Tensor],
        labels: Tensor | None = None,  # noqa: ARG002  (the common signature of loss modules)
        *,
        mask: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        weights = [p.weight if isinstance(p, nn.Linear) else None for p in self.projectors]
        projector = None if not weights else weights[0] if self.single else weights
        return feature_loss(student, teacher, mask=mask, projector=projector, reduction=self.reduction, **self.options)


class ModalPool(OptionsModule):
    """Module of :func:`mfd_fast.modal_pool` that owns its query ``[D]`` and its prior ``[M]``.

    Args:
        dim: width D of the features.
        modalities: number M of them.
        learn_query: attention by a learned query; False is a learned weighted average by the prior alone.
        learn_prior: add a learned bias per modality (starts at 0).
        device, dtype: of both.
        options: keyword arguments of the function (temperature, scale, backend); see :class:`DistillationLoss`.

    >>> import torch, mfd_fast as mfd
    >>> pool = mfd.nn.ModalPool(8, 2)
    >>> pooled, weights = pool([torch.randn(4, 8), torch.randn(4, 8)])
    >>> pooled.shape, weights.shape
    (torch.Size([4, 8]), torch.Size([4, 2]))
    """

    _OPTIONS: ClassVar[Mapping[str, Check]] = _options.of(modal_pool, ("scores", "bias", "present", "query"))

    def __init__(
        self,
        dim: int,
        modalities: int,
        *,
        learn_query: bool = True,
        learn_prior: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.dim = check_size("ModalPool", "dim", dim)
        self.modalities = check_size("ModalPool", "modalities", modalities)
        contract.check_bool("ModalPool", "learn_query", learn_query)
        contract.check_bool("ModalPool", "learn_prior", learn_prior)
        _options.check_known(self, options, self._OPTIONS)
        for name, value in options.items():
            setattr(self, name, value)
        form: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query = nn.Parameter(torch.empty(dim, **form)) if learn_query else None
        self.bias = nn.Parameter(torch.empty(modalities, **form)) if learn_prior else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Query from N(0, 1/D), prior 0: the modalities start nearly equal. Tensor options as they were set."""
        super().reset_parameters()
        if self.query is not None:
            nn.init.normal_(self.query, std=self.dim**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, features: Sequence[Tensor] | Tensor, present: Tensor | None = None) -> types.ModalPoolOutput:
        return modal_pool(features, self.query, bias=self.bias, present=present, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (f"dim={self.dim}, modalities={self.modalities}", super().extra_repr())))


class MFDLoss(_LossModule):
    """Module of :func:`mfd_fast.mfd_loss`; ``options`` are its weights, temperatures and kinds, as in
    :class:`DistillationLoss`.

    With ``pool_weight`` and, per call, ``teacher_pool_weights [..., M]``, the student's modality weights learn from a
    teacher's: those that :class:`ModalPool` or :class:`~mfd_fast.nn.ModalFusion` return.

    >>> import torch, mfd_fast as mfd
    >>> criterion = mfd.nn.MFDLoss(soft_weight=0.0, pool_weight=1.0)
    >>> image, text = torch.randn(4, 8), torch.randn(4, 8)
    >>> equal = torch.full((4, 2), 0.5)
    >>> out = criterion([image, text], None, torch.randn(5, 8), None, torch.randn(4, 5), teacher_pool_weights=equal)
    >>> out.loss.item()
    0.0
    """

    _OPTIONS: ClassVar[Mapping[str, Check]] = _options.of(
        mfd_loss, ("teacher_features", "present", "bias", "teacher_pool_weights", "mask", "weight", "normalizer")
    )

    def forward(
        self,
        features: Sequence[Tensor] | Tensor,
        query: Tensor | None,
        head_weight: Tensor,
        head_bias: Tensor | None,
        teacher_logits: Tensor | None,
        labels: Tensor | None = None,
        **tensors: Any,
    ) -> types.MFDOutput:
        """Positional arguments and ``tensors`` as in the function."""
        return mfd_loss(
            features,
            query,
            head_weight,
            head_bias,
            teacher_logits,
            labels,
            reduction=self.reduction,
            **self.options,
            **tensors,
        )
