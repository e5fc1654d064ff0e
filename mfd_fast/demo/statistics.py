"""Paired comparison of two arms over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, nan, sqrt

# Two-sided 95 % points of Student's t for 1..30 degrees of freedom.
_T95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
_Z95 = 1.959964


@dataclass(frozen=True)
class Paired:
    """Differences seed by seed, and what they say about their mean.

    ``half_width`` is that of the 95 % interval of the paired t-test. The random splits of the seeds overlap, which
    that interval does not know; ``corrected_half_width`` adds test rows / training rows to 1 / seeds in the
    variance of the mean (Nadeau, Bengio: Inference for the Generalization Error, Machine Learning 52, 2003).
    ``sign_p`` is the two-sided p of the sign test. Everything but the mean is nan for a single seed.
    """

    differences: tuple[float, ...]
    mean: float
    standard_error: float
    half_width: float
    corrected_half_width: float
    sign_p: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the corrected interval does; False for a single seed."""
        return abs(self.mean) > self.corrected_half_width


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean (nan for a single value)."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, nan
    return mean, sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def t95(degrees: int) -> float:
    """Two-sided 95 % point of Student's t, to 1e-4; beyond the table by the expansion in 1 / degrees.

    Abramowitz, Stegun: Handbook of Mathematical Functions, 26.7.5 (first two terms).
    """
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    z = _Z95
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def sign_test(differences: Sequence[float]) -> float:
    """Two-sided p of the sign test; ties are left out."""
    signs = [difference > 0 for difference in differences if difference != 0]
    n, k = len(signs), min(sum(signs), len(signs) - sum(signs))
    return min(1.0, 2.0 * sum(comb(n, i) for i in range(k + 1)) / 2.0**n)


def paired(after: Sequence[float], before: Sequence[float], test_to_train: float) -> Paired:
    """``after - before`` seed by seed; ``test_to_train`` is test rows / training rows of one seed."""
    differences = tuple(a - b for a, b in zip(after, before, strict=True))
    mean, error = mean_and_error(differences)
    n = len(differences)
    if n < 2:
        return Paired(differences, mean, nan, nan, nan, nan)
    half_width = t95(n - 1) * error
    corrected = half_width * sqrt(1.0 + n * test_to_train)
    return Paired(differences, mean, error, half_width, corrected, sign_test(differences))
