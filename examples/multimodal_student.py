"""A multimodal student from scratch: two "sensors" of handwritten digits, and a student that may lose one of them.

    python examples/multimodal_student.py

The sensors are the left and the right half of scikit-learn's 8 × 8 digits. The teacher fuses both by attention; the
student has an eighth of its width and sees every fourth image without its right half. One call of `mfd_loss` a step
pools the modalities, applies the head, and compares with the teacher's logits, its features and the labels.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import mfd_fast as mfd


class Fused(nn.Module):
    """An encoder per modality, attention over the modalities, a linear head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Sequential(nn.Linear(32, width), nn.GELU()) for _ in range(2))
        self.pool = mfd.nn.ModalPool(width, 2)
        self.head = nn.Linear(width, 10)

    def features(self, sensors: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [encoder(x) for encoder, x in zip(self.encoders, sensors, strict=True)]

    def forward(self, sensors: tuple[Tensor, Tensor], present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pooled, _ = self.pool(self.features(sensors), present)
        return self.head(pooled), pooled


def halves(images: Tensor) -> tuple[Tensor, Tensor]:
    return images[:, :, :4].flatten(1), images[:, :, 4:].flatten(1)


def accuracy(model: Fused, images: Tensor, labels: Tensor, present: Tensor | None = None) -> float:
    with torch.no_grad():
        return (model(halves(images), present)[0].argmax(-1) == labels).float().mean().item()


def main(epochs: int = 12, seed: int = 0) -> dict[str, float]:
    torch.manual_seed(seed)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float() / 16
    labels = torch.from_numpy(digits.target)
    order = torch.randperm(len(images))
    train, test = order[:1257], order[1257:]

    teacher, student = Fused(64), Fused(8)
    projector = nn.Linear(8, 64, bias=False)  # the student's features in the teacher's space
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(64):
            loss = nn.functional.cross_entropy(teacher(halves(images[batch]))[0], labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    optimizer = torch.optim.AdamW([*student.parameters(), *projector.parameters()], lr=1e-2)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(64):
            sensors, y = halves(images[batch]), labels[batch]
            present = torch.ones(len(batch), 2, dtype=torch.bool)
            present[::4, 1] = False  # the right half is missing
            with torch.no_grad():
                teacher_logits, teacher_features = teacher(sensors)
            out = mfd.mfd_loss(
                student.features(sensors),
                student.pool.query,
                student.head.weight,
                student.head.bias,
                teacher_logits,
                y,
                bias=student.pool.bias,
                present=present,
                temperature=2.0,
                soft_weight=0.7,
                hard_weight=0.3,
            )
            hint = mfd.feature_loss(student(sensors)[1], teacher_features, projector=projector.weight)
            optimizer.zero_grad()
            (out.loss + 0.1 * hint).backward()
            optimizer.step()

    alone = torch.tensor([True, False]).expand(len(test), 2)
    return {
        "teacher": accuracy(teacher, images[test], labels[test]),
        "student": accuracy(student, images[test], labels[test]),
        "student, left half alone": accuracy(student, images[test], labels[test], alone),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are too small for more
    for name, value in main().items():
        print(f"{name}: {value:.3f} of the test images are right (one seed)")
