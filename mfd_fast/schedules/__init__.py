"""Temperatures and weights that change over training, without a recompilation and without a synchronisation.

Schedules of the step number (:class:`Constant`, :class:`Linear`, :class:`Cosine`, :class:`Warmup`), a temperature that
is learned against the student (:class:`LearnedTemperature`), and weights of loss terms
(:class:`UncertaintyWeighting`, :class:`DynamicWeightAverage`).
"""

from .schedule import Constant, Cosine, Linear, Schedule, Warmup
from .temperature import LearnedTemperature, gradient_reversal
from .weighting import DynamicWeightAverage, UncertaintyWeighting

__all__ = [
    "Constant",
    "Cosine",
    "DynamicWeightAverage",
    "LearnedTemperature",
    "Linear",
    "Schedule",
    "UncertaintyWeighting",
    "Warmup",
    "gradient_reversal",
]
