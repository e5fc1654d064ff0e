"""One encoder per sensor, attention fusion over the sensors, a linear head.

The forward pass of a model is `mfd_fast.modal_pool` and a matrix product; its loss is `mfd_fast.mfd_loss`, which does
both again inside one call. So a model hands out its parts instead of hiding them in ``forward``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import mfd_fast as mfd


class Prediction(NamedTuple):
    """``logits [N, C]``, the fused representation ``pooled [N, D]``, the sensors' shares ``weights [N, M]``."""

    logits: Tensor
    pooled: Tensor
    weights: Tensor


class FusionNet(nn.Module):
    """``inputs[m] -> hidden -> width`` per sensor; a learned query ``[width]`` and prior ``[M]`` weigh the sensors."""

    def __init__(self, inputs: Sequence[int], hidden: int, width: int, classes: int, layers: int = 1) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(_encoder(size, hidden, width, layers) for size in inputs)
        self.query = nn.Parameter(torch.randn(width) * width**-0.5)
        self.prior = nn.Parameter(torch.zeros(len(inputs)))
        self.head = nn.Linear(width, classes)

    def encode(self, sensors: Sequence[Tensor]) -> list[Tensor]:
        """One ``[N, width]`` per sensor."""
        return [encoder(sensor) for encoder, sensor in zip(self.encoders, sensors, strict=True)]

    @torch.no_grad()
    def predict(
        self, sensors: Sequence[Tensor], present: Tensor | None = None, backend: str | None = None
    ) -> Prediction:
        """Logits, fused representation and sensor shares; ``present`` (bool ``[N, M]``) masks missing sensors."""
        features = self.encode(sensors)
        pooled, weights = mfd.modal_pool(features, self.query, bias=self.prior, present=present, backend=backend)
        return Prediction(self.head(pooled), pooled, weights)


def _encoder(size: int, hidden: int, width: int, layers: int) -> nn.Sequential:
    modules: list[nn.Module] = []
    for _ in range(layers):
        modules += [nn.Linear(size, hidden), nn.GELU()]
        size = hidden
    return nn.Sequential(*modules, nn.Linear(size, width))


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def principal_projection(features: Tensor, width: int) -> Tensor:
    """``[N, D]`` to ``[N, width]``: the leading principal components, scaled to mean square 1.

    Brings the teacher's wider fused representation to the student's width before training; uses no labels.
    """
    centred = features - features.mean(0)
    basis = torch.linalg.svd(centred, full_matrices=False).Vh[:width]
    projected = centred @ basis.T
    return projected / projected.square().mean().sqrt()
