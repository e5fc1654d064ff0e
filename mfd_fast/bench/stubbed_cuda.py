"""Stands for the native module where ``MFD_FAST_CUDA_EMULATOR`` names this file: CUDA launchers that launch nothing.

Describing a problem costs what it costs; the outputs are never written. For :mod:`.call_overhead`.
"""

from __future__ import annotations

import importlib
from typing import Any

_native: Any = importlib.import_module("mfd_fast._C")


#: Constants where the native module was built without CUDA.
_WITHOUT = {"scalar_workspace": 1 << 16, "mfd_rows": 16, "mfd_terms": 8, "mfd_group": 32}


class _Launchers:
    """Constants and plans as they are built in; launchers that return 0: no scratch memory, no error."""

    @staticmethod
    def pool_plan(*_: object) -> tuple[bool, bool, int]:
        return False, False, 1

    @staticmethod
    def mfd_fits(*_: object) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        built = getattr(getattr(_native, "cuda", None), name, _WITHOUT.get(name))
        if isinstance(built, (int, type)):
            return built
        if name.endswith("Plan"):
            raise AttributeError(name)
        return _nothing


def _nothing(*_: object) -> int:
    return 0


cuda = _Launchers()
if hasattr(_native, "cuda"):
    _native.cuda.set_launching(False)


def __getattr__(name: str) -> Any:
    return getattr(_native, name)
