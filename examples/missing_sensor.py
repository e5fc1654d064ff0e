"""A teacher with three sensors, a student with two: what the third knew comes through the teacher.

    python examples/missing_sensor.py --help

The data are real: 569 tumours of scikit-learn's breast cancer set. Of ten properties of the cell nuclei it has the
mean, the standard error and the worst value; here each is taken for a sensor. The student lacks "worst", the best of
the three. Few tumours have a diagnosis that the student may see; of the others it gets the teacher's opinion, which
is what distillation is for. Four students are trained on the same splits: on the few diagnoses alone, with the
teacher's logits, with its logits and its pooled features, and, as a limit, with all diagnoses.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

import mfd_fast as mfd

SENSORS = ("mean", "error", "worst")
STUDENTS = ("few labels alone", "+ teacher's logits", "+ its features", "all labels")


class Fused(nn.Module):
    """The sensors that it has, projected and pooled by attention; a head."""

    def __init__(self, sensors: int, width: int) -> None:
        super().__init__()
        self.sensors = sensors
        self.encoders = nn.ModuleList(nn.Sequential(nn.Linear(10, width), nn.GELU()) for _ in range(sensors))
        self.pool, self.head = mfd.nn.ModalPool(width, sensors), nn.Linear(width, 2)

    def features(self, x: Tensor) -> list[Tensor]:
        return [self.encoders[m](x[:, m]) for m in range(self.sensors)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.pool(self.features(x)).pooled
        return self.head(pooled), pooled


def fit(model: nn.Module, loss_of: Callable[[Tensor], Tensor], rows: int, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)
    for _ in range(epochs):
        for batch in torch.randperm(rows).split(64):
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def train_teacher(x: Tensor, y: Tensor, epochs: int) -> Fused:
    teacher = Fused(3, 64)
    fit(teacher, lambda batch: nn.functional.cross_entropy(teacher(x[batch])[0], y[batch]), len(y), epochs)
    return teacher.eval()


def distil(name: str, teacher: Fused, x: Tensor, y: Tensor, few: int, epochs: int) -> Fused:
    student = Fused(2, 16)
    lift = nn.Linear(16, teacher.head.in_features, bias=False)  # the student's features in the teacher's space
    labels = y if name == "all labels" else torch.where(torch.arange(len(y)) < few, y, -100)
    with torch.no_grad():
        teacher_logits, teacher_features = teacher(x)

    def loss_of(batch: Tensor) -> Tensor:
        logits, pooled = student(x[batch])
        if name in ("few labels alone", "all labels"):
            return mfd.distill_loss(logits, None, labels[batch], soft_weight=0.0, hard_weight=1.0)
        # Few rows have a label; the others keep the teacher's term.
        loss = mfd.distill_loss(
            logits,
            teacher_logits[batch],
            labels[batch],
            temperature=2.0,
            soft_weight=0.9,
            hard_weight=0.1,
            ignored_labels="term",
        )
        if name == "+ its features":
            match = mfd.feature_loss(pooled, teacher_features[batch], kind="cosine", projector=lift.weight)
            loss = loss + 0.1 * match
        return loss

    fit(nn.ModuleList([student, lift]), loss_of, len(x), epochs)
    return student.eval()


def accuracy(model: Fused, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * (model(x)[0].argmax(-1) == y).float().mean().item()


def main(seeds: int = 10, epochs: int = 40, few: int = 20) -> dict[str, list[float]]:
    """Test accuracy in percent of teacher and students, by seed."""
    torch.set_num_threads(1)  # the tensors are too small for more
    data = load_breast_cancer()
    x = torch.from_numpy(data.data).float().view(-1, 3, 10)
    y = torch.from_numpy(data.target)
    found: dict[str, list[float]] = {name: [] for name in ("teacher", *STUDENTS)}
    for seed in track(range(seeds), "distilling"):
        torch.manual_seed(seed)
        order = torch.randperm(len(y))
        test, known = order[:200], order[200:]
        scaled = (x - x[known].mean(0)) / x[known].std(0)
        a, b = scaled[known], y[known]
        teacher = train_teacher(a, b, epochs)
        found["teacher"].append(accuracy(teacher, scaled[test], y[test]))
        for name in STUDENTS:
            torch.manual_seed(seed)
            student = distil(name, teacher, a, b, few, epochs)
            found[name].append(accuracy(student, scaled[test], y[test]))
    return found


def show(found: dict[str, list[float]]) -> None:
    seeds = len(found["teacher"])
    table = Table(title=f"test accuracy in %, mean of {seeds} seeds ± standard error")
    table.add_column("model")
    table.add_column("sensors")
    table.add_column("accuracy", justify="right")
    table.add_column("beside few labels alone", justify="right")
    for name, each in found.items():
        gain = [a - b for a, b in zip(each, found["few labels alone"], strict=True)]
        cells = [
            f"{sign}{statistics.mean(values):.1f} ± {statistics.stdev(values) / seeds**0.5 if seeds > 1 else 0:.1f}"
            for sign, values in (("", each), ("+" if statistics.mean(gain) > 0 else "", gain))
        ]
        table.add_row(name, ", ".join(SENSORS if name == "teacher" else SENSORS[:2]), *cells)
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--few", type=int, default=20, help="diagnoses that the student may see")
    show(main(**vars(parser.parse_args())))
