"""torchtune: ``KLLoss`` and ``ChunkedKLLoss``, one YAML key of its distillation recipes.

    kd_loss: {_component_: mfd_fast.integrations.torchtune.ChunkedKLLoss, num_output_chunks: 8}

The same functions as torchtune's ForwardKL-, ReverseKL- and SymmetricKLLoss and their chunked forms: no temperature,
divided by the tokens whose label is not ``ignore_index``. The forward "KL" is *valued* as the cross-entropy
−Σ p log q, so it is larger than KL(p‖q) by the teacher's entropy; the gradient is the same.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ..ops.distill_loss import distill_loss
from .shared import check_signature, require

require("torchtune", "0.6.1", "0.7")

__all__ = ["ChunkedKLLoss", "KLLoss"]


def _its_losses() -> ModuleType:
    """torchtune's losses from their file, which imports torch alone: the package needs torchao."""
    package = importlib.util.find_spec("torchtune")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0], "modules", "loss", "kd_losses.py")
    spec = importlib.util.spec_from_file_location("mfd_fast_torchtune_kd_losses", path)
    if spec is None or spec.loader is None or not path.exists():
        raise ImportError(f"mfd_fast.integrations: torchtune has no {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check_recipe(losses: ModuleType) -> None:
    """The recipes call whatever their YAML names as they call torchtune's own."""
    call = "self, student_logits, teacher_logits, labels"
    for name in ("Forward", "Reverse", "Symmetric"):
        check_signature(getattr(losses, f"{name}KLLoss").forward, f"{call}, normalize")
        check_signature(getattr(losses, f"{name}KLWithChunkedOutputLoss").forward, call)


_check_recipe(_its_losses())

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
        self.weights = {"cross_entropy": forward, "reverse_kl": 1 - forward}
        self.ignore_index = ignore_index

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        """Mean over the counted tokens, or their sum without ``normalize``; 0 if there are none."""
        mask = labels.reshape(student_logits.shape[:-1]) != self.ignore_index
        reduction = "mean" if normalize else "sum"
        parts = [
            distill_loss(
                student_logits,
                teacher_logits.detach(),
                mask=mask,
                divergence=name,
                soft_weight=weight,
                reduction=reduction,
            )
            for name, weight in self.weights.items()
            if weight
        ]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


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
