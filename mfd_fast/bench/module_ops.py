"""The fusion modules as measured ops: inputs and parameters in, the fused rows out.

Three modalities of unequal widths, ``(wide, narrow, narrow)``. The modules are called through
:func:`torch.func.functional_call`, whose Python is charged to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mfd_fast as mfd

from .records import Arguments, BenchOp, Sizes, Work, normal

RANK = 8
LENIENCE = 1.25


def _widths(sizes: Sizes) -> list[int]:
    return [sizes["wide"], sizes["narrow"], sizes["narrow"]]


def _module_call(build: Callable[[list[int], int], nn.Module], names: Mapping[str, str]) -> Callable[..., Any]:
    """The record's ``call``: ``names`` maps an argument to the parameter that it stands for."""

    def call(options: Mapping[str, Any], backend: str | None) -> Callable[..., Tensor]:  # noqa: ARG001
        module: nn.Module | None = None

        def f(features: list[Tensor], **parameters: Any) -> Tensor:
            nonlocal module
            if module is None:
                with torch.device("meta"):
                    module = build([x.shape[-1] for x in features], _out_features(parameters))
            named: dict[str, Tensor] = {}
            for argument, name in names.items():
                value = parameters[argument]
                named |= {f"{name}.{m}": v for m, v in enumerate(value)} if isinstance(value, list) else {name: value}
            found = torch.func.functional_call(module, named, (features,))
            return found.pooled if isinstance(found, mfd.ModalPoolOutput) else found

        return f

    return call


def _out_features(parameters: Mapping[str, Any]) -> int:
    bias: Tensor = parameters["bias"]
    return bias.shape[-1]


def _features(sizes: Sizes, dtype: torch.dtype, seed: int) -> list[Tensor]:
    return [normal((sizes["batch"], width), 7 * seed + m, dtype) for m, width in enumerate(_widths(sizes))]


def _plain_pytorch(arguments: Arguments, options: Mapping[str, Any], backend: str | None) -> mfd.Choice:  # noqa: ARG001
    """The library GEMMs and plain PyTorch around them, on every device."""
    if backend not in (None, "reference"):
        raise mfd.BackendError("(module): a module of library GEMMs has no kernel of its own")
    return mfd.Choice("reference", "library GEMMs")


# ------------------------------------------------------------------------------------------------ modal_fusion


def _fusion_inputs(sizes: Sizes, dtype: torch.dtype, distance: str, seed: int) -> Arguments:  # noqa: ARG001
    widths, out = _widths(sizes), sizes["width"]
    total, modalities = sum(widths), len(widths)
    return {
        "features": _features(sizes, dtype, seed),
        "weight": normal((out, total), 7 * seed + 10, dtype, sizes["wide"] ** -0.5),
        "bias": normal((modalities, out), 7 * seed + 11, dtype, 0.1),
        "score_weight": normal((modalities, total), 7 * seed + 12, dtype, total**-0.5),
        "score_bias": normal((modalities,), 7 * seed + 13, dtype, 0.1),
    }


def eager_modal_fusion(
    features: list[Tensor], weight: Tensor, bias: Tensor, score_weight: Tensor, score_bias: Tensor
) -> Tensor:
    """Project every modality, stack, and average with the softmax of a linear layer over the concatenation."""
    shares = F.softmax(F.linear(torch.cat(features, -1), score_weight, score_bias), -1)
    weights = weight.split([x.shape[-1] for x in features], 1)
    projected = torch.stack([F.linear(x, w, b) for x, w, b in zip(features, weights, bias, strict=True)], -2)
    return (shares.unsqueeze(-1) * projected).sum(-2)


def _fusion_work(sizes: Sizes, item: int, training: bool) -> Work:
    """One GEMM over the concatenation, forward and twice backward; the scores' GEMMs are narrow; rows in and out."""
    batch, out, total = sizes["batch"], sizes["width"], sum(_widths(sizes))
    backward = ((batch, out, total), (out, batch, total)) if training else ()
    return Work((2 if training else 1) * batch * (total + out) * item, ((batch, total, out), *backward))


# -------------------------------------------------------------------------------------------- low_rank_fusion


def _low_rank_inputs(sizes: Sizes, dtype: torch.dtype, distance: str, seed: int) -> Arguments:  # noqa: ARG001
    shapes = [(width + 1, RANK, sizes["width"]) for width in _widths(sizes)]
    return {
        "features": _features(sizes, dtype, seed),
        "factors": [normal(s, 7 * seed + 20 + m, dtype, s[0] ** -0.5) for m, s in enumerate(shapes)],
        "rank_weight": normal((RANK,), 7 * seed + 30, dtype),
        "bias": normal((sizes["width"],), 7 * seed + 31, dtype, 0.1),
    }


def eager_low_rank_fusion(features: list[Tensor], factors: list[Tensor], rank_weight: Tensor, bias: Tensor) -> Tensor:
    """A constant 1 beside every modality, one product per modality and rank, all multiplied, then summed over ranks."""
    product: Tensor | None = None
    for x, factor in zip(features, factors, strict=True):
        z = torch.einsum("bd,dro->bro", F.pad(x, (1, 0), value=1.0), factor)
        product = z if product is None else product * z
    assert product is not None
    return torch.einsum("bro,r->bo", product, rank_weight) + bias


def _low_rank_work(sizes: Sizes, item: int, training: bool) -> Work:
    """A GEMM per modality, forward and twice backward; inputs, products and their gradients cross memory once."""
    batch, wide, widths = sizes["batch"], RANK * sizes["width"], _widths(sizes)
    products = [(batch, width, wide) for width in widths]
    if training:
        products += [shape for w in widths for shape in ((batch, wide, w), (w, batch, wide))]
    return Work((2 if training else 1) * batch * (sum(widths) + len(widths) * wide) * item, tuple(products))


MODULES = (
    BenchOp(
        "modal_fusion",
        sizes={"batch": 4096, "wide": 768, "narrow": 128, "width": 512},
        options={},
        inputs=_fusion_inputs,
        rows=frozenset({"features"}),
        leaves=frozenset({"features", "weight", "bias", "score_weight", "score_bias"}),
        call=_module_call(
            mfd.nn.ModalFusion,
            {name: name for name in ("weight", "bias", "score_weight", "score_bias")},
        ),
        eager=eager_modal_fusion,
        choice=_plain_pytorch,
        work=_fusion_work,
        mean=False,
        lenience=LENIENCE,
    ),
    BenchOp(
        "low_rank_fusion",
        sizes={"batch": 1024, "wide": 256, "narrow": 64, "width": 128},
        options={},
        inputs=_low_rank_inputs,
        rows=frozenset({"features"}),
        leaves=frozenset({"features", "factors", "rank_weight", "bias"}),
        call=_module_call(
            lambda widths, out: mfd.nn.LowRankFusion(widths, out, RANK),
            {name: name for name in ("factors", "rank_weight", "bias")},
        ),
        eager=eager_low_rank_fusion,
        choice=_plain_pytorch,
        work=_low_rank_work,
        mean=False,
        lenience=LENIENCE,
    ),
)
