"""AutoGluon's distiller, the one file, against ours.

AutoGluon needs an old timm and an old transformers, so its packages are not installed: ``lit_distiller.py`` and
``constants.py`` are its own, the modules that the file imports beside them are supplied here.
"""

import importlib
import importlib.metadata
import sys
import types
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import nn
from trainer_steps import agree, steps


def supply():
    (file,) = [f for f in importlib.metadata.files("autogluon.multimodal") if f.match("optim/lit_distiller.py")]
    root = Path(file.locate()).parent.parent

    def package(name, path=None):
        module = types.ModuleType(name)
        module.__path__ = [] if path is None else [str(path)]
        sys.modules[name] = module
        return module

    def supplied(name, *functions):
        module = types.ModuleType(name)
        for function in functions:
            setattr(module, function, None)
        sys.modules[name] = module

    package("autogluon", root.parent)
    package("autogluon.core")
    supplied("autogluon.core.metrics", "METRICS")
    sys.modules["autogluon.core.metrics"].METRICS = defaultdict(dict)
    package("autogluon.multimodal", root)
    package("autogluon.multimodal.optim", root / "optim")
    package("autogluon.multimodal.models")
    supplied("autogluon.multimodal.models.utils", "run_model")
    supplied(
        "autogluon.multimodal.optim.lr",
        "apply_layerwise_lr_decay",
        "apply_single_lr",
        "apply_two_stages_lr",
        "get_lr_scheduler",
    )
    supplied("autogluon.multimodal.optim.utils", "get_optimizer")


supply()
ours = importlib.import_module("mfd_fast.integrations.autogluon")
Theirs = ours.AutoGluonModule
RELATIONS = nn.Module()
RELATIONS.distance_loss_weight = RELATIONS.angle_loss_weight = 0


class Fusion(nn.Module):
    """Late fusion of an image and a text feature, with the output that AutoGluon's models have."""

    def __init__(self, seed, width, classes=5):
        super().__init__()
        torch.manual_seed(seed)
        self.prefix, self.label_key = "fusion", "label"
        self.image, self.text = nn.Linear(4, width), nn.Linear(6, width)
        self.head = nn.Linear(width, classes)
        self.double()

    def forward(self, batch):
        features = torch.tanh(self.image(batch["image"]) + self.text(batch["text"]))
        return {"fusion": {"logits": self.head(features), "features": features, "weight": 1.0}}


def distiller(kind, classes=5, **options):
    student, teacher = Fusion(0, 8, classes), Fusion(1, 12, classes)
    torch.manual_seed(2)
    arguments = {
        "student_model": student,
        "teacher_model": teacher,
        "matches": None,
        "critics": None,
        "baseline_funcs": None,
        "hard_label_weight": 0.2,
        "soft_label_weight": 50.0,
        "softmax_regression_weight": 0.0,
        "temperature": 5.0,
        "output_feature_loss_weight": 0.01,
        "hard_label_loss_func": nn.CrossEntropyLoss() if classes > 1 else nn.MSELoss(),
        "soft_label_loss_func": nn.CrossEntropyLoss() if classes > 1 else nn.MSELoss(),
        "output_feature_adaptor": nn.Linear(8, 12).double(),
        "output_feature_loss_func": nn.MSELoss(),
        "rkd_loss_func": RELATIONS,
    }
    return kind(**arguments | options)


def compared(kind, classes=5, **options):
    made = distiller(kind, classes, **options)
    generator = torch.Generator().manual_seed(3)
    values = []

    def step(_):
        batch = {
            "image": torch.randn(7, 4, generator=generator, dtype=torch.float64),
            "text": torch.randn(7, 6, generator=generator, dtype=torch.float64),
        }
        label = torch.randint(0, 5, (7,), generator=generator)
        label = label if classes > 1 else label.double()[:, None]
        with torch.no_grad():
            teacher = made.teacher_model(batch)
        values.append(made._compute_loss(made.student_model(batch), teacher, label))
        return values[-1]

    return steps(made, step, lr=0.01), [value.item() for value in values]


CHOICES = {
    "default": {},
    "soft": {"hard_label_weight": 0.0, "output_feature_loss_weight": 0.0},
    "smoothed": {"soft_label_loss_func": nn.CrossEntropyLoss(label_smoothing=0.1)},
    "cosine": {"output_feature_loss_func": nn.L1Loss()},
    "regression": {"softmax_regression_weight": 0.5, "softmax_regression_loss_func": nn.CrossEntropyLoss()},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_autogluon_steps(choice):
    (found, values), (expected, theirs) = (
        compared(kind, **CHOICES[choice]) for kind in (ours.DistillerLitModule, Theirs)
    )
    agree(found, expected)
    assert values == pytest.approx(theirs, rel=1e-9)


def test_autogluon_regression_stays_its_own():
    (found, values), (expected, theirs) = (compared(kind, 1) for kind in (ours.DistillerLitModule, Theirs))
    agree(found, expected)
    assert values == theirs


def test_use_mfd_in_autogluon(monkeypatch):
    before = Theirs._compute_soft_label_loss, Theirs._compute_output_feature_loss
    with ours.use_mfd():
        assert Theirs._compute_soft_label_loss is ours.DistillerLitModule._compute_soft_label_loss
        assert Theirs._compute_output_feature_loss is ours.DistillerLitModule._compute_output_feature_loss
        replaced = compared(Theirs)
        with pytest.raises(RuntimeError, match="does not nest"):
            ours.use_mfd().__enter__()
    assert before == (Theirs._compute_soft_label_loss, Theirs._compute_output_feature_loss)
    assert replaced[1] == compared(ours.DistillerLitModule)[1]
