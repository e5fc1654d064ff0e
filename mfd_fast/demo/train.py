"""The experiment for one seed: a teacher, and students that differ only in what supervises them.

Every step is one call of `mfd_fast.mfd_loss`: labels of some rows, the teacher's word on all of them. Students of one
seed share the initial parameters, the order of the labelled rows and the sensor dropout; what differs is the
supervision named by the arm:

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

from .data import CLASSES, SENSORS, Samples, Split, make_split
from .models import FusionNet, principal_projection

#: Label of a row that has none.
UNKNOWN = -100
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
    """A step's call of `mfd_loss` gets a batch of ``labelled`` rows of ``part`` with their labels and, with a teacher,
    one of ``taught`` rows without; the teacher's terms are those of both.
    """

    part: Samples
    labelled: Tensor
    taught: Tensor | None = None
    soft_weight: float = 0.0
    feature_weight: float = 0.0
    teacher_logits: Tensor | None = None
    teacher_features: Tensor | None = None


def batches(rows: Tensor, size: int, rng: np.random.Generator) -> Callable[[], Tensor]:
    """Endless batches of ``min(size, len(rows))`` of the rows, a fresh permutation each time they run out."""
    size = min(size, len(rows))
    order = rng.permutation(len(rows))
    at = 0

    def take() -> Tensor:
        nonlocal order, at
        if at + size > len(rows):
            order, at = rng.permutation(len(rows)), 0
        at += size
        return rows[torch.from_numpy(order[at - size : at])]

    return take


def dropped_sensors(rows: int, sensors: int, rate: float, rng: np.random.Generator) -> Tensor:
    """bool ``[rows, sensors]``: each sensor missing with probability ``rate``, never all of a row's."""
    present = rng.random((rows, sensors)) >= rate
    present[~present.any(1)] = True
    return torch.from_numpy(present)


def lesson_loss(
    model: FusionNet, lesson: Lesson, rows: Tensor, labels: Tensor, present: Tensor, config: Config
) -> Tensor:
    """``labels`` of the ``rows``, UNKNOWN where there is none."""
    logits, features = lesson.teacher_logits, lesson.teacher_features
    output = mfd.mfd_loss(
        model.encode(lesson.part.rows(rows).sensors), model.query, model.head.weight, model.head.bias,
        None if logits is None else logits[rows], labels,
        teacher_features=None if features is None else features[rows],
        present=present, bias=model.prior, temperature=config.temperature,
        hard_weight=1.0, soft_weight=lesson.soft_weight, feature_weight=lesson.feature_weight,
        ignore_index=UNKNOWN, ignored_labels="term", backend=config.backend,
    )  # fmt: skip
    return output.loss


def fit(model: FusionNet, lesson: Lesson, steps: int, seed: int, config: Config) -> FusionNet:
    """AdamW with a cosine schedule."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # A generator of their own: the labelled rows of every arm of a seed are the same, with the same sensors dropped.
    rngs = [np.random.default_rng([seed, number]) for number in range(2)]
    known = batches(lesson.labelled, config.batch, rngs[0])
    more = None if lesson.taught is None else batches(lesson.taught, config.batch, rngs[1])
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        rows = known()
        labels = lesson.part.labels[rows]
        present = dropped_sensors(len(rows), len(SENSORS), config.sensor_dropout, rngs[0])
        if more is not None:
            taught = more()
            rows = torch.cat((rows, taught))
            labels = torch.cat((labels, torch.full_like(taught, UNKNOWN)))
            dropped = dropped_sensors(len(taught), len(SENSORS), config.sensor_dropout, rngs[1])
            present = torch.cat((present, dropped))
        lesson_loss(model, lesson, rows, labels, present, config).backward()
        optimizer.step()
        schedule.step()
    return model


def accuracies(model: FusionNet, test: Samples, backend: str | None) -> dict[str, float]:
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


def mean_shares(model: FusionNet, test: Samples, backend: str | None) -> dict[str, float]:
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
        everything = Lesson(split.teacher, torch.arange(len(split.teacher.labels)))
        teacher = fit(build(config, split, seed, True), everything, steps, seed, config)
        models = {"teacher": teacher}
        done()
        told = teacher.predict(split.student.sensors, backend=config.backend)
        features = principal_projection(told.pooled, config.student_width)
        for arm in STUDENT_ARMS:
            lesson = student_lesson(arm, split, told.logits, features, config)
            models[arm] = fit(build(config, split, seed, False), lesson, steps, seed, config)
            done()
    return SeedResult(
        {arm: accuracies(model, split.test, config.backend) for arm, model in models.items()},
        {arm: mean_shares(model, split.test, config.backend) for arm, model in models.items()},
    )


def student_lesson(arm: str, split: Split, logits: Tensor, features: Tensor, config: Config) -> Lesson:
    every = torch.arange(len(split.student.labels))
    if arm in ("alone", "all_labels"):
        return Lesson(split.student, split.labelled if arm == "alone" else every)
    return Lesson(
        split.student, split.labelled, split.labelled if arm == "same_images" else every,
        soft_weight=config.soft_weight, feature_weight=config.feature_weight,
        teacher_logits=logits, teacher_features=features,
    )  # fmt: skip
