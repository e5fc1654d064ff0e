"""Launching Triton kernels: lazy import, device guard, number or tensor arguments, the interpreter's quirks."""

from __future__ import annotations

import contextlib
import importlib
import threading
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import allocate, products
from . import interpreting

REGISTER_FILE = 65536  # 32-bit registers of a multiprocessor
MAX_REGISTERS = 255  # of a thread

_modules: dict[str, ModuleType] = {}


def kernels(name: str) -> ModuleType:
    """Module ``mfd_fast.kernels.triton.<name>`` (``folder.module``), imported at the first use."""
    module = _modules.get(name)
    if module is None:
        module = _modules[name] = importlib.import_module(f"mfd_fast.kernels.triton.{name}")
    return module


def compile_options(warps: int) -> dict[str, Any]:
    """How every kernel is compiled.

    Contraction to FMA is off: a student equal to its teacher gives gradients of exactly 0. The register limit is what
    the hardware allows: left to itself the assembler may aim at a higher occupancy and spill.
    """
    registers = min(REGISTER_FILE // (32 * warps), MAX_REGISTERS)
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False, "maxnreg": registers}


class _Recording(threading.local):
    current: Any = None


#: What writes this thread's launches down in place of them (:mod:`.program`), or None.
recording = _Recording()


def launch(
    kernel: Any, programs: int, device: torch.device, warps: int, arguments: dict[str, Any], **more: Any
) -> None:
    """Runs ``kernel`` on ``programs`` programs of the current stream of ``device``; ``more``: compiler options."""
    if recording.current is not None:
        recording.current.launch(kernel, programs, warps, arguments, more)
        return
    if interpreting():
        interpret(kernel, programs, arguments)
        return
    options = compile_options(warps) | more
    if device.index is None or device.index == torch.cuda.current_device():
        kernel[(programs,)](**arguments, **options)
        return
    with torch.cuda.device(device):
        kernel[(programs,)](**arguments, **options)


def interpret(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    """Runs ``kernel`` in Triton's interpreter."""
    with _quiet():
        kernel[(programs,)](**arguments)


def head_gradient(dz: Tensor, y: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """:func:`products.head_gradient` in ``dtype``."""
    if recording.current is not None:
        found: Tensor = recording.current.product(dz, y, classes, dtype)
        return found
    return products.head_gradient(dz, y, classes).to(dtype)


def constants(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` as fields of an argument tuple that are known at compile time."""
    from triton.language import constexpr

    return {name: constexpr(value) for name, value in values.items()}


def aligned(tensor: Tensor | None) -> Tensor | None:
    """``tensor``, contiguous and at a multiple of 16 bytes: a copy where a view begins elsewhere."""
    return None if tensor is None else realigned(tensor.contiguous())


def realigned(tensor: Tensor) -> Tensor:
    """``tensor`` at a multiple of 16 bytes.

    Every alignment of a pointer would compile its kernel anew; what goes through here is small beside the logits.
    """
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def taken(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of ``arguments`` that ``kernel`` has."""
    return {name: arguments[name] for name in kernel.arg_names if name in arguments}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The interpreter computes in NumPy, which warns where IEEE arithmetic gives inf or NaN as it should."""
    import numpy as np

    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def number(value: float | Tensor | None, like: Tensor) -> tuple[float, Tensor | None]:
    """(number, pointer) arguments of a kernel: exactly one of them counts."""
    if value is None:
        return 1.0, None
    if not isinstance(value, Tensor):
        return float(value), None
    if value.device != like.device:  # a 0-d CPU tensor: its value is at hand
        return float(value), None
    return 1.0, aligned(value)


def gradient(like: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(what the kernel writes, what the caller receives): contiguous, of ``like``'s shape and dtype, or of ``dtype``.

    One tensor, but for bfloat16 in the interpreter, whose conversion loses the carry into the exponent.
    """
    out = allocate.empty_large(like.shape, dtype or like.dtype, like.device)
    if interpreting() and out.dtype == torch.bfloat16:
        return allocate.empty(tuple(like.shape), torch.float32, like.device), out
    return out, out


def finish(written: Tensor, out: Tensor) -> Tensor:
    """The second half of :func:`gradient`, after the launch."""
    return out if written is out else out.copy_(written)
