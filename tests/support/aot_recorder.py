"""Records the launches that a wrapper makes: instead of running them, or only their names."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from mfd_fast.backends.triton import launch as launching

Launch = tuple[Any, dict[str, Any], int, int, dict[str, Any]]


def recorded(wanted: str, capability: int, call: Callable[[], Any]) -> Launch:
    """(kernel, arguments, capability, warps, options) of the last launch of ``wanted`` during ``call()``."""
    kernel, arguments, warps, options = [found for found in unlaunched(call) if found[0].__name__ == wanted][-1]
    return kernel, arguments, capability, warps, options


def unlaunched(call: Callable[[], Any]) -> list[tuple[Any, dict[str, Any], int, dict[str, Any]]]:
    """(kernel, arguments, warps, options) of every launch that ``call()`` would make; none of them runs."""
    found: list[tuple[Any, dict[str, Any], int, dict[str, Any]]] = []

    def record(kernel: Any, programs: int, device: Any, warps: int, arguments: dict[str, Any], **options: Any) -> None:
        found.append((kernel, arguments, warps, options))

    with replaced(record):
        call()
    return found


@contextlib.contextmanager
def launched() -> Iterator[list[str]]:
    """The names of the kernels that run inside the block."""
    names: list[str] = []
    original = launching.launch

    def count(kernel: Any, *arguments: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__)
        original(kernel, *arguments, **options)

    with replaced(count):
        yield names


@contextlib.contextmanager
def replaced(launch: Callable[..., None]) -> Iterator[None]:
    """Every wrapper calls ``launch`` instead of the launcher."""
    original = launching.launch
    package = launching.__name__.rsplit(".", 1)[0]
    users = [
        m for name, m in sys.modules.items() if name.startswith(package) and getattr(m, "launch", None) is original
    ]
    for module in users:
        module.launch = launch
    try:
        yield
    finally:
        for module in users:
            module.launch = original
