"""Weights of several loss terms: learned from their uncertainty, or from how fast each one falls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..problems import checks as contract
from .buffers import FixedPrecision
from .schedule import check_count, check_number

#: e³⁰/2 and its products are far from the limit of every dtype but float16, where e¹¹/2 is half of it.
LEAST_LOG_VARIANCE = -30.0
LEAST_LOG_VARIANCE_FLOAT16 = -11.0


class UncertaintyWeighting(nn.Module):
    """Σ_i L_i/(2·e^{s_i}) + s_i/2 with learned log-variances s_i.

    Kendall, Gal, Cipolla, arXiv:1705.07115. dL/ds_i = (1 − e^{−s_i} L_i)/2. The optimum is s_i = log L_i, so that of a
    loss which stays 0 is −∞: an s_i below −30 (−11 with float16) counts as −30 (its gradient stays the formula's, so
    that it comes back), and weights are at most e³⁰/2. The arithmetic is float32 or float64.

    Args:
        terms: number K of losses.
        log_variance: what every s_i starts with; ``log_variance [K]`` in ``state_dict``.

    ``forward(losses)``: K 0-d tensors or one ``[K]``; returns the 0-d total.

    >>> import torch, mfd_fast as mfd
    >>> weighting = mfd.schedules.UncertaintyWeighting(2, log_variance=0.0)
    >>> weighting([torch.tensor(1.0), torch.tensor(3.0)]).item()
    2.0
    """

    def __init__(
        self, terms: int, *, log_variance: float = -0.5, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.terms = check_count("UncertaintyWeighting", "terms", terms)
        self.start = check_number("UncertaintyWeighting", "log_variance", log_variance)
        self.log_variance = nn.Parameter(torch.empty(terms, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every s_i as it started."""
        nn.init.constant_(self.log_variance, self.start)

    @property
    def weights(self) -> Tensor:
        """1/(2·e^{s_i}), ``[K]``, detached."""
        return torch.exp(-self._bounded(self.log_variance).detach()) / 2

    def _bounded(self, losses: Tensor) -> Tensor:
        """max(s, −30) with the gradient of s."""
        s = self.log_variance.to(contract.compute_dtype(self.log_variance))
        narrow = torch.float16 in (losses.dtype, self.log_variance.dtype)
        least = LEAST_LOG_VARIANCE_FLOAT16 if narrow else LEAST_LOG_VARIANCE
        return s.detach().clamp_min(least) + (s - s.detach())

    def forward(self, losses: Sequence[Tensor] | Tensor) -> Tensor:
        stacked = _stacked("UncertaintyWeighting", losses, self.terms)
        s = self._bounded(stacked)
        return ((torch.exp(-s) * stacked.to(contract.compute_dtype(stacked)) + s) / 2).sum()

    def extra_repr(self) -> str:
        return f"terms={self.terms}"


class DynamicWeightAverage(FixedPrecision):
    """Σ_i w_i L_i with w = K·softmax_i(r_i/τ) and r_i = L_i(t−1)/L_i(t−2), the means of the last two epochs.

    Liu, Johns, Davison, arXiv:1803.10704. All weights are 1 in the first two epochs. A loss whose mean two epochs
    ago was exactly 0 counts as unchanged (r_i = 1).

    Args:
        terms: number K of losses.
        temperature: τ, number > 0.
        dtype: of the buffers, float32 or float64 (a 16-bit dtype counts as float32).

    ``forward(losses)``: K 0-d tensors or one ``[K]``; returns the 0-d total and, in training mode, adds the losses
    to the epoch's means. Call :meth:`step` at the end of each epoch,
    after its last ``backward()``. Everything is a buffer (``weights [K]``,
    ``total [K]``, ``count``, ``means [2, K]``, ``epoch``), so ``state_dict`` resumes it and nothing is read back to
    the host; a step compiled once sees the new weights. Buffers keep their dtype under ``.bfloat16()``, ``.half()``
    and ``.to(dtype)``: a count in bfloat16 would stop at 256.

    >>> import torch, mfd_fast as mfd
    >>> average = mfd.schedules.DynamicWeightAverage(2)
    >>> for losses in ([4.0, 4.0], [2.0, 4.0]):
    ...     total = average(torch.tensor(losses))
    ...     weights = average.step()
    >>> weights
    tensor([0.8756, 1.1244])
    """

    weights: Tensor
    total: Tensor
    count: Tensor
    means: Tensor
    epoch: Tensor

    def __init__(
        self, terms: int, *, temperature: float = 2.0, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.terms = check_count("DynamicWeightAverage", "terms", terms)
        self.temperature = check_number("DynamicWeightAverage", "temperature", temperature)
        if self.temperature <= 0:
            raise contract.value_error("DynamicWeightAverage", "temperature", temperature, "a finite number > 0")
        form: dict[str, Any] = {"device": device, "dtype": torch.promote_types(dtype, torch.float32)}
        self.register_buffer("weights", torch.empty(terms, **form))
        self.register_buffer("total", torch.empty(terms, **form))
        self.register_buffer("count", torch.empty((), **form))
        self.register_buffer("means", torch.empty(2, terms, **form))
        self.register_buffer("epoch", torch.empty((), device=device, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to before the first epoch."""
        for buffer in (self.weights, self.means):
            buffer.fill_(1.0)
        for buffer in (self.total, self.count, self.epoch):
            buffer.zero_()

    def forward(self, losses: Sequence[Tensor] | Tensor) -> Tensor:
        stacked = _stacked("DynamicWeightAverage", losses, self.terms)
        if self.training:
            self.total += stacked.detach()
            self.count += 1
        return (self.weights * stacked).sum()

    def step(self) -> Tensor:
        """Ends an epoch (of at least one forward in training mode); returns the weights of the next."""
        means = torch.stack([self.means[1], self.total / self.count])
        ratio = torch.where(means[0] == 0, 1.0, means[1] / means[0])
        self.epoch += 1
        self.weights.copy_(torch.where(self.epoch >= 2, self.terms * torch.softmax(ratio / self.temperature, 0), 1.0))
        self.means.copy_(means)
        self.total.zero_()
        self.count.zero_()
        return self.weights

    def extra_repr(self) -> str:
        return f"terms={self.terms}, temperature={self.temperature}"


def _stacked(op: str, losses: object, terms: int) -> Tensor:
    """K 0-d losses, or one tensor ``[K]``, as ``[K]``."""
    if isinstance(losses, Tensor):
        stacked = contract.check_floating(op, "losses", losses)
    elif isinstance(losses, Sequence) and not isinstance(losses, str) and losses:
        for i, loss in enumerate(losses):
            if contract.check_floating(op, f"losses[{i}]", loss).dim() != 0:
                raise contract.value_error(op, f"losses[{i}]", loss, "a 0-d tensor")
        stacked = torch.stack(list(losses))
    else:
        raise contract.type_error(op, "losses", losses, "a sequence of 0-d tensors or one tensor [K]")
    if stacked.shape != (terms,):
        raise contract.value_error(op, "losses", losses, f"{terms} losses")
    return stacked
