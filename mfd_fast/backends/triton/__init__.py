"""Triton kernels: an NVIDIA GPU, or any machine with ``TRITON_INTERPRET=1`` (CPU tensors, for checking)."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys

import torch

#: Type of the devices whose tensors compiled kernels read.
DEVICE = "cuda"


def interpreting() -> bool:
    """Whether the environment asks for Triton's interpreter. Triton reads it when kernels are defined."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.lru_cache(maxsize=1)
def available() -> str | None:
    """None if kernels can run on this machine, else the reason in one sentence. Imports nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not interpreting():
        if not torch.cuda.is_available():
            return "there is no GPU, and TRITON_INTERPRET=1 is not set"
        if torch.version.hip is not None:
            return "the kernels are for NVIDIA GPUs"
    language = sys.modules.get("triton.language")
    if language is not None and (type(language.max).__name__ == "InterpretedFunction") != interpreting():
        return "TRITON_INTERPRET was changed after triton had been imported; set it before Python starts"
    return None


def why_not_device(device: torch.device) -> str | None:
    """None if kernels run on tensors of ``device``, else the reason."""
    if interpreting():
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 runs kernels on CPU tensors only"
    return None if device.type == DEVICE else f"the tensors are on {device}, not on a GPU"
