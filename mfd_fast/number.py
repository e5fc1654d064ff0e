"""Python's and NumPy's scalars: both are numbers."""

from __future__ import annotations

import numbers
from typing import Any


def is_real(value: Any) -> bool:
    """An int, a float or a scalar of that kind of another library; no bool."""
    return not isinstance(value, bool) and isinstance(value, numbers.Real)


def is_integer(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Integral)


def plain(value: Any) -> Any:
    """The same number as Python's int or float, which kernels take; what is none of these comes back as it is."""
    if type(value) in (int, float) or not is_real(value):
        return value
    return int(value) if is_integer(value) else float(value)
