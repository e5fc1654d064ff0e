"""torchdistill: its losses against ours, from YAML to the parameters."""

import pytest
import torch
import yaml
from torch import nn
from torchdistill.core.distillation import get_distillation_box
from torchdistill.losses.mid_level import KDLoss, LogitStdKDLoss
from torchdistill.losses.registry import get_mid_level_loss
from trainer_steps import agree, gradients, steps

from mfd_fast.integrations.torchdistill import MfdFeatureLoss, MfdKDLoss, MfdLogitStdKDLoss

PATHS = dict.fromkeys(("student_module_path", "teacher_module_path"), ".")
PATHS |= dict.fromkeys(("student_module_io", "teacher_module_io"), "output")


def io(value):
    return {".": {"output": value}}


class Student(nn.Module):
    """A logit map [N, C, ...] that is its own parameter."""

    def __init__(self, shape):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def three(loss, shape, targets):
    teacher = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model, values = Student(shape), []

    def step(_):
        values.append(loss(io(model.logits), io(teacher), targets))
        return values[-1]

    return steps(model, step), [value.item() for value in values]


@pytest.mark.parametrize(("ours", "theirs"), [(MfdKDLoss, KDLoss), (MfdLogitStdKDLoss, LogitStdKDLoss)])
@pytest.mark.parametrize("alpha", [0, 0.3, None])
@pytest.mark.parametrize("beta", [None, 9.0])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize("labelled", [True, False])
def test_torchdistill_classification(ours, theirs, alpha, beta, reduction, labelled):
    if alpha is None and beta is None:
        for kind in (ours, theirs):
            with pytest.raises(TypeError):
                kind(**PATHS, temperature=4.0)
        beta = 1.0
    targets = torch.tensor([0, 3, -100, 9, 2, 5]) if labelled else None
    options = PATHS | {"temperature": 4.0, "alpha": alpha, "beta": beta, "reduction": reduction}
    found, expected = (three(kind(**options), (6, 10), targets) for kind in (ours, theirs))
    agree(found[0], expected[0])
    assert found[1] == pytest.approx(expected[1], rel=1e-9)


@pytest.mark.parametrize("alpha", [0, 0.3])
@pytest.mark.parametrize("more", [{"weight": torch.linspace(0.2, 1, 5).double()}, {"label_smoothing": 0.1}], ids=str)
def test_torchdistill_segmentation(alpha, more):
    """The KL is divided by N, the cross-entropy by the labelled pixels."""
    shape = (2, 5, 4, 3)
    targets = torch.randint(0, 5, (2, 4, 3))
    targets[0, :2] = 255
    options = PATHS | {"temperature": 2.0, "alpha": alpha, "ignore_index": 255} | more
    found, expected = (three(kind(**options), shape, targets) for kind in (MfdKDLoss, KDLoss))
    agree(found[0], expected[0])
    assert found[1] == pytest.approx(expected[1], rel=1e-9)


def test_torchdistill_without_a_label():
    """The cross-entropy of no labels is 0; torch's mean is NaN."""
    options = PATHS | {"temperature": 4.0, "alpha": 0.3}
    found, values = three(MfdKDLoss(**options), (6, 10), torch.full((6,), -100))
    expected, soft = three(KDLoss(**options), (6, 10), None)  # the KL alone, without T² and β
    assert values[0] == pytest.approx(0.7 * 16 * soft[0], rel=1e-9)
    agree(found[:1], [{"logits": 0.7 * 16 * expected[0]["logits"]}])


@pytest.mark.parametrize("kind", [MfdKDLoss, MfdLogitStdKDLoss])
@pytest.mark.parametrize("alpha", [0, 0.3])
def test_torchdistill_classes_that_differ(kind, alpha):
    with pytest.raises(ValueError, match="teacher must have as many classes as student, got 9 and 7"):
        kind(**PATHS, temperature=4.0, alpha=alpha)(io(torch.randn(2, 7)), io(torch.randn(2, 9)), torch.tensor([1, 2]))


def test_torchdistill_soft_targets():
    targets = torch.rand(6, 10, dtype=torch.float64).softmax(-1)
    options = PATHS | {"temperature": 4.0, "alpha": 0.5, "label_smoothing": 0.1}
    found, expected = (three(kind(**options), (6, 10), targets)[0] for kind in (MfdKDLoss, KDLoss))
    agree(found, expected)


class Net(nn.Module):
    def __init__(self, seed, width):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU())
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


CONFIG = """
criterion:
  key: WeightedSumLoss
  kwargs:
    sub_terms:
      kd:
        weight: 1.0
        criterion:
          key: {loss}
          kwargs: {{student_module_path: '.', student_module_io: output, teacher_module_path: '.',
                   teacher_module_io: output, temperature: 4.0, alpha: 0.3}}
      feature: &feature
        weight: 0.5
        criterion:
          key: MfdFeatureLoss
          kwargs:
            channels_first: true
            projections: [[6, 8]]
            taps: [{{student_module_path: body, student_module_io: output, teacher_module_path: body,
                    teacher_module_io: output}}]
teacher: {{forward_hook: {{output: ['body']}}, forward_proc: forward_batch_only, requires_grad: false}}
student: {{forward_hook: {{output: ['body']}}, forward_proc: forward_batch_only}}
optimizer: {{key: SGD, kwargs: {{lr: 0.1}}}}
num_epochs: 1
"""


def boxed(loss):
    """Three steps of torchdistill's own box, configured by YAML."""
    config = yaml.safe_load(CONFIG.format(loss=loss))
    student = Net(0, 6).double()
    torch.manual_seed(3)
    box = get_distillation_box(Net(1, 8).double(), student, {}, config, torch.device("cpu"), None, False, 1)
    torch.manual_seed(4)
    found = []
    for _ in range(3):
        images, targets = torch.randn(5, 3, 7, 7, dtype=torch.float64), torch.randint(0, 4, (5,))
        loss_value = box.forward_process(images, targets, {})
        torch.autograd.backward(loss_value, retain_graph=True)
        found.append(gradients(student))
        student.zero_grad()
        box.post_forward_process(loss_value)
    return found


def test_torchdistill_from_yaml():
    from torchdistill.common.main_util import import_dependencies

    import_dependencies([{"name": "mfd_fast.integrations.torchdistill"}])
    agree(boxed("MfdKDLoss"), boxed("KDLoss"))


def test_torchdistill_features():
    taps = [PATHS | dict.fromkeys(("student_module_path", "teacher_module_path"), path) for path in "ab"]
    loss = get_mid_level_loss({"key": "MfdFeatureLoss", "kwargs": {"taps": taps, "weight": [1.0, 2.0]}})
    student = {p: {"output": torch.randn(3, 4, requires_grad=True)} for p in "ab"}
    teacher = {p: {"output": torch.randn(3, 4, requires_grad=True)} for p in "ab"}
    value = loss(student, teacher, None)
    pairs = [(student[p]["output"], teacher[p]["output"]) for p in "ab"]
    expected = sum(w * nn.functional.mse_loss(s, t) for w, (s, t) in zip((1, 2), pairs, strict=True))
    torch.testing.assert_close(value, expected)
    value.backward()
    assert teacher["a"]["output"].grad is None
    with pytest.raises(ValueError, match="taps must name at least one"):
        MfdFeatureLoss([])


def test_torchdistill_refuses():
    logits = io(torch.randn(2, 5, 3))
    with pytest.raises(ValueError, match="reduction must be batchmean, mean or sum, got 'none'"):
        MfdKDLoss(**PATHS, temperature=1.0, alpha=0, reduction="none")(logits, logits)
    with pytest.raises(ValueError, match=r"logits must be \[N, C\]"):
        MfdLogitStdKDLoss(**PATHS, temperature=1.0, alpha=0)(logits, logits)
    with pytest.raises(ValueError, match="eps must be 1e-7"):
        MfdLogitStdKDLoss(**PATHS, temperature=1.0, alpha=0, eps=1e-5)
