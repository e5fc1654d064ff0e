"""The rules this library tests itself by, for tests of code that builds on it.

- :func:`assert_close_to_float64`, :func:`assert_bitwise_equal`: the only two ways to compare (``tolerance``).
- :func:`distill_inputs`, :data:`LAYOUTS`: seeded samples and memory layouts (``inputs``).
- :func:`poison`: outputs start as NaN or an integer sentinel, between verified red zones (``poison``).
- :func:`without_plans`: every call is checked in full (``plans``).
"""

from .inputs import DISTANCES, LAYOUTS, DistillInputs, distill_inputs, modal_inputs
from .plans import planned_calls, without_plans
from .poison import PoisonError, poison
from .tolerance import ErrorReport, assert_bitwise_equal, assert_close_to_float64, ulp

__all__ = [
    "DISTANCES",
    "LAYOUTS",
    "DistillInputs",
    "ErrorReport",
    "PoisonError",
    "assert_bitwise_equal",
    "assert_close_to_float64",
    "distill_inputs",
    "modal_inputs",
    "planned_calls",
    "poison",
    "ulp",
    "without_plans",
]
