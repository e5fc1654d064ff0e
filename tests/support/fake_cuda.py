"""A GPU that is the CPU: the lines that only a device takes run here, on CPU tensors.

``install()`` stands in for ``torch.cuda``: events keep the host's clock, streams are nothing, a graph runs its step
again, and tensors that are asked for on "cuda" are made on the CPU. ``calls`` counts what was asked of the device.
``lose()`` makes it a device that no longer answers.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
NAME = "a CPU that plays a GPU"
calls: Counter[str] = Counter()
_lost: list[str] = []
_kept: list[Any] = []


def lose(why: str = "CUDA error: an illegal memory access was encountered") -> None:
    _lost[:] = [why]


def find() -> None:
    _lost.clear()


def _counted(name: str, result: Any = None) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        if _lost and name in ("synchronize", "Event"):
            raise RuntimeError(_lost[0])
        return result

    return call


class Event:
    def __init__(self, **_: Any) -> None:
        _counted("Event")()

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        _counted("synchronize")()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class Stream:
    cuda_stream = 0

    def __init__(self, *_: Any) -> None:
        calls["Stream"] += 1

    def wait_stream(self, _: Stream) -> None:
        calls["wait_stream"] += 1


class Graph:
    """What is captured runs at once; ``replay`` counts."""

    def replay(self) -> None:
        calls["replay"] += 1


def _places(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return CPU
    return CPU if isinstance(value, str) and value.split(":")[0] == "cuda" else value


class OnTheCPU(TorchFunctionMode):
    """Every function that is asked for a tensor on "cuda" makes it on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:  # a name alone places nothing
            return func(*args, **(kwargs or {}))
        kwargs = {k: _places(v) for k, v in (kwargs or {}).items()}
        return func(*(_places(a) for a in args), **kwargs)


FAKES = {
    "Event": Event,
    "Stream": Stream,
    "CUDAGraph": Graph,
    "graph": lambda graph, **_: contextlib.nullcontext(),
    "stream": lambda stream: contextlib.nullcontext(),
    "current_stream": lambda device=None: Stream(device),
    "synchronize": _counted("synchronize"),
    "_sleep": _counted("_sleep"),
    "empty_cache": _counted("empty_cache"),
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda device=None: NAME,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: SimpleNamespace(
        name=NAME, L2_cache_size=1 << 20, total_memory=1 << 34, major=9, minor=0, multi_processor_count=2
    ),
    "mem_get_info": lambda device=None: (1 << 34, 1 << 34),
    "reset_peak_memory_stats": _counted("reset_peak_memory_stats"),
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 1 << 20,
    "is_current_stream_capturing": lambda: False,
    "set_sync_debug_mode": _counted("set_sync_debug_mode"),
}


@contextlib.contextmanager
def installed() -> Any:
    """For a test: everything is as before at the end."""
    before = {name: getattr(torch.cuda, name) for name in FAKES}
    calls.clear()
    find()
    for name, fake in FAKES.items():
        setattr(torch.cuda, name, fake)
    try:
        with OnTheCPU():
            yield calls
    finally:
        for name, real in before.items():
            setattr(torch.cuda, name, real)
        find()


def install() -> None:
    """For a process, to its end."""
    _kept.append(installed())
    _kept[-1].__enter__()
