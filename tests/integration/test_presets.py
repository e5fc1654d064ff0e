"""Each preset against the formula in that library's documentation, and against the package where it is installed.

The comparisons with a package need the extra ``peers`` and are reported as skipped without it; the formulas are
always checked.
"""

import pytest
import torch
import torch.nn.functional as F
from harness import evaluate, on
from op_db import RECORDS

import mfd_fast as mfd
from mfd_fast import presets
from mfd_fast.testing import distill_inputs

RECORD = RECORDS["distill_loss"]


def logits(rows=12, classes=9, dtype=torch.float64):
    made = distill_inputs((rows, classes), dtype=dtype)
    labels = made.labels.clone()
    labels[[2, 7]] = -100
    return made.student, made.teacher, made.labels, labels


def run(call):
    """The loss and the student's gradient of its sum."""
    return evaluate(
        RECORD, on(RECORD, "reference"), call, names=("student",), grad_outputs=lambda t, _: torch.ones_like(t)
    )


def agree(options, formula, labels=None, offset=0.0):
    """Value (but for ``offset``) and gradient of the preset are those of ``formula(student)``."""
    student, teacher, _, _ = logits()
    leaf = student.clone().requires_grad_()
    expected = formula(leaf)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    call = {"student": student, "teacher": teacher, "labels": labels, **options}
    found = run(call)
    torch.testing.assert_close(found.outputs["loss"], expected.detach() - offset)
    torch.testing.assert_close(found.grads["student"], gradient)


def kl(p_logits, q_logits, reduction="batchmean"):
    return F.kl_div(F.log_softmax(q_logits, -1), F.log_softmax(p_logits, -1), reduction=reduction, log_target=True)


def jsd(student, teacher, beta):
    """β KL(p‖m) + (1−β) KL(q‖m) per row, m = βp + (1−β)q; the ends are the two KLs."""
    q, p = F.softmax(student, -1), F.softmax(teacher, -1)
    if beta in (0.0, 1.0):
        first, second = (p, q) if beta == 0 else (q, p)
        return (first * (first / second).log()).sum(-1)
    m = beta * p + (1 - beta) * q
    return (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(-1)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("items", [None, 31.0])
def test_trl(beta, items):
    _, teacher, _, labels = logits()
    counted = labels != -100

    def gkd(student):
        total = jsd(student / 0.9, teacher / 0.9, beta)[counted].sum()
        return total / (counted.sum() if items is None else items)

    agree(presets.trl(beta, 0.9, items), gkd, labels)


def test_trl_scale_and_softcap():
    _, teacher, _, labels = logits()
    counted = labels != -100

    def capped(x, scale, cap):
        return cap * torch.tanh(x * scale / cap)

    options = presets.trl(
        1.0,
        student_logit_scale=0.5,
        teacher_logit_scale=2.0,
        student_final_logit_softcapping=3.0,
        teacher_final_logit_softcapping=5.0,
    )
    agree(options, lambda s: jsd(capped(s, 0.5, 3.0), capped(teacher, 2.0, 5.0), 1.0)[counted].mean(), labels)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_liger(beta):
    _, teacher, _, labels = logits()
    counted = labels != -100

    def loss(student):
        hard = F.cross_entropy(student, labels)
        return 0.5 * hard + 0.5 * jsd(student / 2, teacher / 2, beta)[counted].mean()

    agree(presets.liger(beta=beta, temperature=2.0), loss, labels)
    weights = presets.liger(0.0, 1.0, beta=beta)
    agree(weights, lambda s: jsd(s, teacher, beta)[counted].mean(), labels)


def test_torchdistill():
    _, teacher, labels, _ = logits()
    soft = lambda s: kl(teacher / 4, s / 4)  # noqa: E731
    agree(presets.torchdistill(4.0, alpha=0.3), lambda s: 0.3 * F.cross_entropy(s, labels) + 0.7 * 16 * soft(s), labels)
    both = presets.torchdistill(4.0, alpha=0.5, beta=9.0)
    agree(both, lambda s: 0.5 * F.cross_entropy(s, labels) + 9 * 16 * soft(s), labels)
    for alpha in (None, 0.0):  # KL alone: neither T² nor β
        agree(presets.torchdistill(4.0, alpha=alpha, beta=0.7), soft)
    total = presets.torchdistill(4.0, alpha=0.3, reduction="sum")
    agree(
        total,
        lambda s: 0.3 * F.cross_entropy(s, labels, reduction="sum") + 0.7 * 16 * kl(teacher / 4, s / 4, "sum"),
        labels,
    )

    def standard(x):
        return (x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True))

    options = presets.torchdistill(2.0, alpha=0.5, beta=9.0, standardize=True)
    agree(options, lambda s: 9 * 4 * kl(standard(teacher) / 2, standard(s) / 2), labels)


def dkd(student, teacher, labels, alpha, beta, t):
    """Zhao et al.: T² (α KL of the binary probabilities + β KL without the label's class)."""
    rows, mask = torch.arange(len(labels)), F.one_hot(labels, student.shape[-1]).bool()

    def parts(x):
        p_label = F.softmax(x / t, -1)[rows, labels]
        return torch.stack([p_label, 1 - p_label], -1), F.softmax((x / t)[~mask].reshape(len(x), -1), -1)

    (b_q, q), (b_p, p) = parts(student), parts(teacher)
    value = alpha * (b_p * (b_p / b_q).log()).sum(-1) + beta * (p * (p / q).log()).sum(-1)
    return t**2 * value.mean()


def test_mdistiller():
    _, teacher, labels, _ = logits()
    agree(presets.mdistiller(), lambda s: 0.1 * F.cross_entropy(s, labels) + 0.9 * 16 * kl(teacher / 4, s / 4), labels)
    full = lambda s: F.cross_entropy(s, labels) + dkd(s, teacher, labels, 1.0, 8.0, 4.0)  # noqa: E731
    agree(presets.mdistiller("dkd"), full, labels)
    agree(presets.mdistiller("dkd", epoch=30), full, labels)
    early = lambda s: F.cross_entropy(s, labels) + 0.25 * dkd(s, teacher, labels, 1.0, 8.0, 4.0)  # noqa: E731
    agree(presets.mdistiller("dkd", epoch=5), early, labels)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
def test_modelopt(reduction):
    _, teacher, _, _ = logits()

    def loss(student):
        value = kl(teacher / 3, student / 3, reduction)
        return 9 * (value.sum(-1) if reduction == "none" else value)

    # The documentation of the default: kl_div's "mean", over all elements.
    agree(presets.modelopt(3.0, reduction, classes=9), loss)


@pytest.mark.parametrize(
    ("given", "soft", "hard"),
    [
        ({}, 1.0, 1.0),
        ({"task_loss_weight": 0.3}, 0.7, 0.3),
        ({"distill_loss_weight": 2.0}, 2.0, 1.0),
        ({"distill_loss_weight": 2.0, "task_loss_weight": 0.3}, 2.0, 0.3),
    ],
)
def test_timm(given, soft, hard):
    _, teacher, labels, _ = logits()

    def loss(student):
        return hard * F.cross_entropy(student, labels, label_smoothing=0.1) + soft * 16 * kl(teacher / 4, student / 4)

    agree(presets.timm(4.0, **given, label_smoothing=0.1), loss, labels)


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_torchtune(ratio):
    _, teacher, _, labels = logits()
    counted = labels != -100
    p, log_p = F.softmax(teacher, -1)[counted], F.log_softmax(teacher, -1)[counted]

    def hard(student):
        return (1 - ratio) * F.cross_entropy(student, labels)

    def forward(student):  # "KL" without the teacher's entropy
        return hard(student) - ratio * (p * F.log_softmax(student, -1)[counted]).sum(-1).mean()

    def reverse(student):
        log_q = F.log_softmax(student, -1)[counted]
        return hard(student) + ratio * (log_q.exp() * (log_q - log_p)).sum(-1).mean()

    entropy = -(p * log_p).sum(-1).mean()
    agree(presets.torchtune(kd_ratio=ratio), forward, labels, offset=ratio * entropy)
    agree(presets.torchtune("reverse_kl", kd_ratio=ratio), reverse, labels)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: presets.torchdistill(2.0), "alpha or beta must be given"),
        (lambda: presets.torchdistill(2.0, alpha=0.5, reduction="mean"), "reduction must be 'batchmean' or 'sum'"),
        (lambda: presets.mdistiller("at"), "method must be 'kd' or 'dkd', got 'at'"),
        (lambda: presets.modelopt(), "classes must be given for reduction='mean'"),
        (lambda: presets.modelopt(reduction="avg"), "reduction must be one of"),
        (lambda: presets.torchtune("symmetric_kl"), "loss must be 'forward_kl' or 'reverse_kl'"),
    ],
)
def test_errors_of_presets(call, match):
    with pytest.raises(ValueError, match=f"presets.*{match}"):
        call()


@pytest.mark.parametrize("name", presets.__all__)
def test_modules_take_presets(name):
    """``nn.DistillationLoss(**preset)`` is the function with the preset; ``normalizer`` belongs to the call."""
    given = {"torchdistill": {"temperature": 2.0, "alpha": 0.5}, "modelopt": {"reduction": "batchmean"}}.get(name, {})
    options = getattr(presets, name)(**given)
    student, teacher, labels, _ = logits(dtype=torch.float32)
    expected = mfd.distill_loss(student, teacher, labels, **options)
    assert options.pop("normalizer", None) is None
    torch.testing.assert_close(mfd.nn.DistillationLoss(**options)(student, teacher, labels), expected)


# ------------------------------------------------------------------------------ against the packages themselves


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_against_trl(beta):
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    _, teacher, _, labels = logits()
    for items in (None, 31):
        agree(
            presets.trl(beta, 0.9, items),
            lambda s, n=items: trainer.generalized_jsd_loss(
                s[None], teacher[None], labels[None], beta, 0.9, num_items_in_batch=n
            ),
            labels,
        )


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_against_liger(beta):
    loss = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    student, teacher, _, labels = logits(dtype=torch.float32)
    eye = torch.eye(9)
    leaf = student.clone().requires_grad_()
    expected = loss(beta=beta, temperature=2.0, compiled=False)(leaf, eye.clone(), teacher, eye.clone(), labels)
    (gradient,) = torch.autograd.grad(expected, leaf)
    call = {"student": student, "teacher": teacher, "labels": labels, **presets.liger(beta=beta, temperature=2.0)}
    found = run(call)
    torch.testing.assert_close(found.outputs["loss"], expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.grads["student"], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"alpha": 0.3}, {"alpha": 0.5, "beta": 9.0}, {"beta": 0.7}, {"alpha": 0.0}])
def test_against_torchdistill(options):
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    _, teacher, labels, _ = logits()
    loss = mid_level.KDLoss("m", "output", "m", "output", 4.0, **options)
    agree(
        presets.torchdistill(4.0, **options),
        lambda s: loss({"m": {"output": s}}, {"m": {"output": teacher}}, labels),
        labels,
    )
    standard = mid_level.LogitStdKDLoss("m", "output", "m", "output", 2.0, **options)
    alpha = options.get("alpha") or 0.0
    agree(
        presets.torchdistill(2.0, **options, standardize=True),
        lambda s: (
            standard({"m": {"output": s}}, {"m": {"output": teacher}}, labels) - alpha * F.cross_entropy(s, labels)
        ),
        labels,
    )


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
def test_against_modelopt(reduction):
    losses = pytest.importorskip("modelopt.torch.distill.losses")
    _, teacher, _, _ = logits()
    loss = losses.LogitsDistillationLoss(3.0, reduction)
    agree(presets.modelopt(3.0, reduction, classes=9), lambda s: loss(s, teacher))


@pytest.mark.parametrize("weights", [{}, {"task_loss_weight": 0.3}, {"distill_loss_weight": 2.0}])
def test_against_timm(weights):
    task = pytest.importorskip("timm.task")

    class Head(torch.nn.Module):
        """A "model" whose parameters are the logits themselves."""

        num_classes, in_chans, pretrained_cfg = 9, 3, {"mean": (0.0,) * 3, "std": (1.0,) * 3}

        def __init__(self, values):
            super().__init__()
            self.values = torch.nn.Parameter(values)

        def forward(self, _):
            return self.values

    student, teacher, labels, _ = logits()
    model = Head(student.clone())
    distil = task.LogitDistillationTask(
        model,
        Head(teacher),
        torch.nn.CrossEntropyLoss(),
        temperature=4.0,
        verbose=False,
        dtype=torch.float64,
        **weights,
    )
    loss = distil(torch.zeros(12, 3, 1, 1, dtype=torch.float64), labels)["loss"]
    (gradient,) = torch.autograd.grad(loss, model.values)
    leaf = student.clone().requires_grad_()
    found = mfd.distill_loss(leaf, teacher, labels, **presets.timm(4.0, **weights))
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(torch.autograd.grad(found, leaf)[0], gradient)
