"""The upstream gradient of a scalar loss whose gradients are ready before it is known."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import contract
from ..backends import implementation


def scale_gradients_(gradients: list[Tensor], factor: Tensor, backend: str) -> None:
    """``gradients *= factor`` in place, where ``factor`` is 0-d; the host never waits for a device."""
    factor = contract.upstream(factor)
    if backend != "cpu":
        implementation(backend, "scale").scale_gradients_(gradients, factor)
    elif (number := factor.item()) != 1.0:
        torch._foreach_mul_(gradients, number)
