"""The correctness gate: nothing is timed before its value and gradients obey the tolerance rule.

The rule is :func:`mfd_fast.testing.assert_close_to_float64`. It is put to

- ``SEEDS`` small blocks with a far teacher and as many with a near one (p ≈ q, where low precision cancels), whose
  results are stacked, so that the bound on a scalar is a statistic and not luck;
- the full size: four blocks of rows of every row gradient, all of everything else. A result of few elements, such as
  the value, may err twice as much as eager does on the small blocks, where the rule has been strict.

mfd_fast must obey the rule as it stands. Another implementation only has to do the same work, so it may err
``LENIENCE`` times as much as eager.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mfd_fast.testing import assert_close_to_float64

from .case import Case, as_float64, build, value_and_gradients
from .ops import of, options_of
from .workloads import Workload

LENIENCE = 8.0
SEEDS, SMALL_BLOCK = 8, 1 << 17
SMALL_HEAD = 1 << 20  # elements of a small block's head, of which every block has its own
FEW = 4096  # elements: fewer are no statistic
BLOCKS_CHECKED = 4

Compute = Callable[..., Tensor]
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """``red`` is None if the gate is green, else what is wrong; the error is that of the far teacher's gradients."""

    red: str | None
    error: float | None = None
    eager_error: float | None = None


class Gate:
    """The exact and the eager results of one workload, computed once for all implementations."""

    def __init__(self, workload: Workload, case: Case) -> None:
        self.workload, self.case = workload, case
        self.op, options = of(workload), options_of(workload)
        self.eager: Compute = lambda **arguments: self.op.eager(**arguments, **options)
        exact_call = self.op.call(options, "reference")
        small = _with_small_head(workload)
        device = next(iter(case.leaves.values())).device
        self.small = {
            distance: [
                build(small, device, distance, 1 + seed, whole=False, limit=SMALL_BLOCK) for seed in range(SEEDS)
            ]
            for distance in ("far", "near")
        }
        self.exact_small = {
            distance: _stacked([value_and_gradients(exact_call, as_float64(block)) for block in blocks])
            for distance, blocks in self.small.items()
        }
        self.eager_small = {d: self._on_small(self.eager, d) for d in self.small}
        self.exact_full = self._exact(exact_call, build(workload, device, whole=False))
        self.eager_full = value_and_gradients(self.eager, case)

    def _on_small(self, f: Compute, distance: str) -> Results:
        return _stacked([value_and_gradients(f, block) for block in self.small[distance]])

    def _exact(self, call: Compute, block: Case) -> Results:
        """float64 results of the case's own block, scaled to what its copies give."""
        found = value_and_gradients(call, as_float64(block))
        for name in found:
            if name.startswith("d "):
                of_rows = name.removeprefix("d ").split("[")[0] in self.op.rows
                if of_rows and self.op.mean:
                    found[name] = found[name] / self.case.copies
                elif not of_rows and not self.op.mean:
                    found[name] = found[name] * self.case.copies
        return found

    def check(self, f: Compute, *, lenience: float = 1.0, small: bool = True) -> Verdict:
        """Red with the reason, or green with the largest error of the gradients (of the value, without them).

        ``small=False`` leaves the small blocks out: they are another shape, which a compiler would compile anew.
        """
        try:
            for distance in self.small if small else ():
                found = self._on_small(f, distance)
                for name, value in found.items():
                    exact, eager = self.exact_small[distance][name], self.eager_small[distance][name]
                    where = f"{name} with a {distance} teacher"
                    assert_close_to_float64(value, exact, _widened(eager, exact, lenience), where)
            return Verdict(None, *self._check_full(value_and_gradients(f, self.case), lenience))
        except AssertionError as error:
            return Verdict(str(error))

    def _check_full(self, found: Results, lenience: float) -> tuple[float, float]:
        worst = (0.0, 0.0)
        for name, value in found.items():
            exact, eager = self.exact_full[name], self.eager_full[name]
            rows = exact.shape[0] if exact.dim() else 1
            copies = 1 if value.shape == exact.shape else value.shape[0] // max(rows, 1)
            for copy in _spread(copies):
                part = slice(copy * rows, (copy + 1) * rows)
                actual, by_eager = (t if copies == 1 else t[part] for t in (value, eager))
                yardstick = _widened(self._yardstick(name, exact, by_eager), exact, lenience)
                report = assert_close_to_float64(actual, exact, yardstick, f"full size, {name}")
                if name != "result" or self.workload.phase != "training":
                    worst = max(worst, (report.max_error, float((by_eager.double() - exact).abs().max())))
        return worst

    def _yardstick(self, name: str, exact: Tensor, eager: Tensor) -> Tensor:
        """Eager's result; where it has few elements, with twice its error, or the small blocks' if that is larger."""
        if exact.numel() >= FEW or name not in self.exact_small["far"]:
            return eager
        small, by_eager = self.exact_small["far"][name], self.eager_small["far"][name].double()
        relative = (by_eager - small).abs().max() / small.abs().max().clamp_min(1e-300)
        error = 2 * torch.maximum((eager.double() - exact).abs().max(), relative * exact.abs().max())
        return (exact + error).to(eager.dtype)


def _with_small_head(workload: Workload) -> Workload:
    """The same workload with as many classes as ``SMALL_HEAD`` has room for, where a head's weight is an argument."""
    sizes = workload.sizes
    width = sizes.get("hidden", sizes.get("width", 0)) if "classes" in sizes else 0
    if not width:
        return workload
    return replace(workload, sizes={**sizes, "classes": min(sizes["classes"], max(SMALL_HEAD // width, 2))})


def _stacked(results: list[Results]) -> Results:
    return {name: torch.stack([found[name] for found in results]) for name in results[0]}


def _spread(blocks: int) -> list[int]:
    """The first, the last, and some between."""
    most = min(blocks, BLOCKS_CHECKED)
    return sorted({round(i * (blocks - 1) / max(most - 1, 1)) for i in range(most)})


def _widened(eager: Tensor, exact: Tensor, factor: float) -> Tensor:
    """Eager's result with its error ``factor`` times as large."""
    eager = eager.detach()
    if factor == 1.0:
        return eager
    return torch.where(torch.isfinite(eager), exact + factor * (eager.double() - exact), eager.double()).to(eager.dtype)
