"""pytest plugin that plants one fault in one backend, with the effect that a slip in its kernels would have.

    MFD_FAST_SEEDED_FAULT="missing mask" pytest -p seeded_fault --tier quick tests

The fault acts where the public op is called, so it outlives every rewriting of the kernels.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest

Call = Callable[..., Any]
Fault = Callable[[Call, dict[str, Any]], Any]


def _with_gradient(argument: str, change: Callable[[Any, dict[str, Any]], Any]) -> Fault:
    """A fault that changes the gradient to an argument."""

    def fault(op: Call, arguments: dict[str, Any]) -> Any:
        import torch

        class Changed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Any) -> Any:
                return x.view_as(x)

            @staticmethod
            def backward(ctx: Any, grad_output: Any) -> Any:  # type: ignore[override]
                return change(grad_output, arguments)

        value = arguments[argument]
        return op(**{**arguments, argument: Changed.apply(value) if value.requires_grad else value})

    return fault


def _drop_temperature(grad: Any, arguments: dict[str, Any]) -> Any:
    temperature = arguments.get("temperature", 1.0)
    return grad / temperature if isinstance(temperature, float) else grad


def _skip_last_column(grad: Any, _: dict[str, Any]) -> Any:
    """The columns after the last whole vector lose their last one."""
    grad = grad.clone()
    if grad.shape[-1] % 8:
        grad[..., -1] = 0
    return grad


def _forget_mask(op: Call, arguments: dict[str, Any]) -> Any:
    return op(**{**arguments, "mask": None})


def _forget_strides(op: Call, arguments: dict[str, Any]) -> Any:
    """Rows of the teacher are taken to follow each other where they do not."""
    import torch

    teacher = arguments["teacher"]
    if isinstance(teacher, torch.Tensor) and teacher.dim() > 1 and not teacher.requires_grad:
        strides = torch.empty(teacher.shape, device="meta").stride()
        last = teacher.storage_offset() + sum((n - 1) * s for n, s in zip(teacher.shape, strides, strict=True))
        if teacher.numel() and last < teacher.untyped_storage().nbytes() // teacher.element_size():
            teacher = teacher.as_strided(teacher.shape, strides)
    return op(**{**arguments, "teacher": teacher})


def _lose_nan(op: Call, arguments: dict[str, Any]) -> Any:
    return op(**arguments).nan_to_num(nan=0.0, posinf=float("inf"), neginf=float("-inf"))


#: Name -> (backend, fault). They are those of distill_loss.
FAULTS: dict[str, tuple[str, Fault]] = {
    "dropped temperature": ("triton", _with_gradient("student", _drop_temperature)),
    "missing mask": ("cuda", _forget_mask),
    "off-by-one tail": ("cpu", _with_gradient("student", _skip_last_column)),
    "wrong stride": ("triton", _forget_strides),
    "lost NaN": ("reference", _lose_nan),
}


def pytest_configure(config: pytest.Config) -> None:
    """After conftest has made its settings."""
    import inspect

    import op_db

    import mfd_fast as mfd

    backend, fault = FAULTS[os.environ["MFD_FAST_SEEDED_FAULT"]]
    sound = mfd.distill_loss
    signature = inspect.signature(sound)

    @functools.wraps(sound)
    def faulty(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        return fault(sound, arguments) if arguments.get("backend") == backend else sound(**arguments)

    mfd.distill_loss = faulty
    object.__setattr__(op_db.RECORDS["distill_loss"], "op", faulty)
