"""Stateless layers that Hugging Face ``kernels`` puts in the place of other packages' losses: see ``kernels.py``.

Each has the forward of the module it replaces and reads that module's attributes; it may have no constructor and no
members of its own.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.distill_loss import distill_loss

__all__ = ["ForwardKLLoss", "LogitsDistillationLoss"]


class LogitsDistillationLoss(nn.Module):
    """``modelopt.torch.distill.LogitsDistillationLoss``: T²·KL; "mean" divides by rows and classes."""

    has_backward = True
    can_torch_compile = True
    _temperature: float
    _reduction: str

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        temperature, reduction = self._temperature, self._reduction
        divisors = {"mean": max(logits_s.numel(), 1), "batchmean": max(logits_s.shape[0], 1)}
        return distill_loss(
            logits_s,
            logits_t.detach(),
            temperature=temperature,
            reduction=reduction if reduction in ("none", "sum") else "mean",
            normalizer=divisors.get(reduction),
        )


class ForwardKLLoss(nn.Module):
    """``torchtune.modules.loss.ForwardKLLoss``: KL valued as a cross-entropy, over labels that are not ignored."""

    has_backward = True
    can_torch_compile = True
    ignore_index: int

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        mask = labels.reshape(student_logits.shape[:-1]) != self.ignore_index
        reduction = "mean" if normalize else "sum"
        return distill_loss(
            student_logits, teacher_logits.detach(), mask=mask, divergence="cross_entropy", reduction=reduction
        )
