"""A small CLIP-like student learns a larger teacher's similarities, features and fusion weights.

    python examples/image_text.py --help

The images are real: scikit-learn's 8 × 8 handwritten digits, half of them hidden by noise. The texts are synthetic: a
sentence about the digit, of which half do not say which ("a digit that somebody wrote"). Teacher and student have a
tower for each, compare them (which text belongs to which image), and fuse both to name the digit. A fusion must see
which of the two to believe. On the same splits a student is trained on labels alone; then with the teacher's softened
outputs; then with its features as well; then also with the weights that its fusion gives to image and text.
"""

from __future__ import annotations

import argparse
import statistics
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import normalize

import mfd_fast as mfd

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CLEAR = ("the digit {}", "a handwritten {}", "somebody wrote {} here", "this is {}")
VAGUE = ("a digit that somebody wrote", "a handwritten digit", "this is a digit", "ink on paper")
WORDS = sorted({word for line in (*CLEAR, *VAGUE) for word in line.split()} - {"{}"} | set(NAMES))
STUDENTS = {
    "labels alone": (0.0, 0.0, 0.0),
    "+ outputs": (1.0, 0.0, 0.0),
    "+ features": (1.0, 0.5, 0.0),
    "+ fusion weights": (1.0, 0.5, 0.5),
}


class Pairs(NamedTuple):
    images: Tensor  # [N, 64]
    texts: Tensor  # [N, words], how often each occurs
    labels: Tensor

    def rows(self, index: Tensor) -> Pairs:
        return Pairs(*(part[index] for part in self))


class Outputs(NamedTuple):
    towers: list[Tensor]  # image and text, [N, width] each
    similarity: Tensor  # [N, N], scaled
    weights: Tensor
    logits: Tensor


def pairs(images: Tensor, labels: Tensor) -> Pairs:
    """Each digit with a sentence. Of image and sentence at least one tells the digit."""
    texts = torch.zeros(len(labels), len(WORDS))
    kind = torch.randint(3, (len(labels),))  # 0: both are clear, 1: the image is noise, 2: the text is vague
    for row, label in enumerate(labels.tolist()):
        lines = VAGUE if kind[row] == 2 else CLEAR
        for word in lines[int(torch.randint(len(lines), ()))].format(NAMES[label]).split():
            texts[row, WORDS.index(word)] += 1
    noise = torch.rand(images.shape)
    return Pairs(torch.where(kind[:, None] == 1, noise, images), texts, labels)


class Clip(nn.Module):
    """Two towers, a learned scale of their similarity, attention over both, a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for size in (64, len(WORDS))
        )
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.pool, self.head = mfd.nn.ModalPool(width, 2), nn.Linear(width, 10)

    def forward(self, batch: Pairs) -> Outputs:
        towers = [tower(x) for tower, x in zip(self.towers, batch[:2], strict=True)]
        image, text = (normalize(x, dim=-1) for x in towers)
        pooled, weights = self.pool(towers)
        return Outputs(towers, self.scale.exp() * image @ text.T, weights, self.head(pooled))


def contrast(similarity: Tensor, labels: Tensor) -> Tensor:
    """CLIP's loss in both directions; all texts of the same digit are right: the target is a distribution."""
    target = torch.zeros_like(similarity).masked_fill(labels[:, None] != labels, float("-inf"))
    return sum((mfd.distill_loss(logits, target) for logits in (similarity, similarity.T)), torch.zeros(())) / 2


def labels_loss(out: Outputs, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(out.logits, labels) + 0.3 * contrast(out.similarity, labels)


def distil_loss(
    model: Clip, lift: nn.Linear, batch: Pairs, taught: Outputs, parts: tuple[float, float, float]
) -> Tensor:
    soft, feature, weight = parts
    out = model(batch)
    fused = mfd.mfd_loss(
        out.towers,
        model.pool.query,
        model.head.weight,
        model.head.bias,
        taught.logits,
        batch.labels,
        bias=model.pool.bias,
        temperature=2.0,
        soft_weight=0.8 * soft,
        hard_weight=1.0 - 0.8 * soft,
        teacher_pool_weights=taught.weights if weight else None,
        pool_weight=weight,
    )
    both = ((out.similarity, taught.similarity), (out.similarity.T, taught.similarity.T))
    relation = sum((mfd.distill_loss(s, t) for s, t in both), torch.zeros(())) / 2
    loss = fused.loss + 0.3 * (soft * relation + (1 - soft) * contrast(out.similarity, batch.labels))
    if feature:
        hints = mfd.feature_loss(out.towers, taught.towers, kind="cosine", projector=[lift.weight] * 2)
        loss = loss + feature * hints
    return loss


def fit(modules: nn.Module, loss_of, data: Pairs, epochs: int) -> None:
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-2, weight_decay=0.05)
    for _ in range(epochs):
        for index in torch.randperm(len(data.labels)).split(64):
            loss = loss_of(data.rows(index))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def accuracy(model: Clip, data: Pairs) -> float:
    with torch.no_grad():
        return 100 * (model(data).logits.argmax(-1) == data.labels).float().mean().item()


def main(seeds: int = 5, epochs: int = 20) -> dict[str, list[float]]:
    """Test accuracy in percent of teacher and students, by seed."""
    torch.set_num_threads(1)  # the tensors are too small for more
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float().flatten(1) / 16, torch.from_numpy(digits.target)
    found: dict[str, list[float]] = {name: [] for name in ("teacher", *STUDENTS)}
    with Progress() as progress:
        task = progress.add_task("distilling", total=seeds * len(STUDENTS))
        for seed in range(seeds):
            torch.manual_seed(seed)
            data, order = pairs(images, labels), torch.randperm(len(labels))
            test, known, few = data.rows(order[:500]), data.rows(order[500:]), data.rows(order[500:800])
            teacher = Clip(64)
            fit(teacher, lambda batch, model=teacher: labels_loss(model(batch), batch.labels), known, epochs)
            teacher.eval().requires_grad_(False)
            found["teacher"].append(accuracy(teacher, test))
            for name, parts in STUDENTS.items():
                torch.manual_seed(seed)
                student, lift = Clip(10), nn.Linear(10, 64, bias=False)

                def loss_of(batch: Pairs, parts=parts, student=student, lift=lift, teacher=teacher) -> Tensor:
                    return distil_loss(student, lift, batch, teacher(batch), parts)

                fit(nn.ModuleList([student, lift]), loss_of, few, 2 * epochs)
                found[name].append(accuracy(student, test))
                progress.advance(task)
    return found


def show(found: dict[str, list[float]]) -> None:
    seeds = len(found["teacher"])
    table = Table(title=f"test accuracy in %, mean of {seeds} seeds ± standard error")
    for name in ("model", "accuracy", "beside labels alone"):
        table.add_column(name)
    for name, each in found.items():
        gain = [a - b for a, b in zip(each, found["labels alone"], strict=True)]
        error = [statistics.stdev(values) / seeds**0.5 if seeds > 1 else 0.0 for values in (each, gain)]
        cells = f"{statistics.mean(each):.1f} ± {error[0]:.1f}", f"{statistics.mean(gain):+.1f} ± {error[1]:.1f}"
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    show(main(**vars(parser.parse_args())))
