"""Interleaved timing: all steps in turn, the order rotating from round to round, medians with quartiles."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Step = Callable[[], object]

SAMPLE_SECONDS = 5e-4  # a sample of a shorter step is several calls
LEAST_ROUNDS, MOST_ROUNDS = 5, 200


@dataclass(frozen=True)
class Times:
    """Milliseconds per call, one sample per round."""

    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Flusher:
    """Evicts the last-level cache by reading and writing twice its size."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.buffer = torch.zeros(max(nbytes, 1) * 2 // 4, dtype=torch.float32, device=device)

    def __call__(self) -> None:
        self.buffer.add_(1.0)


def once(step: Step, device: torch.device, calls: int = 1) -> float:
    """Milliseconds per call of ``calls`` calls."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / calls
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    return 1e3 * (time.perf_counter() - begin) / calls


def interleaved(
    steps: Mapping[str, Step],
    device: torch.device,
    seconds: float,
    *,
    flush: Step | None = None,
    least: int = LEAST_ROUNDS,
    most: int = MOST_ROUNDS,
) -> dict[str, Times]:
    """Times of every step over ``least`` to ``most`` rounds in about ``seconds``.

    ``flush`` runs untimed before every sample; a sample is then one call. Two rounds warm up and set how many calls a
    sample of a short step needs. The garbage collector rests meanwhile.
    """
    names = list(steps)
    calls = dict.fromkeys(names, 1)
    for name in names:
        synchronize(device)
        steps[name]()
        synchronize(device)
        spent = once(steps[name], device) / 1e3
        if flush is None and spent < SAMPLE_SECONDS:
            calls[name] = min(1000, round(SAMPLE_SECONDS / max(spent, 1e-7)) + 1)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        turn = 0
        while turn < least or (turn < most and time.perf_counter() < end):
            for place in range(len(names)):
                name = names[(turn + place) % len(names)]
                if flush is not None:
                    flush()
                synchronize(device)
                samples[name].append(once(steps[name], device, calls[name]))
            turn += 1
    finally:
        if collecting:
            gc.enable()
    return {name: Times(found) for name, found in samples.items()}
