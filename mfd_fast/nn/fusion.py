"""Attention fusion of modalities of unequal widths: projections and pooling in one GEMM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import types
from ..ops.modal_pool import modal_pool
from ..problems import checks as contract
from ..reference.modal_pool import modal_weights
from ..schedules.options import Check, OptionsModule
from . import _options
from ._inputs import check_inputs, check_parameter_dtype, check_present, check_size, check_sizes, uniform_, zero_absent

_OP = "ModalFusion"
BLOCK_ROWS = 8
SCORINGS = ("linear", "query", "prior")


def weighted_bias(a: Tensor, bias: Tensor) -> Tensor:
    """``a [N, M] @ bias [M, O]``; in float32 by blocks of rows.

    The gradient of ``bias`` is then a sum over blocks of short products: one product over all N rows would carry
    a single running sum, less accurate than the sums over rows of M separate projections.
    """
    if a.dtype != torch.float32:  # a 16-bit product rounds once, a sum of 16-bit blocks would round more often
        return a @ bias
    rows, blocks = a.shape[0], a.shape[0] // BLOCK_ROWS + 1
    padded = F.pad(a, (0, 0, 0, blocks * BLOCK_ROWS - rows))
    product = torch.bmm(padded.view(blocks, BLOCK_ROWS, a.shape[1]), bias.expand(blocks, -1, -1))
    return product.view(blocks * BLOCK_ROWS, bias.shape[1])[:rows]


class ModalFusion(OptionsModule):
    """y = Σ_m a_m (W_m x_m + b_m) with a = softmax_m(s/τ) over the present modalities.

    The sum of M projections is one GEMM, ``y = [a₁x₁|…|a_M x_M|a]·[W₁…W_M|b]ᵀ``, whose accumulator starts
    at a·b. It moves 2ΣD_m values per row where projecting first moves 2M·O, so by default it is the form taken
    when ΣD_m <= M·O; otherwise each modality is projected and :func:`mfd_fast.modal_pool` fuses the results.
    Both are the same function.

    Scores s_m, by ``scoring``:

    - "linear": row m of ``A·[x₁|…|x_M] + c``, an absent x_m counting as 0. The function of torchmultimodal's
      AttentionFusionModule (modalities in the order of their sorted names).
    - "query": O^(-1/2)·⟨query, W_m x_m + b_m⟩ + c_m, computed as ⟨W_mᵀ query, x_m⟩: no projection is
      needed for it. Attention pooling of Ilse, Tomczak, Welling, arXiv:1802.04712.
    - "prior": c_m, a learned weighted average.

    Args:
        in_features: widths D_m of the M modalities.
        out_features: common width O.
        scoring: see above.
        bias: learn b_m.
        temperature: τ, number > 0, 0-d tensor or Parameter, or a :mod:`mfd_fast.schedules` schedule; may be
            overridden per call.
        fold: True: one GEMM; False: project, then pool; None: by the widths, as above.

    Parameters (names in ``state_dict``): ``weight [O, ΣD_m]`` (W_m side by side), ``bias [M, O]``,
    ``score_bias [M]`` (c), ``score_weight [M, ΣD_m]`` ("linear"), ``query [O]`` ("query").

    ``forward(features, present=None, temperature=None)``: ``features`` M tensors ``[..., D_m]``, ``present``
    bool ``[..., M]`` (an absent modality is not used, NaN there has no effect), ``temperature`` as above or
    one per row ``[...]``. Returns :class:`~mfd_fast.types.ModalPoolOutput`: ``pooled [..., O]`` and ``weights
    [..., M]`` in float32 (float64 for float64), both differentiable; a row with nothing present is 0.
    Raises TypeError or ValueError for arguments that break this contract.

    >>> import torch, mfd_fast as mfd
    >>> fusion = mfd.nn.ModalFusion([6, 4], 5)
    >>> pooled, weights = fusion([torch.randn(3, 6), torch.randn(3, 4)])
    >>> pooled.shape, weights.shape
    (torch.Size([3, 5]), torch.Size([3, 2]))
    """

    _OPTIONS: ClassVar[Mapping[str, Check]] = {"temperature": _options.check_one_temperature}
    temperature: float | Tensor
    bias: Tensor | None
    score_weight: Tensor | None
    query: Tensor | None

    def __init__(
        self,
        in_features: Sequence[int],
        out_features: int,
        *,
        scoring: str = "linear",
        bias: bool = True,
        temperature: float | Tensor = 1.0,
        fold: bool | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_sizes(_OP, "in_features", in_features)
        self.out_features = check_size(_OP, "out_features", out_features)
        contract.check_choice(_OP, "scoring", scoring, SCORINGS)
        contract.check_bool(_OP, "bias", bias)
        if fold is not None:
            contract.check_bool(_OP, "fold", fold)
        self.scoring, self.temperature, self.fold = scoring, temperature, fold
        modalities, total = len(self.in_features), sum(self.in_features)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(self.out_features, total)
        self.register_parameter("bias", parameter(modalities, self.out_features) if bias else None)
        self.register_parameter("score_weight", parameter(modalities, total) if scoring == "linear" else None)
        self.register_parameter("query", parameter(self.out_features) if scoring == "query" else None)
        self.score_bias = parameter(modalities)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections and linear scores as ``torch.nn.Linear`` does, query from N(0, 1/O), other priors 0."""
        super().reset_parameters()
        for m, weight in enumerate(self.weight.split(self.in_features, 1)):
            uniform_(weight, self.in_features[m])
            if self.bias is not None:
                uniform_(self.bias[m], self.in_features[m])
        if self.score_weight is not None:
            uniform_(self.score_weight, sum(self.in_features))
            uniform_(self.score_bias, sum(self.in_features))
        else:
            nn.init.zeros_(self.score_bias)
        if self.query is not None:
            nn.init.normal_(self.query, std=self.out_features**-0.5)

    def forward(
        self,
        features: Sequence[Tensor] | Tensor,
        present: Tensor | None = None,
        temperature: float | Tensor | None = None,
    ) -> types.ModalPoolOutput:
        xs = check_inputs(_OP, features, self.in_features)
        leading, device = xs[0].shape[:-1], xs[0].device
        for m, x in enumerate(xs):
            check_parameter_dtype(_OP, f"features[{m}]", x, self.weight)
        check_present(_OP, present, leading, len(xs), device)
        tau = self.options["temperature"] if temperature is None else temperature
        tau = contract.check_temperature(_OP, "temperature", tau, leading, device, contract.compute_dtype(self.weight))
        if isinstance(tau, Tensor) and tau.dim():
            tau = tau.reshape(leading)
        if present is not None:
            xs = [zero_absent(x, present[..., m, None]) for m, x in enumerate(xs)]
        folds = sum(self.in_features) <= len(xs) * self.out_features if self.fold is None else self.fold
        return self._folded(xs, present, tau) if folds else self._projected(xs, present, tau)

    def _folded(self, xs: list[Tensor], present: Tensor | None, tau: float | Tensor) -> types.ModalPoolOutput:
        dtype = contract.compute_dtype(self.weight)
        weights = modal_weights(self._scores(xs).to(dtype), tau, present)
        a = weights.to(xs[0].dtype)
        scaled = torch.cat([x * a[..., m, None] for m, x in enumerate(xs)], -1)
        if self.bias is None:
            return types.ModalPoolOutput(F.linear(scaled, self.weight), weights)
        pooled = torch.addmm(
            weighted_bias(a.reshape(-1, len(xs)), self.bias), scaled.reshape(-1, scaled.shape[-1]), self.weight.T
        )
        return types.ModalPoolOutput(pooled.reshape(*a.shape[:-1], self.out_features), weights)

    def _projected(self, xs: list[Tensor], present: Tensor | None, tau: float | Tensor) -> types.ModalPoolOutput:
        biases = [None] * len(xs) if self.bias is None else self.bias.unbind()
        split = self.weight.split(self.in_features, 1)
        projected = [F.linear(x, w, b) for x, w, b in zip(xs, split, biases, strict=True)]
        if self.scoring == "linear":
            return modal_pool(projected, scores=self._scores(xs), present=present, temperature=tau)
        return modal_pool(projected, self.query, bias=self.score_bias, present=present, temperature=tau)

    def _scores(self, xs: list[Tensor]) -> Tensor:
        """``[..., M]`` from the raw features."""
        if self.score_weight is not None:
            return F.linear(torch.cat(xs, -1), self.score_weight, self.score_bias)
        if self.query is None:
            return self.score_bias.expand(*xs[0].shape[:-1], len(xs))
        query = self.query * self.out_features**-0.5
        folded = (query @ self.weight).split(self.in_features)
        scores = torch.stack([x @ q for x, q in zip(xs, folded, strict=True)], -1)
        prior = self.score_bias if self.bias is None else self.score_bias + self.bias @ query
        return scores + prior

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scoring={self.scoring!r}"
