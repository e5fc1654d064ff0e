"""The loss of each trainer against ours: forward and backward, one process, interleaved.

    make trainers ARGS=--collect-only      # once: makes the environment
    build/trainers-venv/bin/python -m benchmarks.trainer_losses [--rounds 15] [name ...]

Prints a row of the table in docs/trainers.md per trainer: median milliseconds of theirs and ours, their ratio, and the
most memory that one step holds beyond its inputs, as PyTorch's profiler counts it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfd_fast.bench.memory import peak_extra_bytes

Step = Callable[[], Any]
VOCABULARY = 32000


def logits(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    student = torch.randn(rows, classes, dtype=dtype, requires_grad=True)
    return student, torch.randn(rows, classes, dtype=dtype), torch.randint(0, classes, (rows,))


def backward(loss: Callable[[], Tensor], *leaves: Tensor) -> Step:
    def step() -> None:
        loss().backward()
        for leaf in leaves:
            leaf.grad = None

    return step


def transformers() -> tuple[Step, Step]:
    """No distillation of the Trainer's own: what its users write."""
    from mfd_fast import distill_loss
    from mfd_fast.integrations import shift_labels

    student, teacher, labels = (x.unsqueeze(0) for x in logits(512, VOCABULARY))
    student = student.detach().requires_grad_()

    def eager() -> Tensor:
        x, y = student[:, :-1].reshape(-1, VOCABULARY), teacher[:, :-1].reshape(-1, VOCABULARY)
        soft = F.kl_div(F.log_softmax(x / 2, -1), F.softmax(y / 2, -1), reduction="batchmean")
        return 0.7 * 4 * soft + 0.3 * F.cross_entropy(x, labels[:, 1:].reshape(-1))

    def ours() -> Tensor:
        shifted = shift_labels(labels)
        return distill_loss(student, teacher, shifted, temperature=2.0, soft_weight=0.7, hard_weight=0.3)

    return backward(eager, student), backward(ours, student)


def trl_distillation() -> tuple[Step, Step]:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    from mfd_fast.integrations.trl import chunked_divergence_loss

    hidden = torch.randn(1, 512, 512, requires_grad=True)
    head = (torch.randn(VOCABULARY, 512) * 0.05).requires_grad_()
    rest = torch.randn(1, 512, 1024), torch.randn(VOCABULARY, 1024) * 0.05, torch.ones(1, 512)
    call = (hidden, rest[0], head, rest[1], rest[2], 1.0)
    both = (_chunked_divergence_loss, chunked_divergence_loss)
    return tuple(backward(lambda loss=loss: loss(*call)[0], hidden, head) for loss in both)  # type: ignore[return-value, misc]


def trl_gkd(dtype: torch.dtype = torch.float32) -> tuple[Step, Step]:
    from mfd_fast.integrations.trl import _GKD_JSD, GKDTrainer

    student, teacher, labels = logits(512, VOCABULARY, dtype)
    both = (_GKD_JSD, GKDTrainer.generalized_jsd_loss)
    return tuple(backward(lambda loss=loss: loss(student, teacher, labels, 0.5), student) for loss in both)  # type: ignore[return-value, misc]


def modelopt() -> tuple[Step, Step]:
    from modelopt.torch.distill import LogitsDistillationLoss as Theirs

    from mfd_fast.integrations.modelopt import LogitsDistillationLoss

    student, teacher, _ = logits(512, VOCABULARY)
    both = (Theirs(2.0), LogitsDistillationLoss(2.0))
    return tuple(backward(lambda loss=loss: loss(student, teacher), student) for loss in both)  # type: ignore[return-value, misc]


def torchdistill(shape: tuple[int, ...] = (64, 1000)) -> tuple[Step, Step]:
    from torchdistill.losses.mid_level import KDLoss

    from mfd_fast.integrations.torchdistill import MfdKDLoss

    student = torch.randn(shape, requires_grad=True)
    teacher, targets = torch.randn(shape), torch.randint(0, shape[1], (shape[0], *shape[2:]))
    both = [kind(".", "o", ".", "o", temperature=4.0, alpha=0.3) for kind in (KDLoss, MfdKDLoss)]
    sides = {".": {"o": student}}, {".": {"o": teacher}}
    return tuple(backward(lambda loss=loss: loss(*sides, targets), student) for loss in both)  # type: ignore[return-value, misc]


class Logits(nn.Module):
    """A timm model of nothing but its output."""

    num_classes, in_chans = 1000, 3
    pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(64, 1000))

    def forward(self, _: Tensor) -> Tensor:
        return self.logits


def timm() -> tuple[Step, Step]:
    from timm.task import LogitDistillationTask as Theirs

    from mfd_fast.integrations.timm import LogitDistillationTask

    student, teacher = Logits(), Logits().requires_grad_(False)
    image, target = torch.zeros(1), torch.randint(0, 1000, (64,))
    both = [
        kind(student, teacher, nn.CrossEntropyLoss(), temperature=4.0, verbose=False)
        for kind in (Theirs, LogitDistillationTask)
    ]
    return tuple(backward(lambda task=task: task(image, target)["loss"], student.logits) for task in both)  # type: ignore[return-value, misc]


def torchtune() -> tuple[Step, Step]:
    from mfd_fast.integrations.torchtune import KLLoss, _its_losses

    student, teacher, labels = logits(512, VOCABULARY)
    both = (_its_losses().ForwardKLLoss(), KLLoss())
    return tuple(backward(lambda loss=loss: loss(student, teacher, labels), student) for loss in both)  # type: ignore[return-value, misc]


def open_clip() -> tuple[Step, Step]:
    from open_clip.loss import DistillClipLoss as Theirs

    from mfd_fast.integrations.open_clip import DistillClipLoss

    image, text = (F.normalize(torch.randn(1024, 512), dim=-1).requires_grad_() for _ in range(2))
    dist = [F.normalize(torch.randn(1024, 768), dim=-1) for _ in range(2)]
    both = (Theirs(), DistillClipLoss())
    return tuple(backward(lambda loss=loss: sum(loss(image, text, 100.0, *dist, 100.0)), image, text) for loss in both)  # type: ignore[return-value, misc]


def sentence_transformers() -> tuple[Step, Step]:
    from sentence_transformers.sentence_transformer import losses

    from mfd_fast.integrations.sentence_transformers import EmbedDistillLoss

    student = [torch.randn(256, 768, requires_grad=True) for _ in range(3)]
    teacher = [torch.randn(256, 768) for _ in range(3)]
    both = [kind(nn.Identity(), "cosine") for kind in (losses.EmbedDistillLoss, EmbedDistillLoss)]
    return tuple(
        backward(lambda loss=loss: loss.compute_loss_from_embeddings(student, teacher), *student) for loss in both
    )  # type: ignore[return-value, misc]


CASES: dict[str, tuple[str, Callable[[], tuple[Step, Step]]]] = {
    "transformers": ("Trainer, eager KL + CE, 512 × 32000", transformers),
    "trl-distillation": ("TRL DistillationTrainer, 512 × (512, 1024) × 32000", trl_distillation),
    "trl-gkd": ("TRL GKDTrainer β = 0.5, 512 × 32000", trl_gkd),
    "trl-gkd-bf16": ("the same in bfloat16", lambda: trl_gkd(torch.bfloat16)),
    "modelopt": ('ModelOpt LogitsDistillationLoss "mean", 512 × 32000', modelopt),
    "torchdistill": ("torchdistill KDLoss, 64 × 1000", torchdistill),
    "torchdistill-maps": ("torchdistill KDLoss, 4 × 21 × 128 × 128", lambda: torchdistill((4, 21, 128, 128))),
    "timm": ("timm LogitDistillationTask, 64 × 1000", timm),
    "torchtune": ("torchtune ForwardKLLoss, 512 × 32000", torchtune),
    "open_clip": ("OpenCLIP DistillClipLoss, 1024 pairs × (512, 768)", open_clip),
    "sentence_transformers": ("Sentence Transformers EmbedDistillLoss, 3 × 256 × 768", sentence_transformers),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *CASES], default=[])
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    torch.set_num_threads(2)
    print("| loss, forward and backward | theirs ms | ours ms | theirs / ours | theirs MiB | ours MiB |")
    print("|---|---|---|---|---|---|")
    for name in asked.names or CASES:
        torch.manual_seed(0)
        title, make = CASES[name]
        steps = make()
        times: tuple[list[float], list[float]] = ([], [])
        for round_ in range(asked.rounds + 2):
            for step, found in zip(steps, times, strict=True):
                begin = time.perf_counter()
                step()
                if round_ >= 2:
                    found.append(time.perf_counter() - begin)
        theirs, ours = (1e3 * statistics.median(found) for found in times)
        ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
        memory = ((peak_extra_bytes(step, torch.device("cpu")) or 0) / 2**20 for step in steps)
        peaks = " | ".join(f"{value:.1f}" for value in memory)
        print(f"| {title} | {theirs:.2f} | {ours:.2f} | {ratio:.1f} | {peaks} |", flush=True)


if __name__ == "__main__":
    main()
