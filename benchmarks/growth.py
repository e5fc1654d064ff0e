"""Cost growth: time and memory of mfd_fast against N, C, D and M over four decades, with the fitted exponent.

The exponent is the least-squares slope of log cost over log size where the cost has left its constant (more than three
times the smallest). Linear work has exponent 1; what the machine itself adds (leaving a cache, fresh pages) shows in
the exponent of the floor, which is fitted over the same sizes. Where a backend passes a call on (more modalities than
its kernel has room for), only the sizes of the backend that runs the largest are fitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mfd_fast.bench import ceilings, memory
from mfd_fast.bench.case import build, step_of
from mfd_fast.bench.implementations import backend_choices
from mfd_fast.bench.ops import of, options_of
from mfd_fast.bench.timing import interleaved
from mfd_fast.bench.workloads import Workload

SUPERLINEAR = 1.1
DECADES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000)


@dataclass(frozen=True)
class Axis:
    """One size of an op that grows while the others stay; ``sizes[axis]`` is the smallest."""

    op: str
    axis: str
    sizes: dict[str, int]
    letter: str

    def workloads(self, steps: Sequence[int] = DECADES) -> list[Workload]:
        return [Workload(self.op, {**self.sizes, self.axis: self.sizes[self.axis] * k}) for k in steps]


AXES = (
    Axis("distill_loss", "rows", {"rows": 4, "classes": 1000}, "N"),
    Axis("distill_loss", "classes", {"rows": 64, "classes": 32}, "C"),
    Axis("modal_pool", "batch", {"batch": 1, "modalities": 3, "width": 768}, "N"),
    Axis("modal_pool", "modalities", {"batch": 16, "modalities": 1, "width": 64}, "M"),
    Axis("modal_pool", "width", {"batch": 64, "modalities": 3, "width": 8}, "D"),
    Axis("feature_loss", "rows", {"rows": 1, "taps": 4, "width": 768}, "N"),
    Axis("feature_loss", "width", {"rows": 64, "taps": 4, "width": 4}, "D"),
    Axis("mfd_loss", "batch", {"batch": 1, "modalities": 2, "width": 128, "classes": 64}, "N"),
    Axis("mfd_loss", "classes", {"batch": 32, "modalities": 2, "width": 128, "classes": 8}, "C"),
    Axis("mfd_loss", "width", {"batch": 32, "modalities": 2, "width": 8, "classes": 64}, "D"),
    Axis("mfd_loss", "modalities", {"batch": 16, "modalities": 1, "width": 64, "classes": 16}, "M"),
)


def fitted_exponent(
    sizes: Sequence[float], costs: Sequence[float], beside: Sequence[float] | None = None
) -> float | None:
    """The slope of log cost over log size above three times the smallest cost; None below three such points.

    ``beside``: other costs at the same sizes; the sizes are chosen by ``costs``, the slope is theirs.
    """
    least = min(costs)
    shown = costs if beside is None else beside
    points = [
        (math.log(s), math.log(y)) for s, c, y in zip(sizes, costs, shown, strict=True) if c > 3 * least > 0 and y > 0
    ]
    if len(points) < 3:
        return None
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    over = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return over / sum((x - mean_x) ** 2 for x, _ in points)


def measure_axis(axis: Axis, device: torch.device, seconds: float = 0.25) -> dict[str, Any]:
    """Milliseconds and peak extra bytes at every size that fits into memory."""
    points = []
    backend = "?"
    for workload in axis.workloads():
        op = of(workload)
        work = op.work(dict(workload.sizes), workload.torch_dtype.itemsize, True)
        free = memory.available_bytes(device)
        if free is not None and 4 * work.nbytes > free:
            break
        case = build(workload, device)
        backend, _ = backend_choices(case)
        step = step_of(op.call(options_of(workload), backend), case)
        steps = {"mfd_fast": step, "floor": ceilings.floor_step(work, workload.torch_dtype, device)}
        times = interleaved(steps, device, seconds, least=3)
        points.append(
            {
                "size": workload.sizes[axis.axis],
                "backend": backend,
                "ms": times["mfd_fast"].median,
                "floor_ms": times["floor"].median,
                "extra_bytes": memory.peak_extra_bytes(step, device),
            }
        )
    return fit(
        {
            "op": axis.op,
            "axis": axis.axis,
            "letter": axis.letter,
            "fixed": {key: value for key, value in axis.sizes.items() if key != axis.axis},
            "backend": backend,
            "points": points,
        }
    )


def fit(grown: dict[str, Any]) -> dict[str, Any]:
    """``grown`` with the exponents of its points; the floor's over the sizes that the time's was fitted over."""
    fitted = [p for p in grown["points"] if p["backend"] == grown["backend"]]
    sizes, times = [float(p["size"]) for p in fitted], [p["ms"] for p in fitted]
    return {
        **grown,
        "time_exponent": fitted_exponent(sizes, times),
        "floor_exponent": fitted_exponent(sizes, times, [p["floor_ms"] for p in fitted]),
        "memory_exponent": fitted_exponent(sizes, [float(p["extra_bytes"] or 0) for p in fitted]),
    }


def measure_all(device: torch.device, said: Callable[[str], None]) -> list[dict[str, Any]]:
    found = []
    for axis in AXES:
        said(f"growth of {axis.op} with {axis.letter}")
        found.append(measure_axis(axis, device))
    return found


def range_of(grown: dict[str, Any]) -> tuple[int, int]:
    """The smallest and the largest size that the exponents were fitted over."""
    sizes = [p["size"] for p in grown["points"] if p["backend"] == grown["backend"]]
    return sizes[0], sizes[-1]


def judgement(grown: dict[str, Any]) -> str:
    """``linear or better``, or what grows faster and whether the machine explains it."""
    words = []
    time, floor, extra = grown["time_exponent"], grown["floor_exponent"], grown["memory_exponent"]
    if time is not None and time > SUPERLINEAR:
        explained = floor is not None and floor > SUPERLINEAR - 0.05
        words.append("super-linear time, as the floor itself (caches)" if explained else "SUPER-LINEAR time")
    if extra is not None and extra > SUPERLINEAR:
        words.append("SUPER-LINEAR memory")
    return "; ".join(words) or "linear or better"
