"""Two result files: which workload has become slower, by ratios to a yardstick measured in the same run.

The yardstick is eager PyTorch, or the floor where eager was not timed: a slower machine slows both. Absolute times of
two runs are never compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from mfd_fast.bench import results
from mfd_fast.bench.results import Result

BOUND = 1.5


@dataclass(frozen=True)
class Change:
    """``factor``: how many times as long mfd_fast takes as before, in units of ``yardstick``."""

    name: str
    yardstick: str
    factor: float

    @property
    def is_slower(self) -> bool:
        return self.factor > BOUND

    def __str__(self) -> str:
        word = "SLOWER" if self.is_slower else "faster" if self.factor < 1 / BOUND else "as before"
        return f"{self.name}: takes {self.factor:.2f} times as long as before, measured in {self.yardstick}: {word}"


def _cost(result: Result, yardstick: str) -> float | None:
    """The primary's time in units of the yardstick."""
    own = results.primary(result)
    if own is None:
        return None
    if yardstick == "floor":
        return float(own["median"] / results.floor_ms(result))
    other = results.entry(result, yardstick)
    return None if other is None else float(own["median"] / other["median"])


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """The workloads that both files have, the most slowed first."""
    earlier = {r["workload"]["name"]: r for r in before["results"]}
    found = []
    for result in after["results"]:
        name = result["workload"]["name"]
        for yardstick in ("eager", "floor"):
            old = _cost(earlier[name], yardstick) if name in earlier else None
            new = _cost(result, yardstick)
            if old is not None and new is not None:
                found.append(Change(name, yardstick, new / old))
                break
    return sorted(found, key=lambda change: -change.factor)


def show(found: Sequence[Change], console: Console) -> None:
    for change in found:
        console.print(Text(str(change), style="bold red" if change.is_slower else "dim"))
