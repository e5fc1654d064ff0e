"""The problem of modal_pool: M modalities of features and what their weights come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..number import plain
from .checks import (
    check_device,
    check_floating,
    check_row_tensor,
    check_scalar,
    check_temperature,
    compute_dtype,
    is_number,
    type_error,
    value_error,
)
from .problem import Problem


class PoolProblem(Problem):
    """A checked modal_pool call.

    Attributes:
        features: M tensors ``[..., D]``, or one ``[..., M, D]`` where ``stacked``.
        query, scores, bias: ``[D]``, ``[..., M]``, ``[M]`` or None.
        temperature: float, or a tensor (0-d or ``[...]``) of ``dtype``.
        present: bool ``[..., M]`` or None.
        scale: of the scores; given_scale: None where it is the usual D**-0.5.
        dtype, out_dtype: of the arithmetic and the weights; of the pooled features.
        leading, width, modalities: ``[...]``, D, M.
    """

    OPTIONS: ClassVar = {"stacked": "bool", "given_scale": "float?", "dtype": "ScalarType", "out_dtype": "ScalarType"}
    SIZES = ("leading", "width", "modalities", "scale")
    TENSORS = ("query", "scores", "bias", "temperature", "present")
    LISTS = ("features",)

    stacked: bool
    scale: float
    given_scale: float | None
    dtype: torch.dtype
    out_dtype: torch.dtype
    leading: torch.Size
    width: int
    modalities: int
    query: Tensor | None
    scores: Tensor | None
    bias: Tensor | None
    temperature: float | Tensor
    present: Tensor | None
    features: Sequence[Tensor]

    def measure(self) -> None:
        first, stacked = self.features[0], self.stacked
        self.leading, self.width = first.shape[: -2 if stacked else -1], first.shape[-1]
        self.modalities = first.shape[-2] if stacked else len(self.features)
        self.scale = self.width**-0.5 if self.given_scale is None else self.given_scale

    @property
    def device(self) -> torch.device:
        return self.features[0].device

    @property
    def columns(self) -> int:
        return self.width

    @property
    def elements(self) -> int | None:
        if any(x.dtype != torch.float32 for x in self.features):
            return None
        return math.prod(self.leading) * self.modalities * self.width

    @property
    def temperature_tensor(self) -> Tensor | None:
        return self.temperature if isinstance(self.temperature, Tensor) else None

    def modality_features(self) -> list[Tensor]:
        """M tensors ``[..., D]``; views of a stacked ``[..., M, D]``."""
        return list(self.features[0].unbind(-2)) if self.stacked else list(self.features)

    def member(self, argument: str, index: int) -> str:
        return argument if self.stacked else super().member(argument, index)


def check_features(op: str, features: object) -> list[Tensor]:
    """M tensors ``[..., D]`` of one shape and device; a stacked ``[..., M, D]`` stays as it is."""
    if isinstance(features, Tensor):
        features = check_floating(op, "features", features)
        if features.dim() < 2:
            raise value_error(op, "features", features, "of shape [..., M, D] or a sequence of [..., D]")
        if features.shape[-2] < 1:
            raise value_error(op, "features", features, "at least one modality")
        if features.shape[-1] < 1:
            raise value_error(op, "features", features, "of shape [..., M, D] with D >= 1")
        return [features]
    if isinstance(features, Sequence) and not isinstance(features, str):
        found = list(features)
    else:
        raise type_error(op, "features", features, "a tensor or a sequence of tensors")
    found = [check_floating(op, f"features[{m}]", x) for m, x in enumerate(found)]
    if not found:
        raise value_error(op, "features", features, "at least one modality")
    first = found[0]
    if first.dim() < 1 or first.shape[-1] < 1:
        raise value_error(op, "features[0]", first, "of shape [..., D] with D >= 1")
    for m, x in enumerate(found):
        if x.shape != first.shape:
            raise value_error(op, f"features[{m}]", x, f"of shape {list(first.shape)}, as features[0]")
        check_device(op, f"features[{m}]", x, first.device)
    return found


def check_vector(op: str, argument: str, value: object, size: int, device: torch.device) -> Tensor | None:
    """None or a floating ``[size]`` tensor."""
    if value is None:
        return None
    tensor = check_floating(op, argument, value)
    if tensor.shape != (size,):
        raise value_error(op, argument, value, f"of shape [{size}]")
    check_device(op, argument, tensor, device)
    return tensor


def check_pool(
    op: str,
    features: object,
    query: Tensor | None,
    *,
    scores: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    present: Tensor | None = None,
    scale: float | None = None,
    temperature_name: str = "temperature",
    scale_name: str = "scale",
) -> PoolProblem:
    """The whole contract of modal_pool."""
    found = check_features(op, features)
    stacked = isinstance(features, Tensor)
    first = found[0]
    leading, width, device = first.shape[: -2 if stacked else -1], first.shape[-1], first.device
    modalities = first.shape[-2] if stacked else len(found)
    dtype = compute_dtype(*found)
    if query is not None and scores is not None:
        raise ValueError(f"{op}: query and scores exclude each other, got both; pass one of them or neither")
    query = check_vector(op, "query", query, width, device)
    bias = check_vector(op, "bias", bias, modalities, device)
    each = torch.Size([*leading, modalities])
    if scores is not None:
        scores = check_row_tensor(op, "scores", scores, each, device, None)
    if present is not None:
        present = check_row_tensor(op, "present", present, each, device, torch.bool)
    tau = check_temperature(op, temperature_name, temperature, leading, device, dtype)
    if isinstance(tau, Tensor) and tau.dim():
        tau = tau.reshape(leading)
    given_scale = scale
    if scale is None:
        scale = width**-0.5
    elif not is_number(scale):
        raise type_error(op, scale_name, scale, "a number or None")
    else:
        scale = given_scale = plain(check_scalar(op, scale_name, scale))
    out_dtype = first.dtype
    for x in found[1:]:
        out_dtype = torch.promote_types(out_dtype, x.dtype)
    return PoolProblem(
        stacked=stacked,
        scale=scale,
        given_scale=given_scale,
        dtype=dtype,
        out_dtype=out_dtype,
        leading=leading,
        width=width,
        modalities=modalities,
        query=query,
        scores=scores,
        bias=bias,
        temperature=tau,
        present=present,
        features=found,
    )
