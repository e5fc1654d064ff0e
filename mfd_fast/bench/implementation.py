"""One contestant of a measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .gate import Compute
from .workloads import Workload


class UnfitError(Exception):
    """This implementation cannot do this workload; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """One contestant.

    Attributes:
        name: what ``--against`` takes.
        prepare: ``(workload, device) -> f(**arguments)``; raises :class:`UnfitError`.
        missing: ``device -> reason`` why it cannot run at all here, or None.
        strict: the gate asks it to obey the tolerance rule without lenience.
        compiles: the first call compiles for one shape.
        charged: what is timed beside its own kernel, because the op starts from raw logits.
    """

    name: str
    title: str
    prepare: Callable[[Workload, torch.device], Compute]
    missing: Callable[[torch.device], str | None] = lambda _: None
    strict: bool = False
    compiles: bool = False
    charged: str = ""
