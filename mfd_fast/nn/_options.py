"""What the modules ask of the options of the ops, as far as it can be asked without the op's inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..codes import FEATURE_KINDS
from ..problems import checks as contract
from ..problems.linear import check_chunk_rows
from ..problems.mfd import ABSENT_POOL_WEIGHTS
from ..problems.rows import IGNORED_LABELS
from ..schedules.options import Check


def of(op: Callable[..., Any], per_call: Sequence[str]) -> dict[str, Check]:
    """Name and check of every keyword-only argument of ``op`` that does not belong to the call."""
    names = sorted(set(op.__kwdefaults__ or ()) - {"reduction", *per_call})  # type: ignore[attr-defined]
    return {name: _CHECKS.get(name, _unchecked) for name in names}


def check_known(module: object, options: Mapping[str, Any], known: Mapping[str, Check]) -> None:
    """Raises TypeError for an option that the op does not have."""
    for name in options:
        if name not in known:
            raise TypeError(f"{type(module).__name__}: no option {name!r}; known: {', '.join(known)}")


def check_reduction(module: object, reduction: object) -> str:
    contract.check_choice(type(module).__name__, "reduction", reduction, contract.REDUCTIONS)
    return str(reduction)


def check_temperature(op: str, name: str, value: Any) -> None:
    """Number > 0, or a floating tensor, 0-d or one per row."""
    if isinstance(value, Tensor):
        contract.check_floating(op, name, value)
        if not value.is_meta and value.dim() == 0:
            contract.check_temperature(op, name, value, torch.Size(), value.device, contract.compute_dtype(value))
    else:
        contract.check_scalar(op, name, value, positive=True)


def check_one_temperature(op: str, name: str, value: Any) -> None:
    """Number > 0, or a floating 0-d tensor."""
    contract.check_scalar(op, name, value, positive=True)
    check_temperature(op, name, value)


def _teacher_temperature(op: str, name: str, value: Any) -> None:
    if value is not None:
        check_temperature(op, name, value)


def _scale(op: str, name: str, value: Any) -> None:
    if value is not None:
        if not contract.is_number(value):
            raise contract.type_error(op, name, value, "a number or None")
        contract.check_scalar(op, name, value)


def _divergence(op: str, name: str, value: Any) -> None:  # noqa: ARG001
    contract.check_divergence(op, value, torch.empty(0))


def _transform(op: str, name: str, value: Any) -> None:
    contract.check_transform(op, name, value, contract.ANY_COLUMNS)


def _teacher_weights(op: str, name: str, value: Any) -> None:
    if value is not None and contract.check_floating(op, name, value).dim() < 1:
        raise contract.value_error(op, name, value, "of shape [K] or [..., K]")


def _tap_weights(op: str, name: str, value: Any) -> None:
    """None, a number or tensor for all taps, or a sequence of numbers and 0-d tensors."""
    if isinstance(value, Tensor):
        contract.check_floating(op, name, value)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for tap, one in enumerate(value):
            contract.check_scalar(op, f"{name}[{tap}]", one)
    elif value is not None:
        contract.check_scalar(op, name, value)


def _feature_kind(op: str, name: str, value: Any) -> None:
    contract.check_choice(op, name, value, tuple(FEATURE_KINDS))


def _backend(op: str, name: str, value: Any) -> None:  # noqa: ARG001
    if value is not None:
        backends.check_name(op, value)


def _unchecked(op: str, name: str, value: Any) -> None:
    """Left to the op."""


def _ignored_labels(op: str, name: str, value: Any) -> None:
    contract.check_choice(op, name, value, IGNORED_LABELS)


def _process_group(op: str, name: str, value: Any) -> None:
    known = torch.distributed.is_available() and isinstance(value, torch.distributed.ProcessGroup)
    if value is not None and not known:
        raise contract.type_error(op, name, value, "a group of torch.distributed or None")


def _absent_pool_weights(op: str, name: str, value: Any) -> None:
    contract.check_choice(op, name, value, ABSENT_POOL_WEIGHTS)


_CHECKS: dict[str, Check] = {
    "absent_pool_weights": _absent_pool_weights,
    "chunk_rows": check_chunk_rows,
    "backend": _backend,
    "divergence": _divergence,
    "feature_kind": _feature_kind,
    "feature_weight": contract.check_scalar,
    "hard_weight": contract.check_scalar,
    "ignore_index": lambda op, _, value: contract.check_ignore_index(op, value),
    "ignored_labels": _ignored_labels,
    "kind": _feature_kind,
    "label_smoothing": lambda op, _, value: contract.check_smoothing(op, value),
    "pool_scale": _scale,
    "pool_temperature": check_temperature,
    "pool_weight": contract.check_scalar,
    "process_group": _process_group,
    "return_parts": contract.check_bool,
    "scale": _scale,
    "scale_by_temperature": contract.check_bool,
    "soft_weight": contract.check_scalar,
    "student_transform": _transform,
    "teacher_temperature": _teacher_temperature,
    "teacher_transform": _transform,
    "teacher_weights": _teacher_weights,
    "temperature": check_temperature,
    "weight": _tap_weights,
}
