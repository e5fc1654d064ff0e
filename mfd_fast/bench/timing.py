"""Interleaved timing: all steps in turn, the order rotating from round to round, medians with quartiles.

On a GPU a time is the device's: it sleeps while the host queues what is timed, so that no launch comes late. What a
call costs the host is another number, :func:`host_times`.
"""

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
CYCLES_PER_SECOND = 2e9  # of a GPU's clock, or somewhat more
HEAD_START, MOST_SLEEP = 3.0, 0.05  # how many times as long as the host queues the device sleeps; seconds at most
MOST_QUEUED = 20  # calls: a GPU takes about a thousand launches before the host waits
HOST_ROUNDS = 5


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


def once(step: Step, device: torch.device, calls: int = 1, ahead: float = 0.0) -> float:
    """Milliseconds per call of ``calls`` calls; a GPU sleeps ``ahead`` seconds before them."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if ahead:
            torch.cuda._sleep(int(ahead * CYCLES_PER_SECOND))
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


def host_seconds(step: Step, device: torch.device, calls: int = 1) -> float:
    """Until the host has queued ``calls`` calls, per call; the device is waited for before and after."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    spent = time.perf_counter() - begin
    synchronize(device)
    return spent / calls


def host_times(steps: Mapping[str, Step], device: torch.device) -> dict[str, Times]:
    """What a call costs the host, be the device's work as long as it may: the latency of a call."""
    found: dict[str, Times] = {}
    for name, step in steps.items():
        calls = max(3, min(MOST_QUEUED, round(MOST_SLEEP / max(once(step, device) / 1e3, 1e-6))))
        found[name] = Times([1e3 * host_seconds(step, device, calls) for _ in range(HOST_ROUNDS)])
    return found


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
    sample of a short step needs, and how long a GPU sleeps before it. The garbage collector rests meanwhile.
    """
    names = list(steps)
    calls, ahead = dict.fromkeys(names, 1), dict.fromkeys(names, 0.0)
    for name in names:
        synchronize(device)
        steps[name]()
        synchronize(device)
        spent = once(steps[name], device) / 1e3
        if flush is None and spent < SAMPLE_SECONDS:
            most_calls = MOST_QUEUED if device.type == "cuda" else 1000
            calls[name] = min(most_calls, round(SAMPLE_SECONDS / max(spent, 1e-7)) + 1)
        if device.type == "cuda":
            ahead[name] = min(HEAD_START * host_seconds(steps[name], device) * calls[name], MOST_SLEEP)
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
                samples[name].append(once(steps[name], device, calls[name], ahead[name]))
            turn += 1
    finally:
        if collecting:
            gc.enable()
    return {name: Times(found) for name, found in samples.items()}
