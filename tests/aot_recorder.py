"""Records the launches that a wrapper makes, instead of running them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from mfd_fast.backends.triton import launch as launching

Launch = tuple[Any, dict[str, Any], int, int, dict[str, Any]]


def recorded(wanted: str, capability: int, call: Callable[[], Any]) -> Launch:
    """(kernel, arguments, capability, warps, options) of the last launch of the kernel named ``wanted`` during ``call()``."""
    found: dict[str, tuple[Any, dict[str, Any], int, dict[str, Any]]] = {}

    def record(kernel: Any, programs: int, device: Any, warps: int, arguments: dict[str, Any], **options: Any) -> None:
        found[kernel.__name__] = (kernel, arguments, warps, options)

    original = launching.launch
    package = launching.__name__.rsplit(".", 1)[0]
    users = [m for name, m in sys.modules.items() if name.startswith(package) and getattr(m, "launch", None) is original]
    for module in users:
        module.launch = record
    try:
        call()
    finally:
        for module in users:
            module.launch = original
    kernel, arguments, warps, options = found[wanted]
    return kernel, arguments, capability, warps, options
