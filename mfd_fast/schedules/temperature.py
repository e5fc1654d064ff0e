"""Curriculum temperature: learned, with a reversed gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..problems import checks as contract
from .options import Check, OptionsModule
from .schedule import Schedule, check_number


def gradient_reversal(x: Tensor, coefficient: float | Tensor = 1.0) -> Tensor:
    """x forward (finite x), ``−coefficient`` times the gradient backward.

    Args:
        x: any floating tensor.
        coefficient: number or 0-d tensor; no gradient reaches it.

    Ganin, Lempitsky, arXiv:1409.7495.

    >>> import torch, mfd_fast as mfd
    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> mfd.schedules.gradient_reversal(x, 0.5).backward()
    >>> x.grad
    tensor(-0.5000)
    """
    contract.check_floating("gradient_reversal", "x", x)
    contract.check_scalar("gradient_reversal", "coefficient", coefficient)
    if isinstance(coefficient, Tensor):
        coefficient = coefficient.detach().to(x.dtype)
    # x − x is 0, so the value is x exactly while only the difference has a gradient.
    return x.detach() - coefficient * (x - x.detach())


class LearnedTemperature(OptionsModule):
    """CTKD's temperature T = t_start + t_end·σ(θ), which learns to make the distillation harder.

    The gradient of θ is reversed and multiplied by ``reversal``, which the curriculum raises from 0 to 1, in the
    paper's code along a cosine over the first 10 epochs: ``Cosine(0.0, 1.0, steps=10)``.
    Li et al., Curriculum Temperature for Knowledge Distillation, arXiv:2211.16231.

    Args:
        t_start, t_end: T lies between t_start and t_start + t_end; t_start > 0, t_end >= 0.
        theta: what θ starts with; ``theta`` (0-d) in ``state_dict``.
        reversal: number, 0-d tensor (then a buffer) or :class:`Schedule`, whose tensor is used. Stepping and saving
            a schedule is the caller's, as with a learning rate's.

    ``forward(theta=None)`` returns T, to be passed as ``temperature``; 0-d, or of the shape of ``theta`` where a
    network of the caller's gives one θ per row (the instance-wise form).

    >>> import mfd_fast as mfd
    >>> ramp = mfd.schedules.Cosine(0.0, 1.0, steps=10)
    >>> temperature = mfd.schedules.LearnedTemperature(reversal=ramp)
    >>> round(temperature().item(), 4)
    15.6212
    """

    _OPTIONS: ClassVar[Mapping[str, Check]] = {"reversal": contract.check_scalar}
    reversal: float | Tensor | Schedule

    def __init__(
        self,
        t_start: float = 1.0,
        t_end: float = 20.0,
        *,
        theta: float = 1.0,
        reversal: float | Tensor | Schedule = 1.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = "LearnedTemperature"
        self.t_start, self.t_end = check_number(op, "t_start", t_start), check_number(op, "t_end", t_end)
        if self.t_start <= 0:
            raise contract.value_error(op, "t_start", t_start, "a finite number > 0")
        if self.t_end < 0:
            raise contract.value_error(op, "t_end", t_end, "a finite number >= 0")
        self.reversal = reversal
        self.start = check_number(op, "theta", theta)
        self.theta = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """θ as it started, and ``reversal`` where it is a tensor."""
        super().reset_parameters()
        nn.init.constant_(self.theta, self.start)

    def forward(self, theta: Tensor | None = None) -> Tensor:
        reversed_ = gradient_reversal(self.theta if theta is None else theta, self.options["reversal"])
        return self.t_start + self.t_end * torch.sigmoid(reversed_)

    def extra_repr(self) -> str:
        return f"t_start={self.t_start}, t_end={self.t_end}, reversal={self.reversal!r}"
