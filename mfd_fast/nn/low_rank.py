"""Low-rank multimodal (tensor) fusion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..problems import checks as contract
from ._inputs import check_inputs, check_parameter_dtype, check_present, check_size, check_sizes, zero_absent

_OP = "LowRankFusion"


class LowRankFusion(nn.Module):
    """y = Σ_r w_r Π_m ([1; x_m]ᵀ F_m^r) + b, the rank-R form of the outer product of all [1; x_m].

    Liu et al., Efficient Low-rank Multimodal Fusion with Modality-Specific Factors, arXiv:1806.00064.

    Each modality is one GEMM to ``[..., R, O]``. The product runs modality by modality, so no tensor has a
    modality axis and at most two of them live at a time without gradients; with gradients M factors and
    M − 2 partial products are kept. Gradients of a product are products of the other factors, never
    quotients: exact where a factor is 0. w is folded into the smallest factor, so the sum over r keeps nothing
    (not in float16 and bfloat16, where that would round once more).

    Args:
        in_features: widths D_m of the M modalities.
        out_features: width O of y.
        rank: R.
        bias: learn b.

    Parameters (names in ``state_dict``): ``factors.m [D_m + 1, R, O]`` (row 0 belongs to the constant 1),
    ``rank_weight [R]`` (w), ``bias [O]``.

    ``forward(features, present=None)``: ``features`` M tensors ``[..., D_m]``; ``present`` bool ``[..., M]``: an
    absent modality counts as x_m = 0, which leaves its constant row; what it holds has no effect. Returns
    ``[..., O]``. Raises TypeError or ValueError for arguments that break this contract.

    >>> import torch, mfd_fast as mfd
    >>> fusion = mfd.nn.LowRankFusion([6, 4], 5, rank=3)
    >>> fusion([torch.randn(2, 6), torch.randn(2, 4)]).shape
    torch.Size([2, 5])
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: Sequence[int],
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_sizes(_OP, "in_features", in_features)
        self.out_features = check_size(_OP, "out_features", out_features)
        self.rank = check_size(_OP, "rank", rank)
        contract.check_bool(_OP, "bias", bias)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.factors = nn.ParameterList(parameter(d + 1, rank, out_features) for d in self.in_features)
        self.rank_weight = parameter(rank)
        self.register_parameter("bias", parameter(out_features) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier's normal for every ``[D_m + 1, O]`` matrix and for w; b = 0."""
        for width, factor in zip(self.in_features, self.factors, strict=True):
            nn.init.normal_(factor, std=(2 / (width + 1 + self.out_features)) ** 0.5)
        nn.init.normal_(self.rank_weight, std=(2 / (1 + self.rank)) ** 0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, features: Sequence[Tensor] | Tensor, present: Tensor | None = None) -> Tensor:
        xs = check_inputs(_OP, features, self.in_features)
        leading = xs[0].shape[:-1]
        for m, x in enumerate(xs):
            check_parameter_dtype(_OP, f"features[{m}]", x, self.rank_weight)
        check_present(_OP, present, leading, len(xs), xs[0].device)
        # A 16-bit factor that is scaled first would be rounded once more than the sum needs.
        folds = self.rank_weight.dtype not in (torch.float16, torch.bfloat16)
        smallest = self.in_features.index(min(self.in_features)) if folds else None
        product: Tensor | None = None
        for m, (x, factor) in enumerate(zip(xs, self.factors, strict=True)):
            if present is not None:
                x = zero_absent(x, present[..., m, None])
            if m == smallest:
                factor = factor * self.rank_weight[:, None]
            rows = factor.flatten(1)
            z = F.linear(x, rows[1:].T, rows[0])
            product = z if product is None else product * z
        assert product is not None
        by_rank = product.unflatten(-1, (self.rank, self.out_features))
        y = by_rank.sum(-2) if folds else torch.einsum("...ro,r->...o", by_rank, self.rank_weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
