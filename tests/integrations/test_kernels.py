"""Hugging Face kernels: layers of the installed package in the place of ModelOpt's and torchtune's."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from trainer_steps import agree, steps

from kernels import Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping
from mfd_fast.integrations.kernels import MAPPING, InstalledLayer, extend

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
MODE = Mode.TRAINING | Mode.TORCH_COMPILE


@use_kernel_forward_from_hub("LogitsDistillationLoss")
class LogitsDistillationLoss(nn.Module):
    """ModelOpt's definition, in a class of one's own."""

    def __init__(self, temperature=1.0, reduction="mean"):
        super().__init__()
        self._temperature, self._reduction = temperature, reduction

    def forward(self, logits_s, logits_t):
        p, q = (torch.softmax(x / self._temperature, -1) for x in (logits_t, logits_s))
        loss = nn.functional.kl_div(q.log(), p, reduction=self._reduction) * self._temperature**2
        return loss.sum(-1) if self._reduction == "none" else loss


@use_kernel_forward_from_hub("ForwardKLLoss")
class ForwardKLLoss(nn.Module):
    def __init__(self, ignore_index=-100):
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, student_logits, teacher_logits, labels, normalize=True):
        x = (torch.softmax(teacher_logits, -1) * torch.log_softmax(student_logits, -1)).sum(-1)
        mask = labels != self.ignore_index
        return -(x * mask).sum() / (mask.sum() if normalize else 1)


def kernelized(module):
    with use_kernel_mapping(MAPPING):
        return kernelize(module, mode=MODE, device="cpu", use_fallback=False)


def compared(module, *more):
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    holder = nn.Module()
    holder.logits = nn.Parameter(student)
    return steps(holder, lambda _: module(holder.logits, teacher, *more))


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_kernels_serves_logits_distillation(reduction):
    plain, served = LogitsDistillationLoss(2.0, reduction), kernelized(LogitsDistillationLoss(2.0, reduction))
    agree(compared(served), compared(plain))


def test_kernels_serves_unreduced_losses():
    x, y = torch.randn(2, 6, 9, dtype=torch.float64)
    served = kernelized(LogitsDistillationLoss(2.0, "none"))
    torch.testing.assert_close(served(x, y), LogitsDistillationLoss(2.0, "none")(x, y))


def test_kernels_serves_forward_kl():
    labels = torch.tensor([0, -100, 3, 4, -100, 8])
    for normalize in (True, False):
        found, expected = (compared(m, labels, normalize) for m in (kernelized(ForwardKLLoss()), ForwardKLLoss()))
        agree(found, expected)
    x, y = torch.randn(2, 6, 9, dtype=torch.float64)
    torch.testing.assert_close(kernelized(ForwardKLLoss())(x, y, labels), ForwardKLLoss()(x, y, labels))


def test_kernels_extends_a_class_of_modelopt():
    from modelopt.torch.distill.losses import LogitsDistillationLoss as ModelOptLoss

    theirs = type("LogitsDistillationLoss", (ModelOptLoss,), {})  # a class to extend; the package's own is left alone
    served = kernelized(extend(theirs)(3.0, "batchmean"))
    assert served.forward.__func__.__module__ == "mfd_fast.integrations.layers"
    agree(compared(served), compared(ModelOptLoss(3.0, "batchmean")))
    with pytest.raises(ValueError, match="no layer for Linear, only for ForwardKLLoss, LogitsDistillationLoss"):
        extend(nn.Linear)


def test_the_lines_of_the_page(monkeypatch):
    """Three of them, on ModelOpt's own class."""
    from modelopt.torch.distill import LogitsDistillationLoss as ModelOptLoss

    for name in ("kernel_layer_name", "kernel_condition"):  # what extend sets goes with the test
        monkeypatch.setattr(ModelOptLoss, name, None, raising=False)
        monkeypatch.delattr(ModelOptLoss, name)
    (row,) = re.findall(r"^\| kernels [\d.]+ \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    lines = re.findall(r"`([^`]+)`", row)  # all they need beside themselves is the class and a loss
    assert len(lines) == 3
    loss = ModelOptLoss(2.0, "batchmean")
    exec("\n".join(lines), {"LogitsDistillationLoss": ModelOptLoss, "loss": loss})
    assert loss.forward.__func__.__module__ == "mfd_fast.integrations.layers"
    agree(compared(loss), compared(ModelOptLoss(2.0, "batchmean")))


def test_kernels_finds_equal_layers_once():
    assert InstalledLayer("ForwardKLLoss") == MAPPING["ForwardKLLoss"]["cpu"] == MAPPING["ForwardKLLoss"]["cuda"]
    assert InstalledLayer("ForwardKLLoss").load() is MAPPING["ForwardKLLoss"]["cpu"].load()
