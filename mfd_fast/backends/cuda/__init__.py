"""CUDA C++ kernels: an NVIDIA GPU of compute capability 8.0 or newer, or the emulator of the tests (CPU tensors).

``MFD_FAST_CUDA_EMULATOR`` names a module that ``tests/cuda_emulator`` has built from the same sources with the host
compiler; the kernels then run on CPU tensors, for checking.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

OLDEST = (8, 0)


def emulating() -> bool:
    """Whether the environment asks for the emulated kernels."""
    return bool(os.environ.get("MFD_FAST_CUDA_EMULATOR"))


@functools.lru_cache(maxsize=1)
def available() -> str | None:
    """None if kernels can run on this machine, else the reason in one sentence."""
    try:
        module = native()
    except ImportError as error:
        return f"the native module does not load: {error}"
    if not hasattr(module, "cuda"):
        return "the native module was built without CUDA (install mfd_fast again where nvcc of CUDA 13 is found)"
    if emulating():
        return None
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "there is no GPU that this PyTorch can use"
    return None


@functools.lru_cache(maxsize=1)
def native() -> ModuleType:
    """The module with the launchers; raises ImportError where there is none."""
    path = os.environ.get("MFD_FAST_CUDA_EMULATOR")
    if not path:
        return importlib.import_module("mfd_fast._C")
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"MFD_FAST_CUDA_EMULATOR={path} is no Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.lru_cache(maxsize=64)
def why_not_device(device: torch.device) -> str | None:
    """None if kernels run on tensors of ``device``, else the reason."""
    if emulating():
        return None if device.type == "cpu" else "MFD_FAST_CUDA_EMULATOR runs kernels on CPU tensors only"
    if device.type != "cuda":
        return f"the tensors are on {device}, not on a GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}; the kernels need 8.0 or newer"
    return None
