"""Stands for the native module where ``MFD_FAST_CUDA_EMULATOR`` names this file: CUDA launchers that launch nothing.

Describing a problem costs what it costs; the outputs are never written. For :mod:`.call_overhead`.
"""

from __future__ import annotations

import importlib
from typing import Any

_native: Any = importlib.import_module("mfd_fast._C")


class _Launchers:
    """Constants as they are built in; launchers that return 0: no scratch memory, no error."""

    #: Where the native module was built without CUDA.
    scalar_workspace, mfd_rows, mfd_terms, mfd_group = 1 << 16, 16, 8, 32

    @staticmethod
    def pool_plan(*_: object) -> tuple[bool, bool, int]:
        return False, False, 1

    @staticmethod
    def mfd_fits(*_: object) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        built = getattr(getattr(_native, "cuda", None), name, None)
        return built if isinstance(built, int) else _nothing


def _nothing(*_: object) -> int:
    return 0


cuda = _Launchers()


def __getattr__(name: str) -> Any:
    return getattr(_native, name)
