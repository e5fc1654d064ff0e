"""What the fusion modules ask of their inputs, and how they treat absent modalities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..number import is_integer
from ..problems import checks as contract


def check_sizes(op: str, argument: str, value: object) -> tuple[int, ...]:
    """A non-empty sequence of widths >= 1."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise contract.type_error(op, argument, value, "a sequence of widths, one per modality")
    if not value:
        raise contract.value_error(op, argument, value, "at least one width")
    return tuple(check_size(op, f"{argument}[{m}]", width) for m, width in enumerate(value))


def check_size(op: str, argument: str, value: Any) -> int:
    """An int >= 1."""
    if not is_integer(value):
        raise contract.type_error(op, argument, value, "an int")
    if value < 1:
        raise contract.value_error(op, argument, value, "at least 1")
    return int(value)


def check_inputs(op: str, features: object, widths: Sequence[int | None], row_dims: int | None = None) -> list[Tensor]:
    """M floating tensors ``[..., D_m]`` with one set of leading dimensions, on one device.

    ``widths``: D_m, or None where any width will do. ``row_dims``: only so many leading dimensions must agree.
    """
    if isinstance(features, Tensor) and features.dim() >= 2:
        features = features.unbind(-2)
    if isinstance(features, (str, Tensor)) or not isinstance(features, Sequence):
        raise contract.type_error(op, "features", features, "a sequence of tensors or one tensor [..., M, D]")
    if len(features) != len(widths):
        raise ValueError(f"{op}: features must hold {len(widths)} modalities, got {len(features)}")
    found = [contract.check_floating(op, f"features[{m}]", x) for m, x in enumerate(features)]
    for m, (x, width) in enumerate(zip(found, widths, strict=True)):
        check_input(op, f"features[{m}]", x, width, found[0], row_dims)
    return found


def check_input(
    op: str, argument: str, value: Tensor, width: int | None, first: Tensor, row_dims: int | None = None
) -> None:
    """``value [..., width]`` whose leading dimensions and device are those of ``first``."""
    leading = first.shape[: (first.dim() - 1 if row_dims is None else row_dims)]
    agrees = value.dim() >= 1 and value.shape[: (value.dim() - 1 if row_dims is None else row_dims)] == leading
    if not agrees or (width is not None and value.shape[-1] != width):
        middle = [] if row_dims is None else ["..."]
        shape = [*leading, *middle, "D" if width is None else width]
        raise contract.value_error(op, argument, value, f"of shape [{', '.join(map(str, shape))}]")
    contract.check_device(op, argument, value, first.device)


def check_parameter_dtype(op: str, argument: str, value: Tensor, parameter: Tensor) -> None:
    """The dtype of the module's parameters, except under autocast, which casts both."""
    if value.dtype != parameter.dtype and not torch.is_autocast_enabled(value.device.type):
        dtype = str(parameter.dtype).removeprefix("torch.")
        raise contract.type_error(op, argument, value, f"{dtype} as the module's parameters (or call under autocast)")


def check_present(op: str, present: object, leading: torch.Size, modalities: int, device: torch.device) -> None:
    """None or bool ``[..., M]``."""
    if present is not None:
        contract.check_row_tensor(op, "present", present, torch.Size([*leading, modalities]), device, torch.bool)


def zero_absent(value: Tensor, here: Tensor) -> Tensor:
    """``value`` with 0 where bool ``here`` is False: what an absent modality holds (NaN too) has no effect."""
    return torch.where(here, value, torch.zeros((), dtype=value.dtype, device=value.device))


def uniform_(parameter: Any, fan_in: int) -> None:
    """U(±1/√fan_in): what ``torch.nn.Linear`` starts from."""
    bound = fan_in**-0.5
    nn.init.uniform_(parameter, -bound, bound)
