"""Plans of calls, for tests: both ways of a call, that of its checks and that of a plan, must give the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..backends import plans


@contextmanager
def without_plans() -> Iterator[None]:
    """Every call inside the block is checked in full, as with ``MFD_FAST_PLANS=0``; so are the first ones after it.

    Example:
        >>> import torch, mfd_fast as mfd
        >>> logits = torch.zeros(2, 3)
        >>> with without_plans():
        ...     losses = [mfd.distill_loss(logits, logits) for _ in range(2)]
        >>> planned_calls()
        0
    """
    before = plans.enable(False)
    try:
        yield
    finally:
        plans.enable(before)


def planned_calls() -> int:
    """Calls that plans have run since they were forgotten last, over all ops."""
    return sum(plans.hits().values())
