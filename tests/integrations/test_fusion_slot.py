"""Fusion slots of other libraries: a list of tensors in, one tensor out."""

import pytest
import torch
from torch import nn

import mfd_fast as mfd
from mfd_fast.integrations.fusion import as_fusion


class Mmdl(nn.Module):
    """MultiBench's order of things: encoders, fusion, head; pykale's pipelines do the same."""

    def __init__(self, encoders, fusion, head):
        super().__init__()
        self.encoders, self.fusion, self.head = nn.ModuleList(encoders), fusion, head

    def forward(self, inputs):
        return self.head(self.fusion([encoder(x) for encoder, x in zip(self.encoders, inputs, strict=True)]))


def test_fusion_slot_of_a_whole_model():
    for fusion, width in (
        (mfd.nn.ModalFusion([6, 8], 5), 5),
        (mfd.nn.LowRankFusion([6, 8], 5, rank=2), 5),
    ):
        model = Mmdl([nn.Linear(3, 6), nn.Linear(4, 8)], as_fusion(fusion), nn.Linear(width, 2))
        inputs = [torch.randn(7, 3), torch.randn(7, 4)]
        model(inputs).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_fusion_slot_keeps_the_weights():
    pool = mfd.nn.ModalPool(6, 2)
    fusion = as_fusion(pool)
    features = [torch.randn(7, 6, requires_grad=True) for _ in range(2)]
    assert fusion.weights is None
    torch.testing.assert_close(fusion(features), pool(features).pooled)
    torch.testing.assert_close(fusion.weights, pool(features).weights)
    assert not fusion.weights.requires_grad
    present = torch.ones(7, 2, dtype=torch.bool)
    present[0, 1] = False
    fusion(features, present)
    assert fusion.weights[0].tolist() == [1.0, 0.0]


def test_fusion_slot_of_two():
    gated = mfd.nn.GatedFusion(6, 6)
    x, h = torch.randn(3, 6), torch.randn(3, 6)
    torch.testing.assert_close(as_fusion(gated)([x, h]), gated(x, h))


def test_fusion_slot_refuses():
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got function"):
        as_fusion(lambda features: features)
