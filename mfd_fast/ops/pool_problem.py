"""The checked modal_pool problem that every backend receives, and its reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import contract
from ..reference.modal_pool import modal_pool as reference_pool


@dataclass
class PoolProblem:
    """A checked modal_pool call. ``features`` are M tensors ``[..., D]``, or one ``[..., M, D]`` where ``stacked``."""

    features: list[Tensor]
    stacked: bool
    modalities: int
    query: Tensor | None
    scores: Tensor | None
    bias: Tensor | None
    temperature: float | Tensor
    present: Tensor | None
    scale: float
    given_scale: float | None
    dtype: torch.dtype
    out_dtype: torch.dtype
    leading: torch.Size
    width: int
    device: torch.device

    def with_leaves(
        self,
        present: Tensor | None,
        query: Tensor | None,
        scores: Tensor | None,
        bias: Tensor | None,
        temperature: Tensor | None,
        features: list[Tensor],
    ) -> PoolProblem:
        """A copy that reads these tensors: what autograd has saved. Every backward makes one, so it is a cheap one."""
        same = PoolProblem.__new__(PoolProblem)
        same.__dict__.update(self.__dict__)
        same.features, same.present, same.query, same.scores, same.bias = features, present, query, scores, bias
        if temperature is not None:
            same.temperature = temperature
        return same

    def tensors(self) -> dict[str, Tensor | None]:
        """Every tensor by the name of its argument."""
        features = self.features
        named = {"features": features[0]} if self.stacked else {f"features[{m}]": x for m, x in enumerate(features)}
        return {
            **named,
            "query": self.query,
            "scores": self.scores,
            "bias": self.bias,
            "temperature": self.temperature_tensor,
            "present": self.present,
        }

    @property
    def temperature_tensor(self) -> Tensor | None:
        return self.temperature if isinstance(self.temperature, Tensor) else None


def check_features(op: str, features: object) -> list[Tensor]:
    """M tensors ``[..., D]`` of one shape and device; a stacked ``[..., M, D]`` stays as it is."""
    if isinstance(features, Tensor):
        features = contract.check_floating(op, "features", features)
        if features.dim() < 2:
            raise contract.value_error(op, "features", features, "of shape [..., M, D] or a sequence of [..., D]")
        if features.shape[-2] < 1:
            raise contract.value_error(op, "features", features, "at least one modality")
        if features.shape[-1] < 1:
            raise contract.value_error(op, "features", features, "of shape [..., M, D] with D >= 1")
        return [features]
    if isinstance(features, Sequence) and not isinstance(features, str):
        found = list(features)
    else:
        raise contract.type_error(op, "features", features, "a tensor or a sequence of tensors")
    found = [contract.check_floating(op, f"features[{m}]", x) for m, x in enumerate(found)]
    if not found:
        raise contract.value_error(op, "features", features, "at least one modality")
    first = found[0]
    if first.dim() < 1 or first.shape[-1] < 1:
        raise contract.value_error(op, "features[0]", first, "of shape [..., D] with D >= 1")
    for m, x in enumerate(found):
        if x.shape != first.shape:
            raise contract.value_error(op, f"features[{m}]", x, f"of shape {list(first.shape)}, as features[0]")
        contract.check_device(op, f"features[{m}]", x, first.device)
    return found


def check_vector(op: str, argument: str, value: object, size: int, device: torch.device) -> Tensor | None:
    """None or a floating ``[size]`` tensor."""
    if value is None:
        return None
    tensor = contract.check_floating(op, argument, value)
    if tensor.shape != (size,):
        raise contract.value_error(op, argument, value, f"of shape [{size}]")
    contract.check_device(op, argument, tensor, device)
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
    dtype = contract.compute_dtype(*found)
    if query is not None and scores is not None:
        raise ValueError(f"{op}: query and scores exclude each other, got both; pass one of them or neither")
    query = check_vector(op, "query", query, width, device)
    bias = check_vector(op, "bias", bias, modalities, device)
    each = torch.Size([*leading, modalities])
    if scores is not None:
        scores = contract.check_row_tensor(op, "scores", scores, each, device, None)
    if present is not None:
        present = contract.check_row_tensor(op, "present", present, each, device, torch.bool)
    tau = contract.check_temperature(op, temperature_name, temperature, leading, device, dtype)
    if isinstance(tau, Tensor) and tau.dim():
        tau = tau.reshape(leading)
    given_scale = scale
    if scale is None:
        scale = width**-0.5
    elif not contract.is_number(scale):
        raise contract.type_error(op, scale_name, scale, "a number or None")
    else:
        scale = given_scale = contract.plain(contract.check_scalar(op, scale_name, scale))
    out_dtype = first.dtype
    for x in found[1:]:
        out_dtype = torch.promote_types(out_dtype, x.dtype)
    return PoolProblem(
        found,
        stacked,
        modalities,
        query,
        scores,
        bias,
        tau,
        present,
        scale,
        given_scale,
        dtype,
        out_dtype,
        leading,
        width,
        device,
    )


def by_reference(p: PoolProblem) -> tuple[Tensor, Tensor]:
    """pooled and weights in plain PyTorch."""
    features = list(p.features[0].unbind(-2)) if p.stacked else p.features
    pooled, weights = reference_pool(features, p.query, p.scores, p.bias, p.temperature, p.present, p.scale, p.dtype)
    return pooled.to(p.out_dtype), weights


def differentiable_gradients(
    problem: PoolProblem,
    d_pooled: Tensor | None,
    d_weights: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """backward(create_graph=True): gradients of query, scores, bias, temperature and features, differentiable."""
    # One alias per role: a tensor that serves in two of them gets each role's gradient once.
    features = [x.view_as(x) for x in problem.features]
    tensors = (problem.query, problem.scores, problem.bias, problem.temperature_tensor)
    query, scores, bias, temperature = others = [None if t is None else t.view_as(t) for t in tensors]
    leaves = [*others, *features]
    alias = replace(
        problem,
        features=[x for x in features if x is not None],
        query=query,
        scores=scores,
        bias=bias,
        temperature=problem.temperature if temperature is None else temperature,
    )
    ends = [(v, g) for v, g in zip(by_reference(alias), (d_pooled, d_weights), strict=True) if g is not None]
    outputs, upstream = zip(*[(v, g) for v, g in ends if v.requires_grad], strict=True)
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need and leaf is not None]
    found = iter(torch.autograd.grad(outputs, wanted, upstream, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]
