"""Three views of scikit-learn's digits, split into a teacher's, a student's and a test part.

The views stand in for sensors: left half and right half of the 8x8 image (32 pixels each) and the spectrum
log(1 + |FFT2|) of the whole image (40 magnitudes, the ones a real image does not repeat). They share one source.
Digits is the test part of UCI optdigits: 13 writers, no writer ids, so a random split mixes writers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SENSORS = ("left half", "right half", "spectrum")
SIZES = (32, 32, 40)  # values per sensor
CLASSES = 10
IMAGES = 1797


class Samples(NamedTuple):
    """Rows of the data set: ``sensors`` is one float32 ``[N, D_m]`` per sensor, ``labels`` is int64 ``[N]``."""

    sensors: tuple[Tensor, ...]
    labels: Tensor

    def rows(self, index: Tensor) -> Samples:
        return Samples(tuple(sensor[index] for sensor in self.sensors), self.labels[index])


class Split(NamedTuple):
    """Disjoint parts. Labels of ``student`` rows other than ``labelled`` are used by the "all labels" control only."""

    teacher: Samples
    student: Samples
    labelled: Tensor  # int64 row numbers in `student`
    test: Samples


def views(images: np.ndarray) -> list[np.ndarray]:
    """Images ``[N, 8, 8]`` with pixels 0..16 to the three sensors, each ``[N, D_m]``."""
    pixels = images / 16.0
    half = pixels.shape[2] // 2
    spectrum = np.log1p(np.abs(np.fft.rfft2(pixels)))
    return [view.reshape(len(images), -1) for view in (pixels[:, :, :half], pixels[:, :, half:], spectrum)]


def load() -> tuple[list[np.ndarray], np.ndarray]:
    """The three sensors and the labels ``[1797]`` of the digits bundled with scikit-learn (no download)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return views(digits.images), digits.target


def stratified(labels: np.ndarray, sizes: tuple[int, ...], rng: np.random.Generator) -> list[np.ndarray]:
    """Disjoint random row sets of the given sizes, each with the classes in nearly equal proportion."""
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = (np.arange(len(members)) + rng.random()) / len(members)
    # Walking the rows by their relative rank within the class meets every class at the same pace.
    walk = np.argsort(rank, kind="stable")
    stops = np.cumsum(sizes)
    return [rng.permutation(walk[stop - size : stop]) for size, stop in zip(sizes, stops, strict=True)]


def make_split(
    sensors: list[np.ndarray], labels: np.ndarray, seed: int, *, test: int, student: int, labelled: int
) -> Split:
    """Random stratified split for ``seed``; what is neither test nor student goes to the teacher.

    Every sensor is standardised by the mean and deviation of the rows that are not in the test part.
    """
    rng = np.random.default_rng(seed)
    sizes = (labelled, student - labelled, test, len(labels) - student - test)
    labelled_rows, unlabelled_rows, test_rows, teacher_rows = stratified(labels, sizes, rng)
    student_rows = np.concatenate([labelled_rows, unlabelled_rows])
    known = np.concatenate([student_rows, teacher_rows])

    def part(rows: np.ndarray) -> Samples:
        scaled = tuple(
            torch.from_numpy((s[rows] - s[known].mean(0)) / (s[known].std(0) + 0.1)).float() for s in sensors
        )
        return Samples(scaled, torch.from_numpy(labels[rows]).long())

    return Split(part(teacher_rows), part(student_rows), torch.arange(labelled), part(test_rows))
