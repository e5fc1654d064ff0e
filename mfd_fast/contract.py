"""Contract checks: every violation raises before any work and names the op, the argument, what it got
and what it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from .divergences import DIVERGENCES, DKD, NKD, AlphaBeta, Divergence, ReverseKL
from .number import is_integer, is_real, plain
from .rows import Rows, TopKRows, counted_rows
from .types import LogitTransform, TopK

Result = TypeVar("Result")

FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
INTEGER = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
REDUCTIONS = ("mean", "sum", "none")
#: Where T² and 1/T² are normal numbers: (least, most) by the dtype of the arithmetic.
TEMPERATURES = {torch.float32: (2.0**-63, 2.0**63), torch.float64: (2.0**-511, 2.0**511)}


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
    if not isinstance(value, Tensor):
        raise type_error(op, argument, value, "a tensor")
    if isinstance(value, (UninitializedBuffer, UninitializedParameter)):
        raise TypeError(f"{op}: {argument} must be a tensor with values, got an uninitialized {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise type_error(op, argument, value, "a dense tensor")
    if is_foreign(value):
        return value
    if foreign_execution():
        check_mode(op, argument, value)
        return value
    return usable(op, argument, value)


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


def why_no_kernel(tensors: Mapping[str, Tensor | None]) -> str | None:
    """None if kernels can read these arguments, else the reason."""
    for name, value in tensors.items():
        if value is not None and is_foreign(value):
            return f"{name} is a {type(value).__name__}, which has no memory that a kernel could read"
    if is_transformed():
        return "a transform of torch.func or a forward derivative looks into every operation"
    return None


def by_pytorch(op: str, tensors: Mapping[str, Tensor | None], compute: Callable[[], Result]) -> Result:
    """``compute()``: plain PyTorch or registered ops. TypeError where PyTorch cannot compute with a tensor."""
    if torch.compiler.is_compiling():
        return compute()
    try:
        return compute()
    except ValueError:
        raise
    except Exception as error:
        for name, value in tensors.items():
            if value is not None and is_foreign(value):
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
    end = (value.storage_offset() + count) * value.itemsize
    return count == 0 or value.device.type == "meta" or end <= value.untyped_storage().nbytes()


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
    least, most = TEMPERATURES[dtype]
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


def check_topk(op: str, topk: TopK, divergence: Divergence, transform: object, n_rows: int, classes: int) -> TopKRows:
    """How the values are meant. The indices are left to :func:`check_indices`, which reads them."""
    if transform is not None:
        raise ValueError(f"{op}: teacher_transform needs the whole row of teacher logits, got a TopK teacher")
    width = topk.values.shape[-1]
    if width > classes:
        raise ValueError(f"{op}: teacher must list at most {classes} classes (the student's), got K = {width}")
    tail = "renormalize" if width == classes else topk.tail
    logprobs = topk.values_are == "logprobs"
    if tail == "zero" and isinstance(divergence, (DKD, NKD)):
        raise ValueError(f"{op}: {divergence.name} needs a whole teacher distribution, got TopK(tail='zero')")
    alpha, beta = divergence.parameters
    if (tail == "zero" or (tail == "bucket" and not logprobs)) and (
        isinstance(divergence, ReverseKL) or (isinstance(divergence, AlphaBeta) and (alpha <= 0 or alpha + beta <= 0))
    ):
        got = f"TopK(tail={tail!r}, values_are={topk.values_are!r})"
        raise ValueError(f"{op}: {divergence} is infinite where the teacher is 0, got {got}")
    indices = topk.indices.reshape(n_rows, width).to(torch.int64).contiguous()
    return TopKRows(indices, tail, logprobs)


def check_log_probabilities(op: str, topk: TopK, counted: Tensor | None) -> None:
    """None of those of a counted row is above 0, beyond rounding; on a CPU only, where the check is free.

    +inf is left to the arithmetic, which gives NaN for its row.
    """
    if topk.values_are != "logprobs" or not can_read(topk.values):
        return
    values = topk.values.detach()
    positive = (values > 64 * torch.finfo(values.dtype).eps) & (values < math.inf)
    positive = positive.reshape(-1, values.shape[-1])
    if counted is not None and positive.any():
        positive &= counted[:, None]
    if positive.any():
        row = int(positive.any(-1).nonzero()[0])
        found = float(values.reshape(positive.shape)[row][positive[row]][0])
        raise ValueError(
            f"{op}: teacher.values must be log-probabilities <= 0, got {found:g} in row {row}; "
            "for logits pass TopK(values_are='logits')"
        )


def check_teacher_weights(
    op: str,
    value: object,
    count: int,
    leading: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
    mask: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
) -> Tensor | None:
    """``[count]`` or ``[N, count]`` summing to 1 in each row, still in the graph; equal in rows that do not exist."""
    if value is None:
        return None
    weights = check_floating(op, "teacher_weights", value)
    if weights.shape not in ((count,), (*leading, count)):
        need = f"of shape [{count}] or {[*leading, count]} (one value per teacher)"
        raise value_error(op, "teacher_weights", weights, need)
    check_device(op, "teacher_weights", weights, device)
    weights = weights.to(dtype)
    per_row = weights.dim() > 1 or len(leading) == 0
    weights = weights.reshape(-1, count) if per_row else weights
    exists = counted_rows(mask, labels, ignore_index) if per_row else None
    if exists is not None:
        weights = torch.where(exists[:, None], weights, torch.ones_like(weights))
    total = weights.sum(-1, keepdim=True)
    if can_read(weights):
        low, high = extremes(weights)
        least, most = extremes(total)
        if not (0 <= low <= high < math.inf and 0 < least <= most < math.inf):  # NaN too
            raise ValueError(
                f"{op}: teacher_weights must be finite and >= 0 with a finite sum > 0, "
                f"got values from {low} to {high} and sums from {least} to {most}"
            )
    return (weights / total).contiguous()


def check_smoothing(op: str, value: object) -> float:
    if not is_number(value):
        raise type_error(op, "label_smoothing", value, "a number")
    if not 0.0 <= value <= 1.0:  # type: ignore[operator]
        raise value_error(op, "label_smoothing", value, "in [0, 1]")
    return plain(value)  # type: ignore[no-any-return]


def check_ignore_index(op: str, value: object) -> int:
    if not is_integer(value):
        raise type_error(op, "ignore_index", value, "an int")
    return plain(value)  # type: ignore[no-any-return]


def check_class_dimension(op: str, argument: str, value: object, shape: torch.Size) -> None:
    """Logits ``[B, C, ...]``, as ``F.cross_entropy`` has them, show in what has one value per row."""
    if isinstance(value, Tensor) and len(shape) > 2 and value.shape == (shape[0], *shape[2:]) != shape[:-1]:
        raise ValueError(
            f"{op}: {argument} of shape {list(value.shape)} fits classes in dimension 1 of the student's "
            f"{list(shape)}, here they are the last: pass student.movedim(1, -1), and the teacher likewise"
        )


def check_teachers(op: str, teacher: object, leading: torch.Size, device: torch.device) -> tuple[Tensor, ...]:
    """The teachers' tensors: one, or those of a sequence."""
    several = isinstance(teacher, Sequence)
    given: tuple[object, ...] = tuple(teacher) if isinstance(teacher, Sequence) else (teacher,)
    if not given:
        raise value_error(op, "teacher", teacher, "a tensor, a TopK or a non-empty sequence of tensors")
    teachers = []
    for k, value in enumerate(given):
        name = f"teacher[{k}]" if several else "teacher"
        tensor = check_floating(op, name, value)
        if tensor.dim() < 1 or tensor.shape[:-1] != leading:
            raise value_error(op, name, tensor, f"of shape {[*leading, 'C']} (the student's leading dimensions)")
        check_device(op, name, tensor, device)
        teachers.append(tensor)
    return tuple(teachers)


def check_rows(
    op: str,
    student: Tensor,
    teacher: Tensor | TopK | Sequence[Tensor],
    labels: Tensor | None,
    *,
    teacher_weights: Tensor | None = None,
    divergence: str | Divergence = "forward_kl",
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    student_transform: LogitTransform | None = None,
    teacher_transform: LogitTransform | None = None,
    scale_by_temperature: bool = True,
) -> Rows:
    """Checks the arguments that distill_loss and distill_terms share and brings them to one form."""
    student = check_floating(op, "student", student)
    if student.dim() < 1:
        raise value_error(op, "student", student, "of shape [..., C]")
    leading, device = student.shape[:-1], student.device
    teachers = check_teachers(op, teacher.values if isinstance(teacher, TopK) else teacher, leading, device)

    classes = check_transform(op, "student_transform", student_transform, student.shape[-1])
    for tensor in () if isinstance(teacher, TopK) else teachers:
        teacher_classes = check_transform(op, "teacher_transform", teacher_transform, tensor.shape[-1])
        if classes != teacher_classes:
            raise ValueError(
                f"{op}: teacher must have as many classes as student, got {teacher_classes} and {classes}; "
                "for padded heads pass LogitTransform(classes=...) for the wider side"
            )
    if classes < 1:
        raise value_error(op, "student", student, "of shape [..., C] with C >= 1")

    dtype = compute_dtype(student, *teachers)
    for name, value in (("labels", labels), ("mask", mask)):
        check_class_dimension(op, name, value, student.shape)
    if labels is not None:
        labels = flat(check_row_tensor(op, "labels", labels, leading, device, torch.int64))
    if mask is not None:
        mask = flat(check_row_tensor(op, "mask", mask, leading, device, torch.bool))
    ignore_index = check_ignore_index(op, ignore_index)
    exists = (mask, labels, ignore_index)
    temperature = check_temperature(op, "temperature", temperature, leading, device, dtype, *exists)
    if teacher_temperature is None:
        teacher_temperature = temperature
    else:
        teacher_temperature = check_temperature(
            op, "teacher_temperature", teacher_temperature, leading, device, dtype, *exists
        )
    divergence = check_divergence(op, divergence, labels)
    topk = None
    if isinstance(teacher, TopK):
        check_device(op, "teacher.indices", check_dense(op, "teacher.indices", teacher.indices), device)
        check_log_probabilities(op, teacher, counted_rows(mask, labels, ignore_index))
        topk = check_topk(op, teacher, divergence, teacher_transform, leading.numel(), classes)
    if teacher_weights is not None and not isinstance(teacher, Sequence):
        raise value_error(op, "teacher", teacher, "a sequence of tensors when teacher_weights is given")
    teacher_weights = check_teacher_weights(op, teacher_weights, len(teachers), leading, device, dtype, *exists)
    label_smoothing = check_smoothing(op, label_smoothing)
    check_bool(op, "scale_by_temperature", scale_by_temperature)
    return Rows(
        student,
        teachers[0],
        labels,
        mask,
        temperature,
        teacher_temperature,
        divergence,
        label_smoothing,
        ignore_index,
        student_transform if student_transform is not None and student_transform.changes_values else None,
        teacher_transform if teacher_transform is not None and teacher_transform.changes_values else None,
        scale_by_temperature,
        leading.numel(),
        classes,
        dtype,
        op,
        topk,
        teachers[1:],
        teacher_weights if len(teachers) > 1 else None,
    )


def check_reduction(op: str, reduction: object, normalizer: object, dtype: torch.dtype) -> float | Tensor | None:
    """The normalizer."""
    check_choice(op, "reduction", reduction, REDUCTIONS)
    if normalizer is None:
        return None
    if reduction != "mean":
        raise ValueError(f"{op}: normalizer replaces the row count of reduction='mean', got {reduction!r}")
    return check_scalar(op, "normalizer", normalizer, positive=True, dtype=dtype)


def check_weight(
    op: str, weight: object, leading: torch.Size, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """One factor per row as contiguous ``[N]`` of ``dtype``, still in the graph."""
    return None if weight is None else flat(check_row_tensor(op, "weight", weight, leading, device, None).to(dtype))


def check_labels_in_range(op: str, rows: Rows) -> None:
    """On a CPU only: elsewhere a bad label gives NaN for its row instead of a synchronisation."""
    if rows.labels is None or not can_read(rows.labels):
        return
    labels = rows.labels
    bad = (labels < 0) | (labels >= rows.classes)
    counted = rows.counted()
    if counted is not None:
        bad &= counted
    if bad.any():
        row = int(bad.nonzero()[0])
        raise label_error(op, row, int(labels[row]), rows.classes)


def check_indices(op: str, rows: Rows) -> None:
    """A TopK teacher's indices in the counted rows; on a CPU only, as :func:`check_labels_in_range`.

    In range, none twice in a row, and the label among them where the divergence needs it.
    """
    if rows.topk is None or not can_read(rows.topk.indices):
        return
    indices, counted = rows.topk.indices, rows.counted()

    def first(bad: Tensor) -> int | None:
        """First counted row with a True."""
        found = bad.any(-1) if counted is None else bad.any(-1) & counted
        return int(found.nonzero()[0]) if found.any() else None

    bad = (indices < 0) | (indices >= rows.classes)
    row = first(bad)
    if row is not None:
        value = int(indices[row][bad[row]][0])
        raise ValueError(f"{op}: teacher.indices must be in [0, {rows.classes}), got {value} in row {row}")
    ordered = indices.sort(-1).values
    twice = ordered[:, 1:] == ordered[:, :-1]
    row = first(twice)
    if row is not None:
        value = int(ordered[row, 1:][twice[row]][0])
        raise ValueError(f"{op}: teacher.indices must differ within a row, got {value} twice in row {row}")
    if rows.divergence.needs_labels and rows.labels is not None:
        row = first((indices != rows.labels[:, None]).all(-1, keepdim=True))
        if row is not None:
            label = int(rows.labels[row])
            raise ValueError(
                f"{op}: {rows.divergence.name} needs the label among teacher.indices, got label {label} in row {row}"
            )
