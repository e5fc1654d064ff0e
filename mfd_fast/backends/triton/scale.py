"""Multiplication of a saved gradient by the gradient of the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import interpreting, kernels, launch

BLOCK = 4096
MAX_PROGRAMS = 1024


def like_gradient(leaf: Tensor) -> Tensor:
    """A tensor as the gradient of ``leaf`` is, uninitialised."""
    return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device)


def scale_gradient_(gradient: Tensor, factor: Tensor) -> Tensor:
    """``gradient *= factor`` (0-d, same device) in place in one kernel, which does nothing where ``factor`` is 1.

    ``gradient`` is contiguous. The host does not wait for the value of ``factor``. Returns ``gradient``.
    """
    n = gradient.numel()
    if n == 0:
        return gradient
    emulate = interpreting() and gradient.dtype == torch.bfloat16  # see launch.gradient
    target = gradient.float() if emulate else gradient
    tl = kernels("rows.scale").tl
    launch(
        kernels("rows.scale").scale_in_place,
        min(-(-n // BLOCK), MAX_PROGRAMS),
        gradient.device,
        8,
        {
            "grad_ptr": target,
            "factor_ptr": factor.contiguous(),
            "n": n,
            "DTYPE": tl.float64 if torch.float64 in (gradient.dtype, factor.dtype) else tl.float32,
            "BLOCK": BLOCK,
        },
    )
    return gradient.copy_(target) if emulate else gradient


def scale_gradients_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Each of the contiguous ``gradients`` ``*= factor``, as :func:`scale_gradient_`, in one launch for all."""
    filled = [g for g in gradients if g.numel()]
    if len(filled) == 1:
        scale_gradient_(filled[0], factor)
    if len(filled) < 2:
        return
    emulate = [interpreting() and g.dtype == torch.bfloat16 for g in filled]  # see launch.gradient
    targets = [g.float() if e else g for g, e in zip(filled, emulate, strict=True)]
    longest = max(g.numel() for g in filled)
    arguments = {
        "grad_ptrs": tuple(targets),
        "lengths": tuple(g.numel() for g in filled),
        "factor_ptr": factor.contiguous(),
        "COUNT": len(filled),
        "BLOCK": BLOCK,
    }
    programs = min(-(-longest // BLOCK), MAX_PROGRAMS)
    launch(kernels("rows.scale").scale_all_in_place, programs, filled[0].device, 8, arguments)
    for g, target in zip(filled, targets, strict=True):
        if target is not g:
            g.copy_(target)
