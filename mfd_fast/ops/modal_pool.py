"""modal_pool: attention or weighted average over modalities.

    s_m = (scale·⟨query, x_m⟩ or given score) + bias_m,   a = softmax_m(s/τ) over the present modalities,
    pooled = Σ_m a_m x_m
Backward: ds_m = a_m (g_m − Σ_j a_j g_j)/τ with g_m = ⟨dpooled, x_m⟩ + dweights_m; dx_m = a_m dpooled +
ds_m·scale·query. Attention pooling: Ilse, Tomczak, Welling, arXiv:1802.04712.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import contract
from ..backends import choose
from ..reference.modal_pool import modal_pool as reference_pool
from ..types import ModalPool


@dataclass
class PoolProblem:
    """A checked modal_pool call."""

    features: list[Tensor]
    query: Tensor | None
    scores: Tensor | None
    bias: Tensor | None
    temperature: float | Tensor
    present: Tensor | None
    scale: float
    dtype: torch.dtype
    out_dtype: torch.dtype
    leading: torch.Size
    device: torch.device


def check_features(op: str, features: object) -> list[Tensor]:
    """M tensors ``[..., D]`` of one shape and device."""
    if isinstance(features, Tensor):
        contract.check_floating(op, "features", features)
        if features.dim() < 2:
            raise contract.value_error(op, "features", features, "of shape [..., M, D] or a sequence of [..., D]")
        found = list(features.unbind(-2))
    elif isinstance(features, Sequence) and not isinstance(features, str):
        found = [contract.check_floating(op, f"features[{m}]", x) for m, x in enumerate(features)]
    else:
        raise contract.type_error(op, "features", features, "a tensor or a sequence of tensors")
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


def check_vector(op: str, argument: str, value: object, size: int, device: torch.device) -> None:
    """None or a floating ``[size]`` tensor."""
    if value is None:
        return
    tensor = contract.check_floating(op, argument, value)
    if tensor.shape != (size,):
        raise contract.value_error(op, argument, value, f"of shape [{size}]")
    contract.check_device(op, argument, tensor, device)


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
    first, modalities = found[0], len(found)
    leading, width, device = first.shape[:-1], first.shape[-1], first.device
    dtype = contract.compute_dtype(*found)
    if query is not None and scores is not None:
        raise ValueError(f"{op}: query and scores exclude each other, got both; pass one of them or neither")
    check_vector(op, "query", query, width, device)
    check_vector(op, "bias", bias, modalities, device)
    for name, value, kind in (("scores", scores, None), ("present", present, torch.bool)):
        if value is not None:
            contract.check_row_tensor(op, name, value, torch.Size([*leading, modalities]), device, kind)
    tau = contract.check_temperature(op, temperature_name, temperature, leading, device, dtype)
    if isinstance(tau, Tensor) and tau.dim():
        tau = tau.reshape(leading)
    if scale is None:
        scale = width**-0.5
    elif not contract.is_number(scale):
        raise contract.type_error(op, scale_name, scale, "a number or None")
    else:
        contract.check_scalar(op, scale_name, scale)
    out_dtype = first.dtype
    for x in found[1:]:
        out_dtype = torch.promote_types(out_dtype, x.dtype)
    return PoolProblem(found, query, scores, bias, tau, present, scale, dtype, out_dtype, leading, device)


def modal_pool(
    features: Sequence[Tensor] | Tensor,
    query: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    present: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> ModalPool:
    """Fuses M modalities by attention (``query``), given ``scores``, or a weighted average (``bias`` alone).

    Args:
        features: M tensors ``[..., D]`` of one shape, or one ``[..., M, D]``; any floating dtypes and strides.
        query: ``[D]``; scores are ``scale·⟨query, x_m⟩``.
        scores: ``[..., M]`` scores given from outside; excludes ``query``.
        bias: ``[M]`` added to the scores: a learned prior over the modalities.
        temperature: number > 0, 0-d tensor, or one per row ``[...]``; may require grad.
        present: bool ``[..., M]``; an absent modality has weight 0 and is not read (NaN there has no effect).
        scale: number; None uses ``D**-0.5``.
        backend: "reference" or None.

    Returns:
        :class:`~mfd_fast.types.ModalPool`: ``pooled [..., D]`` in the features' dtype, ``weights [..., M]``
        in float32 (float64 for float64 features); both differentiable to every floating input. A row with
        no modality present gives zeros and zero gradients.

    Raises:
        TypeError, ValueError: an argument breaks the contract. BackendError: the backend cannot run.

    Source: attention pooling of Ilse, Tomczak, Welling, arXiv:1802.04712, with a single query.

    >>> import torch, mfd_fast as mfd
    >>> image, text = torch.ones(1, 2), torch.zeros(1, 2)
    >>> mfd.modal_pool([image, text]).pooled
    tensor([[0.5000, 0.5000]])
    """
    problem = check_pool(
        "modal_pool",
        features,
        query,
        scores=scores,
        bias=bias,
        temperature=temperature,
        present=present,
        scale=scale,
    )
    choose("modal_pool", problem, backend)
    p = problem
    pooled, weights = reference_pool(p.features, p.query, p.scores, p.bias, p.temperature, p.present, p.scale, p.dtype)
    return ModalPool(pooled.to(p.out_dtype), weights)
