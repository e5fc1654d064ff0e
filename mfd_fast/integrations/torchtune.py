"""torchtune: ``KLLoss`` and ``ChunkedKLLoss``, one YAML key of its distillation recipes.

    kd_loss: {_component_: mfd_fast.integrations.torchtune.ChunkedKLLoss, num_output_chunks: 8}

The same functions as torchtune's ForwardKL-, ReverseKL- and SymmetricKLLoss and their chunked forms: no temperature,
divided by the tokens whose label is not ``ignore_index``. The forward "KL" is *valued* as the cross-entropy
−Σ p log q, so it is larger than KL(p‖q) by the teacher's entropy; the gradient is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.distill_loss import distill_loss, distill_terms
from .shared import require

require("torchtune", "0.6.1", "0.7")

__all__ = ["ChunkedKLLoss", "KLLoss"]

DIVERGENCES = ("forward_kl", "reverse_kl", "symmetric_kl")


class KLLoss(nn.Module):
    """KL of ``[N, C]`` or ``[..., C]`` logits.

    Args:
        divergence: "forward_kl" (torchtune's ForwardKLLoss), "reverse_kl" or "symmetric_kl".
        ignore_index: label of tokens that do not count.
        sym_kd_ratio: r in [0, 1] of "symmetric_kl", r·forward + (1 − r)·reverse.

    Raises:
        ValueError: another divergence or ratio.
    """

    def __init__(self, divergence: str = "forward_kl", ignore_index: int = -100, sym_kd_ratio: float = 0.5) -> None:
        super().__init__()
        if divergence not in DIVERGENCES:
            raise ValueError(f"KLLoss: divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
        if not 0 <= sym_kd_ratio <= 1:
            raise ValueError(f"KLLoss: sym_kd_ratio must be in [0, 1], got {sym_kd_ratio!r}")
        forward = {"forward_kl": 1.0, "reverse_kl": 0.0}.get(divergence, float(sym_kd_ratio))
        self.weights = {"forward_kl": forward, "reverse_kl": 1 - forward}
        self.ignore_index = ignore_index

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        """Mean over the counted tokens, or their sum without ``normalize``; 0 if there are none."""
        mask = labels.reshape(student_logits.shape[:-1]) != self.ignore_index
        teacher_logits = teacher_logits.detach()
        total: Tensor | None = None
        for name, weight in self.weights.items():
            if not weight:
                continue
            if name == "forward_kl":
                # Summed per row: torchtune's value needs the teacher's entropy, which this pass has.
                terms = distill_terms(student_logits, teacher_logits, mask=mask, divergence=name)
                part = weight * (terms.soft.sum() + terms.teacher_entropy.sum())
            else:
                part = distill_loss(
                    student_logits, teacher_logits, mask=mask, divergence=name, soft_weight=weight, reduction="sum"
                )
            total = part if total is None else total + part
        assert total is not None
        return total / mask.sum().clamp(min=1) if normalize else total


class ChunkedKLLoss(KLLoss):
    """:class:`KLLoss` of logits that come in chunks of the sequence, ``num_output_chunks`` tensors ``[B, S_i, C]``."""

    def __init__(
        self,
        num_output_chunks: int = 8,
        divergence: str = "forward_kl",
        ignore_index: int = -100,
        sym_kd_ratio: float = 0.5,
    ) -> None:
        super().__init__(divergence, ignore_index, sym_kd_ratio)
        self.num_output_chunks = num_output_chunks

    def forward(  # type: ignore[override]
        self, student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], labels: Tensor
    ) -> Tensor:
        chunks = labels.chunk(self.num_output_chunks, dim=1)
        parts = [
            super(ChunkedKLLoss, self).forward(*chunk, normalize=False)
            for chunk in zip(student_logits, teacher_logits, chunks, strict=True)
        ]
        return torch.stack(parts).sum() / (labels != self.ignore_index).sum().clamp(min=1)
