"""Gated fusion of two modalities: tanh and sigmoid gates, GMU, FiLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..problems import checks as contract
from ._inputs import check_input, check_parameter_dtype, check_present, check_size, zero_absent

_OP = "GatedFusion"
KINDS = ("tanh", "sigmoid", "gmu", "film")


class GatedFusion(nn.Module):
    """Fuses a main modality x with a second one h through a learned gate.

    ``kind``, its function, its parameters in ``state_dict``, and what is left when a modality is absent:

    - "tanh": y = x + tanh(g)·h; ``gate [1]``, or ``[Dx]`` with ``per_channel``, starts at 0: y = x. The
      absent one is 0. Flamingo, Alayrac et al., arXiv:2204.14198; Mllama.
    - "sigmoid": y = σ(W x + b) ⊙ (V h + c); ``gate.{weight,bias}`` (W), ``value.{weight,bias}`` (V).
      Without x the gate is 1; without h, y = 0.
    - "gmu": y = z ⊙ tanh(W x + b) + (1 − z) ⊙ tanh(V h + c), ``z = σ(U [x|h] + d)``; ``x_value``, ``h_value``,
      ``gate`` (U). Without x, z = 0; without h, z = 1. Arevalo et al., arXiv:1702.01992.
    - "film": y = γ ⊙ x + β, ``[γ|β] = W h + b``; ``film``, the bias of γ starts at 1. Without h, y = x;
      without x, y = β. Perez et al., arXiv:1709.07871.

    With neither present y = 0.

    Args:
        x_features, h_features: widths Dx and Dh; ``h_features`` None is Dx ("tanh" needs Dh = Dx).
        out_features: width O of y for "sigmoid" and "gmu"; None is Dx, the only width of "tanh" and "film".
        kind: see above.
        per_channel: a gate per channel ("tanh" only).
        bias: learn the biases (not of "tanh").

    ``forward(x, h, present=None)``: ``x [..., Dx]``, ``h [..., Dh]``, ``present`` bool ``[..., 2]`` for (x, h);
    what an absent modality holds has no effect. Returns ``[..., O]``. Raises TypeError or ValueError for
    arguments that break this contract.

    >>> import torch, mfd_fast as mfd
    >>> gate = mfd.nn.GatedFusion(6, 4, kind="film")
    >>> gate(torch.randn(3, 6), torch.randn(3, 4)).shape
    torch.Size([3, 6])
    """

    def __init__(
        self,
        x_features: int,
        h_features: int | None = None,
        out_features: int | None = None,
        *,
        kind: str = "tanh",
        per_channel: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        contract.check_choice(_OP, "kind", kind, KINDS)
        contract.check_bool(_OP, "per_channel", per_channel)
        contract.check_bool(_OP, "bias", bias)
        x = check_size(_OP, "x_features", x_features)
        h = x if h_features is None else check_size(_OP, "h_features", h_features)
        out = x if out_features is None else check_size(_OP, "out_features", out_features)
        if kind in ("tanh", "film") and out != x:
            raise contract.value_error(_OP, "out_features", out, f"{x} (x_features) for kind {kind!r}")
        if kind == "tanh" and h != x:
            raise contract.value_error(_OP, "h_features", h, f"{x} (x_features) for kind 'tanh'")
        if per_channel and kind != "tanh":
            raise contract.value_error(_OP, "per_channel", per_channel, f"False for kind {kind!r}")
        self.x_features, self.h_features, self.out_features = x, h, out
        self.kind, self.per_channel = kind, per_channel
        form: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        if kind == "tanh":
            self.gate: Any = nn.Parameter(torch.empty(x if per_channel else 1, device=device, dtype=dtype))
        elif kind == "sigmoid":
            self.gate = nn.Linear(x, out, **form)
            self.value = nn.Linear(h, out, **form)
        elif kind == "gmu":
            self.x_value = nn.Linear(x, out, **form)
            self.h_value = nn.Linear(h, out, **form)
            self.gate = nn.Linear(x + h, out, **form)
        else:
            self.film = nn.Linear(h, 2 * x, **form)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """tanh gate 0, FiLM's γ around 1, everything else as ``torch.nn.Linear`` does."""
        for layer in self.children():
            layer.reset_parameters()  # type: ignore[operator]
        if self.kind == "tanh":
            nn.init.zeros_(self.gate)
        elif self.kind == "film" and self.film.bias is not None:
            nn.init.ones_(self.film.bias[: self.x_features])
            nn.init.zeros_(self.film.bias[self.x_features :])

    def forward(self, x: Tensor, h: Tensor, present: Tensor | None = None) -> Tensor:
        for name, value, width in (("x", x, self.x_features), ("h", h, self.h_features)):
            check_input(_OP, name, contract.check_floating(_OP, name, value), width, x)
            check_parameter_dtype(_OP, name, value, next(self.parameters()))
        check_present(_OP, present, x.shape[:-1], 2, x.device)
        if present is None:
            return self._fuse(x, h, None, None)
        has_x, has_h = present.unsqueeze(-1).unbind(-2)
        return self._fuse(zero_absent(x, has_x), zero_absent(h, has_h), has_x, has_h)

    def _fuse(self, x: Tensor, h: Tensor, has_x: Tensor | None, has_h: Tensor | None) -> Tensor:
        """Absent modalities hold 0 already; ``has_x`` and ``has_h`` are ``[..., 1]``, or both None."""
        if self.kind == "tanh":
            return x + torch.tanh(self.gate).to(h.dtype) * h
        if self.kind == "sigmoid":
            gate = torch.sigmoid(self.gate(x))
            if has_x is None or has_h is None:
                return gate * self.value(h)
            return zero_absent(torch.where(has_x, gate, 1.0) * self.value(h), has_h)
        if self.kind == "gmu":
            z = torch.sigmoid(self.gate(torch.cat([x, h], -1)))
            x_value, h_value = torch.tanh(self.x_value(x)), torch.tanh(self.h_value(h))
            if has_x is None or has_h is None:
                return torch.lerp(h_value, x_value, z)
            z = torch.where(has_h, zero_absent(z, has_x), 1.0)
            return zero_absent(torch.lerp(h_value, x_value, z), has_x | has_h)
        gamma, beta = self.film(h).chunk(2, -1)
        modulated = gamma * x + beta
        return modulated if has_h is None else torch.where(has_h, modulated, x)

    def extra_repr(self) -> str:
        sizes = f"x_features={self.x_features}, h_features={self.h_features}, out_features={self.out_features}"
        return f"{sizes}, kind={self.kind!r}"
