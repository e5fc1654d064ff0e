"""OpenCLIP's distillation loss against ours: a tiny model from its configuration, three steps."""

import open_clip
import pytest
import torch
from open_clip.loss import DistillClipLoss as TheirDistillClipLoss
from open_clip.model import CLIP
from trainer_steps import agree, steps

from mfd_fast.integrations.open_clip import DistillClipLoss


def clip(seed, width):
    torch.manual_seed(seed)
    vision = open_clip.CLIPVisionCfg(layers=1, width=width, head_width=8, patch_size=8, image_size=16)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=40, width=width, heads=2, layers=1)
    return CLIP(16, vision, text, output_dict=True).double()


def compared(loss):
    model, teacher = clip(0, 16), clip(1, 32)
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(3, 6, 3, 16, 16, generator=generator, dtype=torch.float64)
    texts = torch.randint(1, 40, (3, 6, 8), generator=generator)
    values = []

    def step(i):
        out = model(images[i], texts[i])
        with torch.no_grad():
            dist = teacher(images[i], texts[i])
        losses = loss(**out, **{f"dist_{name}": value for name, value in dist.items()}, output_dict=True)
        values.append({name: value.item() for name, value in losses.items()})
        return sum(losses.values())

    return steps(model, step, lr=0.05), values


def test_open_clip_steps():
    (found, values), (expected, theirs) = (compared(kind()) for kind in (DistillClipLoss, TheirDistillClipLoss))
    agree(found, expected)
    assert [list(v) for v in values] == [list(v) for v in theirs] == [["contrastive_loss", "distill_loss"]] * 3
    for mine, their in zip(values, theirs, strict=True):
        assert mine == pytest.approx(their, rel=1e-9)


def test_open_clip_returns_a_pair():
    features = [torch.randn(4, 6).double() for _ in range(4)]
    call = (features[0], features[1], 3.0, features[2], features[3], 5.0)
    for found, expected in zip(DistillClipLoss()(*call), TheirDistillClipLoss()(*call), strict=True):
        torch.testing.assert_close(found, expected)


def test_open_clip_refuses_a_teacher_with_grad():
    features = [torch.randn(4, 6) for _ in range(4)]
    with pytest.raises(ValueError, match="the teacher's features must be computed without grad"):
        DistillClipLoss()(features[0], features[1], 1.0, features[2].requires_grad_(), features[3], 1.0)
