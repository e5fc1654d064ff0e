"""timm's tasks against ours: three steps of tiny models from their constructors."""

import pytest
import timm
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import FeatureDistillationTask as TheirFeatureTask
from timm.task import LogitDistillationTask as TheirLogitTask
from torch import nn
from trainer_steps import agree, steps

from mfd_fast.integrations.timm import FeatureDistillationTask, LogitDistillationTask


def vit(seed, dim):
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=dim, depth=1, num_heads=2, num_classes=5
    ).double()


def compared(kind, criterion=None, mixup=False, **options):
    torch.manual_seed(2)
    task = kind(
        vit(0, 8), vit(1, 16), criterion or nn.CrossEntropyLoss(), dtype=torch.float64, verbose=False, **options
    )
    task = task.double().train()
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(3, 6, 3, 16, 16, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 5, (3, 6), generator=generator)
    values = []

    def step(i):
        image, target = images[i], targets[i]
        if mixup:
            torch.manual_seed(i)
            image, target = MIXUP(image.clone(), target)
            target = target.double()
        values.append(task(image, target))
        return values[-1]["loss"]

    return steps(task.trainable_module, step, lr=0.1), values


MIXUP = Mixup(mixup_alpha=0.8, cutmix_alpha=0.0, num_classes=5, label_smoothing=0.1)
WEIGHTS = [
    {},
    {"task_loss_weight": 0.3},
    {"distill_loss_weight": 2.0},
    {"task_loss_weight": 0.5, "distill_loss_weight": 1.5},
]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    ("ours", "theirs"), [(LogitDistillationTask, TheirLogitTask), (FeatureDistillationTask, TheirFeatureTask)]
)
def test_timm_steps(ours, theirs, weights):
    options = weights | ({"temperature": 4.0} if ours is LogitDistillationTask else {})
    (found, values), (expected, their_values) = (compared(kind, **options) for kind in (ours, theirs))
    agree(found, expected)
    for mine, their in zip(values, their_values, strict=True):
        assert list(mine) == list(their) == ["loss", "output", "task_loss", "kd_loss"]
        for name in mine:
            torch.testing.assert_close(mine[name], their[name])


@pytest.mark.parametrize(
    ("criterion", "folds"),
    [
        (nn.CrossEntropyLoss(label_smoothing=0.2), True),
        (LabelSmoothingCrossEntropy(0.1), True),
        (nn.CrossEntropyLoss(weight=torch.linspace(0.5, 1.5, 5, dtype=torch.float64)), False),
        (nn.MultiMarginLoss(), False),
    ],
    ids=["smoothed", "timm's", "weighted", "other"],
)
def test_timm_criteria(criterion, folds):
    options = {"criterion": criterion, "temperature": 2.0, "task_loss_weight": 0.4}
    (found, values), (expected, theirs) = (compared(k, **options) for k in (LogitDistillationTask, TheirLogitTask))
    agree(found, expected)
    for mine, their in zip(values, theirs, strict=True):
        torch.testing.assert_close(mine, their)
        assert mine["task_loss"].requires_grad is not folds


def test_timm_mixup():
    """Soft targets are the criterion's, which stays timm's."""
    import numpy as np

    def run(kind):
        np.random.seed(0)
        return compared(kind, SoftTargetCrossEntropy(), mixup=True, temperature=2.0)[0]

    agree(run(LogitDistillationTask), run(TheirLogitTask))


def test_timm_normalises_the_teachers_input():
    student, teacher = vit(0, 8), vit(1, 16)
    teacher.pretrained_cfg = teacher.pretrained_cfg | {"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}
    images, targets = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.tensor([1, 2])
    kinds = (LogitDistillationTask, TheirLogitTask)
    found, expected = (
        k(student, teacher, nn.CrossEntropyLoss(), dtype=torch.float64, verbose=False)(images, targets) for k in kinds
    )
    torch.testing.assert_close(found["loss"], expected["loss"])
    same = LogitDistillationTask(student, vit(1, 16), nn.CrossEntropyLoss(), dtype=torch.float64, verbose=False)
    assert not torch.allclose(found["kd_loss"], same(images, targets)["kd_loss"])
