"""Peak memory beyond the inputs, and kernel launches, of one step."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from .timing import Step, synchronize

T = TypeVar("T")


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be had, None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = dict(line.split(":", 1) for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text)


def peak_extra_bytes(step: Step, device: torch.device) -> int | None:
    """The most that one step holds at a time beyond what lives before it.

    By PyTorch's allocator; on a CPU without the cpu backend's gradient pool, which bypasses it. None if the profiler
    tells nothing.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    with _without_pool():
        events = _profiled(step, [ProfilerActivity.CPU], memory=True)
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    if not changes:
        return None
    now = peak = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        now += nbytes
        peak = max(peak, now)
    return peak


def launches(step: Step, device: torch.device) -> int | None:
    """Kernels of one step on a GPU; a CPU launches none."""
    if device.type != "cuda":
        return None
    return len(kernels(step)[1])


def kernels(step: Callable[[], T]) -> tuple[T, list[str]]:
    """What ``step`` returns, and the names of what it makes a GPU do: kernels, copies, fills."""
    returned: list[T] = []
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    events = _profiled(lambda: returned.append(step()), activities, memory=False)
    return returned[0], [e.name() for e in events if e.device_type() == torch.autograd.DeviceType.CUDA]


def _profiled(step: Step, activities: list[ProfilerActivity], memory: bool) -> list[Any]:
    with _quiet(), profile(activities=activities, profile_memory=memory) as profiler:
        step()
    results = profiler.profiler.kineto_results if profiler.profiler is not None else None
    return list(results.events()) if results is not None else []


@contextlib.contextmanager
def _without_pool() -> Iterator[None]:
    """Gradients come from PyTorch's allocator, which the profiler sees."""
    from ..backends import allocate

    provider = allocate.set_cpu_gradient_provider(None)
    try:
        yield
    finally:
        allocate.set_cpu_gradient_provider(provider)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's native library announces itself on stderr."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
