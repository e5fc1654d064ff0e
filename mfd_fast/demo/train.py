"""The experiment for one seed: a teacher, and students that differ only in what supervises them.

Every loss is `mfd_fast.mfd_loss`. Students of one seed share the initial parameters, the order of the labelled rows
and the sensor dropout; what differs is the supervision named by the arm:

- ``alone``: labels of the labelled rows;
- ``distilled``: the same, and the teacher's logits and fused features on all student rows, most of them unlabelled;
- ``same_images``: the same, but the teacher speaks about the labelled rows only (control: no additional images);
- ``all_labels``: true labels of all student rows, no teacher (control: what those labels would have been worth).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import mfd_fast as mfd

from .data import CLASSES, SENSORS, Part, Split, make_split
from .models import FusionNet, principal_projection

STUDENT_ARMS = ("alone", "distilled", "same_images", "all_labels")
ARMS = ("teacher", *STUDENT_ARMS)


class SeedResult(NamedTuple):
    """Per arm: test accuracy by condition, and the mean share that each sensor has in the fused representation."""

    accuracy: dict[str, dict[str, float]]
    shares: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Config:
    """Sizes in rows, widths in units, rates per step; everything that fixes the experiment but the seed."""

    test_rows: int = 540
    student_rows: int = 500
    labelled_rows: int = 100
    batch: int = 100
    epochs: int = 40
    teacher_hidden: int = 256
    teacher_layers: int = 2
    teacher_width: int = 128
    student_hidden: int = 32
    student_width: int = 32
    learning_rate: float = 8e-3
    weight_decay: float = 0.5
    sensor_dropout: float = 0.2
    temperature: float = 3.0
    soft_weight: float = 1.0
    feature_weight: float = 1.0
    backend: str | None = None


@dataclass(frozen=True)
class Lesson:
    """What one call of `mfd_loss` gets: rows, and their labels or the teacher's words about them."""

    part: Part
    hard_weight: float = 0.0
    soft_weight: float = 0.0
    feature_weight: float = 0.0
    teacher_logits: Tensor | None = None
    teacher_features: Tensor | None = None


def batches(rows: int, size: int, rng: np.random.Generator) -> Callable[[], Tensor]:
    """Endless batches of ``min(size, rows)`` row numbers, a fresh permutation each time the rows run out."""
    size = min(size, rows)
    order = rng.permutation(rows)
    at = 0

    def take() -> Tensor:
        nonlocal order, at
        if at + size > rows:
            order, at = rng.permutation(rows), 0
        at += size
        return torch.from_numpy(order[at - size : at])

    return take


def dropped_sensors(rows: int, sensors: int, rate: float, rng: np.random.Generator) -> Tensor:
    """bool ``[rows, sensors]``: each sensor missing with probability ``rate``, never all of a row's."""
    present = rng.random((rows, sensors)) >= rate
    present[~present.any(1)] = True
    return torch.from_numpy(present)


def lesson_loss(model: FusionNet, lesson: Lesson, rows: Tensor, present: Tensor, config: Config) -> Tensor:
    part = lesson.part.rows(rows)
    # mfd_loss wants teacher logits; with soft_weight 0 they are not read.
    logits = lesson.teacher_logits
    teacher_logits = torch.zeros(len(rows), CLASSES) if logits is None else logits[rows]
    output = mfd.mfd_loss(
        model.encode(part.sensors), model.query, model.head.weight, model.head.bias, teacher_logits,
        part.labels if lesson.hard_weight else None,
        teacher_features=lesson.teacher_features[rows] if lesson.teacher_features is not None else None,
        present=present, bias=model.prior, temperature=config.temperature,
        hard_weight=lesson.hard_weight, soft_weight=lesson.soft_weight, feature_weight=lesson.feature_weight,
        backend=config.backend,
    )  # fmt: skip
    return output.loss


def fit(model: FusionNet, lessons: list[Lesson], steps: int, seed: int, config: Config) -> FusionNet:
    """AdamW with a cosine schedule; each step adds the losses of one batch per lesson."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # One generator per lesson: the first lesson of every arm of a seed sees the same rows and dropped sensors.
    rngs = [np.random.default_rng([seed, number]) for number in range(len(lessons))]
    takes = [batches(len(les.part.labels), config.batch, rng) for les, rng in zip(lessons, rngs, strict=True)]
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        for lesson, take, rng in zip(lessons, takes, rngs, strict=True):
            rows = take()
            present = dropped_sensors(len(rows), len(SENSORS), config.sensor_dropout, rng)
            lesson_loss(model, lesson, rows, present, config).backward()
        optimizer.step()
        schedule.step()
    return model


def accuracies(model: FusionNet, test: Part, backend: str | None) -> dict[str, float]:
    """Share of right test rows with all sensors, and with each sensor missing."""
    rows = len(test.labels)
    result = {}
    for missing in (None, *range(len(SENSORS))):
        present = torch.ones(rows, len(SENSORS), dtype=torch.bool)
        if missing is not None:
            present[:, missing] = False
        logits = model.predict(test.sensors, present, backend).logits
        name = "all sensors" if missing is None else f"without {SENSORS[missing]}"
        result[name] = (logits.argmax(-1) == test.labels).sum().item() / rows
    return result


def mean_shares(model: FusionNet, test: Part, backend: str | None) -> dict[str, float]:
    """Mean over the test rows of the weight that the fusion learned to give each sensor; they add up to 1."""
    weights = model.predict(test.sensors, backend=backend).weights
    return dict(zip(SENSORS, weights.mean(0).tolist(), strict=True))


def build(config: Config, split: Split, seed: int, teacher: bool) -> FusionNet:
    inputs = [sensor.shape[1] for sensor in split.test.sensors]
    torch.manual_seed(seed)
    if teacher:
        return FusionNet(inputs, config.teacher_hidden, config.teacher_width, CLASSES, config.teacher_layers)
    return FusionNet(inputs, config.student_hidden, config.student_width, CLASSES)


def run_seed(
    sensors: list[np.ndarray], labels: np.ndarray, seed: int, config: Config, done: Callable[[], None]
) -> SeedResult:
    """Train teacher and students for one seed; ``done()`` is called after each of them."""
    split = make_split(
        sensors, labels, seed,
        test=config.test_rows, student=config.student_rows, labelled=config.labelled_rows,
    )  # fmt: skip
    steps = config.epochs * -(-config.student_rows // config.batch)
    with torch.random.fork_rng(devices=[]):
        teacher = fit(build(config, split, seed, True), [Lesson(split.teacher, hard_weight=1.0)], steps, seed, config)
        models = {"teacher": teacher}
        done()
        told = teacher.predict(split.student.sensors, backend=config.backend)
        features = principal_projection(told.pooled, config.student_width)
        for arm in STUDENT_ARMS:
            lessons = student_lessons(arm, split, told.logits, features, config)
            models[arm] = fit(build(config, split, seed, False), lessons, steps, seed, config)
            done()
    return SeedResult(
        {arm: accuracies(model, split.test, config.backend) for arm, model in models.items()},
        {arm: mean_shares(model, split.test, config.backend) for arm, model in models.items()},
    )


def student_lessons(arm: str, split: Split, logits: Tensor, features: Tensor, config: Config) -> list[Lesson]:
    """Labels and teacher come in two calls: a row with an ignored label would be masked for the teacher's terms too."""
    labelled = Lesson(split.student.rows(split.labelled), hard_weight=1.0)
    if arm == "alone":
        return [labelled]
    if arm == "all_labels":
        return [Lesson(split.student, hard_weight=1.0)]
    rows = split.labelled if arm == "same_images" else torch.arange(len(split.student.labels))
    taught = Lesson(
        split.student.rows(rows), soft_weight=config.soft_weight, feature_weight=config.feature_weight,
        teacher_logits=logits[rows], teacher_features=features[rows],
    )  # fmt: skip
    return [labelled, taught]
