"""torch.nn.Module faces of the ops: they hold the options and call the functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from .. import types
from ..ops.distill_loss import distill_loss
from ..ops.feature_loss import feature_loss
from ..ops.mfd_loss import mfd_loss
from ..ops.modal_pool import modal_pool

__all__ = ["DistillationLoss", "FeatureLoss", "MFDLoss", "ModalPool"]


class DistillationLoss(_Loss):
    """Module of :func:`mfd_fast.distill_loss`; ``options`` are its keyword arguments of the same names.

    >>> import torch, mfd_fast as mfd
    >>> criterion = mfd.nn.DistillationLoss(temperature=4.0, hard_weight=0.1, soft_weight=0.9)
    >>> criterion(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1])).shape
    torch.Size([])
    """

    def __init__(self, *, reduction: str = "mean", **options: Any) -> None:
        super().__init__(reduction=reduction)
        self.options = _known(distill_loss, options, ("mask", "weight", "normalizer"))

    def forward(
        self,
        student: Tensor,
        teacher: Tensor | types.TopK | Sequence[Tensor],
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
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

    def extra_repr(self) -> str:
        return _repr(self.options, self.reduction)


class FeatureLoss(_Loss):
    """Module of :func:`mfd_fast.feature_loss`.

    Args:
        projections: (student width, teacher width) per tap that needs one, None for the others; owned and
            learned as ``projectors``. One pair stands for a single tap.
        options: keyword arguments of the function (kind, weight, backend).
    """

    def __init__(
        self,
        *,
        projections: tuple[int, int] | Sequence[tuple[int, int] | None] | None = None,
        reduction: str = "mean",
        **options: Any,
    ) -> None:
        super().__init__(reduction=reduction)
        self.options = _known(feature_loss, options, ("mask", "projector"))
        single = isinstance(projections, tuple) and all(isinstance(w, int) for w in projections)
        pairs: list[Any] = [projections] if single else list(projections or ())
        self.single = single
        self.projectors = nn.ModuleList(
            nn.Identity() if pair is None else nn.Linear(pair[0], pair[1], bias=False) for pair in pairs
        )

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

    def extra_repr(self) -> str:
        return _repr(self.options, self.reduction)


class ModalPool(nn.Module):
    """Module of :func:`mfd_fast.modal_pool` that owns its query ``[D]`` and its prior ``[M]``.

    Args:
        dim: width D of the features.
        modalities: number M of them.
        learn_query: attention by a learned query; False is a learned weighted average by the prior alone.
        learn_prior: add a learned bias per modality (starts at 0).
        options: keyword arguments of the function (temperature, scale, backend).
    """

    def __init__(
        self, dim: int, modalities: int, *, learn_query: bool = True, learn_prior: bool = True, **options: Any
    ) -> None:
        super().__init__()
        self.dim, self.modalities = dim, modalities
        self.options = _known(modal_pool, options, ("scores", "bias", "present", "query"))
        self.query = nn.Parameter(torch.empty(dim)) if learn_query else None
        self.bias = nn.Parameter(torch.empty(modalities)) if learn_prior else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Query from N(0, 1/D), prior 0: the modalities start nearly equal."""
        if self.query is not None:
            nn.init.normal_(self.query, std=self.dim**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, features: Sequence[Tensor] | Tensor, present: Tensor | None = None) -> types.ModalPool:
        return modal_pool(features, self.query, bias=self.bias, present=present, **self.options)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, modalities={self.modalities}"


class MFDLoss(_Loss):
    """Module of :func:`mfd_fast.mfd_loss`; ``options`` are its weights, temperatures and kinds.

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

    _TENSORS = ("teacher_features", "present", "bias", "teacher_pool_weights", "mask", "weight", "normalizer")

    def __init__(self, *, reduction: str = "mean", **options: Any) -> None:
        super().__init__(reduction=reduction)
        self.options = _known(mfd_loss, options, self._TENSORS)

    def forward(
        self,
        features: Sequence[Tensor] | Tensor,
        query: Tensor | None,
        head_weight: Tensor,
        head_bias: Tensor | None,
        teacher_logits: Tensor,
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

    def extra_repr(self) -> str:
        return _repr(self.options, self.reduction)


def _known(op: Any, options: dict[str, Any], per_call: Sequence[str]) -> dict[str, Any]:
    """The options, if every one is a keyword-only argument of ``op`` that does not belong to the call."""
    accepted = set(op.__kwdefaults__) - {"reduction", *per_call}
    for name in options:
        if name not in accepted:
            raise TypeError(f"{op.__name__}: no option {name!r}; known: {', '.join(sorted(accepted))}")
    return options


def _repr(options: dict[str, Any], reduction: str) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in {**options, "reduction": reduction}.items())
