"""Triton without a GPU, for :mod:`.call_overhead`: its binder looks up what it would launch, nothing is launched.

Kernels are not compiled either; whatever does not depend on their code, arguments and their packing, is as on a GPU of
compute capability 9.0. Tensors lie on the CPU, and the outputs are never written.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

#: Of a compiled kernel, where it needs no more than a plain launch.
_METADATA = {
    "num_ctas": 1,
    "shared": 0,
    "launch_cooperative_grid": False,
    "launch_pdl": False,
    "cluster_dims": (1, 1, 1),
    "global_scratch_size": 0,
    "global_scratch_align": 1,
    "profile_scratch_size": 0,
    "profile_scratch_align": 1,
}

_handles = itertools.count(1)

Launcher = Callable[[Any, Any], Callable[..., None]]


def _target() -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", 90, 32)


class _Driver:
    """A GPU as far as Triton's binder asks; ``utils`` is Triton's own where its launcher runs."""

    def __init__(self, utils: Any) -> None:
        self.utils = utils

    def get_current_target(self) -> Any:
        return _target()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


class _Compiled:
    """What the binder keeps of a kernel: its signature, launch and handle; no code."""

    def __init__(self, src: Any, options: dict[str, Any], launcher: Launcher) -> None:
        from triton.compiler import make_backend

        self.src, self.function = src, next(_handles)
        self.metadata = SimpleNamespace(**_METADATA, num_warps=options["num_warps"], function=self.function)
        self.packed_metadata = make_backend(_target()).pack_metadata(self.metadata)
        self.run = launcher(src, self.metadata)

    def launch_metadata(self, *_: Any) -> None:
        return None


def _no_launcher(_: Any, __: Any) -> Callable[..., None]:
    return lambda *_: None


def install(launcher: Launcher = _no_launcher, utils: Any = None, driver: str = "") -> None:
    """For a process, before its first launch: ``launcher`` and ``utils`` may be Triton's, and ``driver`` a library that
    takes the launches of plans; "" takes none.
    """
    import triton
    from triton.runtime import driver as drivers

    from ..backends import triton as backend
    from ..backends.cpu import native
    from ..backends.triton import mfd_loss, program
    from ..backends.triton.launch import recording

    drivers.set_active(_Driver(utils))
    triton.compiler.compile = lambda src, target=None, options=None: _Compiled(src, options, launcher)  # noqa: ARG005
    backend.DEVICE = "cpu"
    backend.available = lambda: None  # type: ignore[assignment]
    native().use_driver(driver)
    original = program.head_gradient

    def head_gradient(dz: Tensor, y: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
        if recording.current is not None:
            return original(dz, y, classes, dtype)
        return torch.empty((classes, y.shape[1]), dtype=dtype)

    mfd_loss.head_gradient = program.head_gradient = head_gradient
