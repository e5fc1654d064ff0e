"""Two sensors of unequal worth: modality dropout and gradient balance keep the weak one of use.

    python examples/audio_visual.py --help

"Video" is real: scikit-learn's 8 × 8 handwritten digits. "Audio" is synthetic: each digit has a chord of three tones,
of which a noisy spectrum is heard. The teacher was trained on both with many labels. The student is small; trained as
usual, it leans on the video, and says little when the camera fails. Three ways to distil it are compared on the same
splits:

- plain: `mfd_loss` on both sensors;
- dropout: `nn.ModalityDropout` hides sensors at random, and `mfd_loss` pools what is left;
- balance: OGM-GE (`mfd.balance`) holds back the gradient of the sensor that is ahead.
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

import mfd_fast as mfd

WAYS = ("plain", "dropout", "balance")
VIDEO, AUDIO = 64, 48
CAMERA_FAILS = torch.tensor([False, True])


class Part(NamedTuple):
    sensors: tuple[Tensor, Tensor]
    labels: Tensor

    def rows(self, index: Tensor) -> Part:
        return Part((self.sensors[0][index], self.sensors[1][index]), self.labels[index])


def record(labels: Tensor, images: Tensor) -> Part:
    """The digits with a synthetic sound: three of 48 frequencies a class, in noise."""
    tones = torch.stack([torch.randperm(AUDIO)[:3] for _ in range(10)])
    sound = torch.randn(len(labels), AUDIO)
    sound.scatter_add_(1, tones[labels], torch.full((len(labels), 3), 1.3))
    return Part((images, sound), labels)


class Fused(nn.Module):
    """An encoder and a head of its own per sensor, attention over the sensors, a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (VIDEO, AUDIO)
        self.encoders = nn.ModuleList(
            nn.Sequential(nn.Linear(n, width), nn.GELU(), nn.Linear(width, width)) for n in sizes
        )
        self.pool, self.head = mfd.nn.ModalPool(width, 2), nn.Linear(width, 10)
        self.single = nn.ModuleList(nn.Linear(width, 10) for _ in range(2))

    def features(self, sensors: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [encoder(x) for encoder, x in zip(self.encoders, sensors, strict=True)]

    def forward(self, sensors: tuple[Tensor, Tensor], present: Tensor | None = None) -> Tensor:
        return self.head(self.pool(self.features(sensors), present).pooled)


def batches(part: Part, size: int, epochs: int) -> list[Part]:
    return [part.rows(i) for _ in range(epochs) for i in torch.randperm(len(part.labels)).split(size)]


def train_teacher(part: Part, epochs: int) -> Fused:
    model = Fused(64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in batches(part, 64, epochs):
        present = torch.rand(len(batch.labels), 2) < 0.8  # so that it knows both sensors
        present[~present.any(-1)] = True
        loss = nn.functional.cross_entropy(model(batch.sensors, present), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def distil(way: str, teacher: Fused, part: Part, epochs: int) -> Fused:
    student = Fused(12)
    criterion = mfd.nn.MFDLoss(temperature=2.0, soft_weight=0.8, hard_weight=0.2)
    drop = mfd.nn.ModalityDropout(2, p=[0.4, 0.1])
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    modulation = mfd.balance.GradientModulation([encoder.parameters() for encoder in student.encoders])
    for batch in batches(part, 64, epochs):
        with torch.no_grad():
            teacher_logits = teacher(batch.sensors)
        features, present = student.features(batch.sensors), None
        if way == "dropout":
            features, present = drop(features)
        extra = torch.zeros(())
        if way == "balance":
            own = [head(x) for head, x in zip(student.single, features, strict=True)]
            seen = mfd.balance.modality_statistics([logits.detach() for logits in own], batch.labels)
            modulation.set(mfd.balance.ogm_coefficients(seen.label_prob, alpha=0.5))
            extra = sum((nn.functional.cross_entropy(logits, batch.labels) for logits in own), extra)
        out = criterion(
            features,
            student.pool.query,
            student.head.weight,
            student.head.bias,
            teacher_logits,
            batch.labels,
            bias=student.pool.bias,
            present=present,
        )
        optimizer.zero_grad()
        (out.loss + 0.5 * extra).backward()
        optimizer.step()
    modulation.remove()
    return student.eval()


def accuracies(model: Fused, part: Part) -> dict[str, float]:
    with torch.no_grad():
        both = model(part.sensors)
        audio = model(part.sensors, CAMERA_FAILS.expand(len(part.labels), 2))
    return {
        name: 100 * (logits.argmax(-1) == part.labels).float().mean().item()
        for name, logits in (("both", both), ("audio alone", audio))
    }


def main(seeds: int = 5, epochs: int = 25) -> dict[str, dict[str, list[float]]]:
    """Test accuracy in percent by way, by sensors, by seed."""
    torch.set_num_threads(1)  # the tensors are too small for more
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float().flatten(1) / 16, torch.from_numpy(digits.target)
    found: dict[str, dict[str, list[float]]] = {way: {} for way in ("teacher", *WAYS)}
    with Progress() as progress:
        task = progress.add_task("distilling", total=seeds * len(WAYS))
        for seed in range(seeds):
            torch.manual_seed(seed)
            data, order = record(labels, images), torch.randperm(len(labels))
            test, many, few = data.rows(order[:500]), data.rows(order[500:]), data.rows(order[500:900])
            models = {"teacher": train_teacher(many, epochs)}
            for way in WAYS:
                torch.manual_seed(seed)
                models[way] = distil(way, models["teacher"], few, epochs)
                progress.advance(task)
            for way, model in models.items():
                for name, value in accuracies(model, test).items():
                    found[way].setdefault(name, []).append(value)
    return found


def show(found: dict[str, dict[str, list[float]]]) -> None:
    seeds = len(found["plain"]["both"])
    table = Table(title=f"test accuracy in %, mean of {seeds} seeds ± standard error")
    for name in ("", "both sensors", "audio alone (the camera fails)"):
        table.add_column(name, justify="left" if not name else "right")
    for way, values in found.items():
        cells = []
        for each in values.values():
            error = statistics.stdev(each) / seeds**0.5 if seeds > 1 else float("nan")
            cells.append(f"{statistics.mean(each):.1f} ± {error:.1f}")
        table.add_row(way, *cells)
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=25)
    show(main(**vars(parser.parse_args())))
