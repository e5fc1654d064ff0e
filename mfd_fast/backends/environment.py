"""What is asked for beside a call: environment variables that are read at run time, and ``use_backend``.

A value that means nothing is refused by name.
"""

from __future__ import annotations

import contextvars
import math
import os
from collections.abc import Callable
from typing import NamedTuple

BACKENDS = ("cuda", "triton", "cpu", "reference")  # best first
ISAS = ("baseline", "avx2", "avx512")
#: Idle memory of the gradient pool: room for one gradient of 2048 x 32000 float32 logits.
DEFAULT_POOL_MB = 256

#: The backend that ``use_backend`` asks for in the present context.
USED: contextvars.ContextVar[str | None] = contextvars.ContextVar("mfd_fast_backend", default=None)


class Variable(NamedTuple):
    """``unset`` says what holds without it; ``read`` raises ValueError for a bad value."""

    name: str
    unset: str
    read: Callable[[], object]


def backend() -> str | None:
    return _one_of("MFD_FAST_BACKEND", BACKENDS)


def cpu_isa() -> str:
    return _one_of("MFD_FAST_CPU_ISA", ISAS) or ""


def gradient_pool_bytes() -> int:
    """Bound of the idle memory in the pool of gradient buffers."""
    name = "MFD_FAST_GRAD_POOL_MB"
    text = os.environ.get(name)
    try:
        megabytes = DEFAULT_POOL_MB if not text else float(text)
    except ValueError:
        megabytes = math.nan
    if not 0 <= megabytes < 1e9:
        raise ValueError(f"{name} must be a number of MiB >= 0, got {text!r}")
    return int(megabytes * 2**20)


def plans() -> bool:
    """Whether calls leave plans (backends/plans.py); read once."""
    return _one_of("MFD_FAST_PLANS", ("0", "1")) != "0"


def _one_of(name: str, choices: tuple[str, ...]) -> str | None:
    value = os.environ.get(name) or None
    if value is not None and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


VARIABLES = (
    Variable("MFD_FAST_BACKEND", "the fastest that can run", backend),
    Variable("MFD_FAST_CPU_ISA", "the best that the processor has", cpu_isa),
    Variable("MFD_FAST_GRAD_POOL_MB", f"{DEFAULT_POOL_MB} MiB of idle gradient memory", gradient_pool_bytes),
    Variable("MFD_FAST_PLANS", "calls like an earlier one skip its checks", plans),
)


def problem(variable: Variable) -> str | None:
    """None, or why the value is refused."""
    try:
        variable.read()
    except ValueError as error:
        return str(error)
    return None


def problems() -> list[str]:
    return [reason for variable in VARIABLES if (reason := problem(variable)) is not None]
