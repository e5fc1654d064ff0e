"""Contract checks: every violation raises before any work and names the op, the argument, what it got
and what it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..divergences import DIVERGENCES, Divergence
from ..number import is_integer, is_real, plain
from ..types import LogitTransform

T = TypeVar("T")

FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
INTEGER = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
REDUCTIONS = ("mean", "sum", "none")
#: More than a tensor has: what `check_transform` gets before there is one.
ANY_COLUMNS = 2**62


def describe(value: object) -> str:
    """Short description of what an argument was."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if value.is_nested:
            return f"a nested {dtype} tensor on {value.device}"
        kind = "" if value.layout == torch.strided else str(value.layout).removeprefix("torch.") + " "
        return f"a {kind}{dtype} tensor of shape {list(value.shape)} on {value.device}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def value_error(op: str, argument: str, got: object, expected: str) -> ValueError:
    return ValueError(f"{op}: {argument} must be {expected}, got {describe(got)}")


def type_error(op: str, argument: str, got: object, expected: str) -> TypeError:
    return TypeError(f"{op}: {argument} must be {expected}, got {describe(got)}")


def label_error(op: str, row: int, value: int, classes: int) -> ValueError:
    return ValueError(f"{op}: labels must be in [0, {classes}) or ignore_index, got {value} in row {row}")


def is_number(value: object) -> bool:
    kind = type(value)
    if kind is float or kind is int:
        return True
    # SymInt and SymFloat: numbers that torch.compile traces instead of baking them in.
    return isinstance(value, (torch.SymInt, torch.SymFloat)) or is_real(value)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_dense(op: str, argument: str, value: object) -> Tensor:
    """A tensor with strides: not sparse, nested or of another library's layout, and :func:`usable`."""
    if type(value) is not Tensor:
        if not isinstance(value, Tensor):
            raise type_error(op, argument, value, "a tensor")
        if isinstance(value, (UninitializedBuffer, UninitializedParameter)):
            got = f"an uninitialized {type(value).__name__}"
            raise TypeError(f"{op}: {argument} must be a tensor with values, got {got}")
    if value.layout is not torch.strided or value.is_nested:
        raise type_error(op, argument, value, "a dense tensor")
    foreign = type(value) is not Tensor and is_foreign(value)
    if not foreign and not foreign_execution():
        return usable(op, argument, value)
    if not foreign:
        check_mode(op, argument, value)
    return value


def check_mode(op: str, argument: str, value: Tensor) -> None:
    """FakeTensorMode computes with its own tensors only, unless it was told otherwise."""
    if torch.compiler.is_compiling():
        return
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    if mode is not None and not mode.allow_non_fake_inputs:
        raise type_error(op, argument, value, "a fake tensor under FakeTensorMode")


def is_foreign(value: Tensor) -> bool:
    """Whether another library executes this tensor's operations: it may have no memory of its own."""
    kind = type(value)
    return kind is not Tensor and kind is not Parameter and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def foreign_execution() -> bool:
    """Whether somebody else executes every operation: a compiler, a tracer, a dispatch mode or torch.func.

    Then values must not be read, and tensors may have no memory.
    """
    if torch.compiler.is_compiling():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or is_transformed() or torch._C._is_tracing()


def is_recorded() -> bool:
    """Whether a compiler or a dispatch mode (fake tensors, make_fx) sees every operation: it gets registered ops."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and not is_transformed()


def is_transformed() -> bool:
    """Whether torch.func (grad, vmap, jvp, ...) or forward derivatives look into every operation: no kernel can run."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def by_pytorch(op: str, named_tensors: Callable[[], list[tuple[str, Tensor]]], compute: Callable[[], T]) -> T:
    """``compute()``: plain PyTorch or registered ops. TypeError where PyTorch cannot compute with a tensor."""
    if torch.compiler.is_compiling():
        return compute()
    try:
        return compute()
    except ValueError:
        raise
    except Exception as error:
        for name, value in named_tensors():
            if is_foreign(value):
                got = f"{type(value).__name__} ({type(error).__name__}: {error})"
                raise TypeError(f"{op}: {name} must be a tensor that PyTorch can compute with, got {got}") from error
        raise


def usable(op: str, argument: str, value: Tensor) -> Tensor:
    """``value`` as memory that a kernel can read as it stands and autograd can save; no element is copied but for a
    negative view.
    """
    if value.is_neg():
        value = value.resolve_neg()
    if value.is_inference() and not torch.is_inference_mode_enabled():
        # The same memory as an ordinary tensor, which save_for_backward takes.
        storage = value.untyped_storage()
        alias = torch.empty(0, dtype=value.dtype, device=value.device)
        value = alias.set_(storage, value.storage_offset(), value.size(), value.stride())
    if not has_memory(value):
        raise TypeError(f"{op}: {argument} must be a tensor with memory, got {describe(value)} whose storage was freed")
    return value


def upstream(gradient: Tensor) -> Tensor:
    """What autograd hands to a backward, as memory that a kernel can read."""
    if gradient._is_zerotensor():
        return torch.zeros_like(gradient)
    return gradient.resolve_neg() if gradient.is_neg() else gradient


def has_memory(value: Tensor) -> bool:
    """Whether the storage holds every element that the shape and the strides address."""
    count = value.numel() if value.is_contiguous() else _extent(value)
    return count == 0 or (value.storage_offset() + count) * value.itemsize <= value.untyped_storage().nbytes()


def _extent(value: Tensor) -> int:
    """Elements from the first to the last that is addressed, both included."""
    if value.numel() == 0:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))


def check_floating(op: str, argument: str, value: object) -> Tensor:
    tensor = check_dense(op, argument, value)
    if tensor.dtype not in FLOATING:
        raise type_error(op, argument, value, "a float16, bfloat16, float32 or float64 tensor")
    return tensor


def check_device(op: str, argument: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise value_error(op, argument, value, f"on {device}")


def check_choice(op: str, argument: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise value_error(op, argument, value, "one of " + ", ".join(map(repr, choices)))


def check_bool(op: str, argument: str, value: object) -> None:
    if not isinstance(value, bool):
        raise type_error(op, argument, value, "a bool")


def check_scalar(
    op: str, argument: str, value: object, *, positive: bool = False, dtype: torch.dtype = torch.float32
) -> float | Tensor:
    """A finite number or a 0-d tensor, whose value is not read: no synchronisation. Integer tensors get ``dtype``."""
    low = 0.0 if positive else -math.inf
    if type(value) is float and low < value < math.inf:
        return value
    if isinstance(value, Tensor):
        return _check_zero_dim(op, argument, check_number_tensor(op, argument, value), dtype)
    if not is_number(value):
        raise type_error(op, argument, value, "a number or a 0-d tensor")
    if not low < value < math.inf:  # type: ignore[operator]
        raise value_error(op, argument, value, "a finite number > 0" if positive else "a finite number")
    return plain(value)  # type: ignore[no-any-return]


def check_number_tensor(op: str, argument: str, value: object) -> Tensor:
    """A floating tensor, or a 0-d one of integers: a count."""
    tensor = check_dense(op, argument, value)
    return tensor if tensor.dim() == 0 and tensor.dtype in INTEGER else check_floating(op, argument, tensor)


def _check_zero_dim(op: str, argument: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if value.dim() != 0:
        raise value_error(op, argument, value, "a number or a 0-d tensor")
    return value.to(dtype) if value.dtype in INTEGER else value


def check_row_tensor(
    op: str,
    argument: str,
    value: object,
    leading: torch.Size,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Tensor:
    """One value per row: shape ``[...]``. ``dtype`` None accepts any floating dtype."""
    tensor = check_floating(op, argument, value) if dtype is None else check_dense(op, argument, value)
    if dtype is not None and tensor.dtype != dtype:
        raise type_error(op, argument, value, f"a {str(dtype).removeprefix('torch.')} tensor")
    if tensor.shape != leading:
        raise value_error(op, argument, value, f"of shape {list(leading)} (one value per row)")
    check_device(op, argument, tensor, device)
    return tensor


def flat(value: Tensor) -> Tensor:
    """``[...]`` to contiguous ``[N]``."""
    return value if value.dim() == 1 and value.is_contiguous() else value.reshape(-1).contiguous()


def can_read(value: Tensor) -> bool:
    """Values are checked on a CPU only: elsewhere, the check would wait for the device."""
    return value.device.type == "cpu" and not is_foreign(value) and not foreign_execution() and value.numel() > 0


def extremes(values: Tensor, exists: Tensor | None = None) -> tuple[float, float]:
    """Smallest and largest value, NaN if one is; ``exists`` ``[N]`` leaves out rows of ``[N, ...]``."""
    kept = values.detach() if exists is None else values.detach()[exists]
    if not kept.numel():
        return 1.0, 1.0
    low, high = kept.aminmax()
    return low.item(), high.item()


def temperature_range(dtype: torch.dtype) -> tuple[float, float]:
    """Where T² and 1/T² are normal numbers of the arithmetic's dtype."""
    # Literals: torch.compile makes symbols of floats that it reads elsewhere.
    return (2.0**-511, 2.0**511) if dtype == torch.float64 else (2.0**-63, 2.0**63)


def check_temperature(
    op: str,
    argument: str,
    value: object,
    leading: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
) -> float | Tensor:
    """float, or a tensor (0-d or ``[N]``) of the compute dtype on the logits' device, still in the graph.

    ``mask`` and ``labels`` ``[N]`` say which rows exist; the values of the others are not looked at.
    """
    least, most = temperature_range(dtype)
    if not isinstance(value, Tensor):
        number = check_scalar(op, argument, value, positive=True)
        if not least <= number <= most:
            raise value_error(op, argument, value, f"between {least:g} and {most:g} for {dtype} arithmetic")
        return number
    value = check_number_tensor(op, argument, value)
    if value.dim() != 0:
        value = flat(check_row_tensor(op, argument, value, leading, device, None))
    value = value.to(device=device, dtype=dtype)
    if can_read(value):
        low, high = extremes(value)
        if value.dim() and not least <= low <= high <= most:
            low, high = extremes(value, counted_rows(mask, labels, ignore_index))
        if not 0 < low <= high < math.inf:  # NaN too
            raise ValueError(f"{op}: {argument} must be finite and > 0, got values from {low} to {high}")
        if not least <= low <= high <= most:
            need = f"between {least:g} and {most:g} for {dtype} arithmetic"
            raise ValueError(f"{op}: {argument} must be {need}, got values from {low} to {high}")
    return value


def check_transform(op: str, argument: str, value: object, columns: int) -> int:
    """Number of columns that are used."""
    if value is None:
        return columns
    if not isinstance(value, LogitTransform):
        raise type_error(op, argument, value, "a LogitTransform or None")
    if value.classes is None:
        return columns
    if value.classes > columns:
        raise ValueError(f"{op}: {argument}.classes must be at most {columns} (the columns), got {value.classes}")
    return value.classes


def check_divergence(op: str, value: object, labels: Tensor | None) -> Divergence:
    """The canonical divergence: the one place where a name or an end point becomes what it stands for."""
    if isinstance(value, str):
        check_choice(op, "divergence", value, tuple(DIVERGENCES))
        value = DIVERGENCES[value]
    elif not isinstance(value, Divergence) or type(value) is Divergence:
        raise type_error(op, "divergence", value, "a name or a Divergence")
    if value.needs_labels and labels is None:
        raise value_error(op, "labels", labels, f"given for {value}")
    return value.canonical()


def check_smoothing(op: str, value: object) -> float:
    if not is_number(value):
        raise type_error(op, "label_smoothing", value, "a number")
    if not 0.0 <= value <= 1.0:  # type: ignore[operator]
        raise value_error(op, "label_smoothing", value, "in [0, 1]")
    return plain(value)  # type: ignore[no-any-return]


def check_ignore_index(op: str, value: object) -> int:
    if type(value) is int:
        return value
    if not is_integer(value):
        raise type_error(op, "ignore_index", value, "an int")
    return plain(value)  # type: ignore[no-any-return]


def counted_rows(mask: Tensor | None, labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """Bool ``[N]``, True where a row exists; None when all do."""
    if labels is None:
        return mask
    not_ignored = labels != ignore_index
    return not_ignored if mask is None else mask & not_ignored


def is_used(weight: float | Tensor) -> bool:
    """A term whose weight is the number 0 is not computed."""
    return isinstance(weight, Tensor) or weight != 0
