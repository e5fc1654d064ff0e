"""Fusion slots of multimodal libraries: :func:`as_fusion`.

    model = MMDL(encoders, as_fusion(mfd.nn.ModalFusion([64, 32], 128)), head)      # MultiBench

pykale and MultiBench fuse by a module that gets the list of the encoders' features and returns one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..nn import GatedFusion

__all__ = ["as_fusion"]


def as_fusion(module: nn.Module) -> nn.Module:
    """A fusion module of :mod:`mfd_fast.nn` with the call of a fusion slot: list of tensors → tensor.

    Args:
        module: takes a list of features (ModalPool, ModalFusion, LowRankFusion) or two of them (GatedFusion).

    Returns:
        A module that owns it and returns the pooled features; modality weights of the last call that had some are in
        its ``weights``, detached.

    Raises:
        TypeError: not a module.

    >>> import torch, mfd_fast as mfd
    >>> fusion = as_fusion(mfd.nn.ModalFusion([4, 6], 8))
    >>> fusion([torch.randn(2, 4), torch.randn(2, 6)]).shape
    torch.Size([2, 8])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"as_fusion: module must be a torch.nn.Module, got {type(module).__name__}")
    return _Fusion(module)


class _Fusion(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.weights: Tensor | None = None

    def forward(self, modalities: Sequence[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        spread = isinstance(self.module, GatedFusion)
        fused = self.module(*modalities, *args, **kwargs) if spread else self.module(list(modalities), *args, **kwargs)
        if isinstance(fused, Tensor):
            return fused
        self.weights = fused.weights.detach()
        pooled: Tensor = fused.pooled
        return pooled
