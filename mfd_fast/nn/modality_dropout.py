"""Modality dropout: training a model to do without some of its modalities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..problems import checks as contract
from ..schedules.buffers import FixedPrecision
from ._inputs import check_inputs, check_present, check_size, check_sizes, zero_absent

_OP = "ModalityDropout"


class PresentFeatures(NamedTuple):
    """``features``, one tensor per modality, and the mask ``present`` (bool ``[..., M]``, or None: all are there)."""

    features: list[Tensor]
    present: Tensor | None


class ModalityDropout(FixedPrecision):
    """Drops each modality of each row with its own probability, but never a row's last one.

    Modality m of a row is dropped when u_m < p_m with u_m uniform in [0, 1). Where that would leave nothing, the
    modality with the largest u_m / p_m stays, which is a uniform choice among those that were there. A modality
    absent on entry stays absent and is never the one that is kept. No scaling takes place.

    Args:
        modalities: number M of them.
        p: probability of dropping, in [0, 1]; one number, or one per modality.
        fill_features: None: what is absent becomes 0. Widths D_m: it becomes a learned embedding, ``fills.m
            [D_m]`` in ``state_dict``, that starts at 0.
        row_dims: number of leading dimensions that count rows, for example 1 for ``[B, tokens_m, D_m]``, where a
            sample loses all its tokens of a modality; None: all but the last.

    ``forward(features, present=None, generator=None)``: ``features`` M tensors whose leading (row) dimensions
    agree; ``present`` bool ``[..., M]`` over the rows; ``generator`` a ``torch.Generator`` on the features' device
    for draws of one's own (not under torch.compile). Returns :class:`PresentFeatures`; pass its mask on to what
    follows, or leave it out where the learned embedding is to be attended to.

    In eval mode nothing is dropped: features and mask come back as they are, except that a learned embedding
    still fills what ``present`` says is absent. Raises TypeError or ValueError for arguments that break this
    contract. Dropping whole modalities: Neverova et al., ModDrop, arXiv:1501.00102.

    >>> import torch, mfd_fast as mfd
    >>> drop = mfd.nn.ModalityDropout(2, p=1.0)
    >>> features, present = drop([torch.ones(4, 3), torch.ones(4, 5)])
    >>> present.sum(-1)
    tensor([1, 1, 1, 1])
    """

    p: Tensor

    def __init__(
        self,
        modalities: int,
        p: float | Sequence[float] = 0.1,
        *,
        fill_features: Sequence[int] | None = None,
        row_dims: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.modalities = check_size(_OP, "modalities", modalities)
        self.row_dims = None if row_dims is None else check_size(_OP, "row_dims", row_dims)
        each: Any = [p] * modalities if contract.is_number(p) else p
        if not isinstance(each, Sequence) or not all(map(contract.is_number, each)):
            raise contract.type_error(_OP, "p", p, "a number or a sequence of numbers")
        if len(each) != modalities or not all(0 <= value <= 1 for value in each):
            raise contract.value_error(_OP, "p", p, f"in [0, 1], one number or {modalities}")
        self.probabilities = tuple(map(float, each))
        self.register_buffer("p", torch.empty(modalities, dtype=torch.float32, device=device), persistent=False)
        self.fills: nn.ParameterList | None = None
        if fill_features is not None:
            widths = check_sizes(_OP, "fill_features", fill_features)
            if len(widths) != modalities:
                raise contract.value_error(_OP, "fill_features", fill_features, f"{modalities} widths")
            self.fills = nn.ParameterList(nn.Parameter(torch.empty(d, device=device, dtype=dtype)) for d in widths)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The probabilities are those of the constructor, the learned embeddings start at 0."""
        self.p.copy_(torch.tensor(self.probabilities, dtype=self.p.dtype, device="cpu"))
        for fill in self.fills or ():
            nn.init.zeros_(fill)

    def forward(
        self,
        features: Sequence[Tensor] | Tensor,
        present: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> PresentFeatures:
        widths = [None] * self.modalities if self.fills is None else [len(fill) for fill in self.fills]
        xs = check_inputs(_OP, features, widths, self.row_dims)
        rows = xs[0].shape[: (xs[0].dim() - 1 if self.row_dims is None else self.row_dims)]
        check_present(_OP, present, rows, self.modalities, xs[0].device)
        if self.training:
            contract.check_device(_OP, "features[0]", xs[0], self.p.device)
            present = self._draw(rows, present, generator)
        elif present is None or self.fills is None:
            return PresentFeatures(xs, present)
        return PresentFeatures([self._filled(m, x, present) for m, x in enumerate(xs)], present)

    def _draw(self, rows: torch.Size, present: Tensor | None, generator: torch.Generator | None) -> Tensor:
        # torch.compile does not trace generators, not even None where sizes are symbolic.
        source: dict[str, Any] = {} if generator is None else {"generator": generator}
        u = torch.rand(*rows, self.modalities, device=self.p.device, **source)
        keep = u >= self.p
        # Given that all were dropped, u_m / p_m are independent and uniform in [0, 1).
        rank = u / self.p
        if present is not None:
            keep = keep & present
            rank = rank.masked_fill(~present, -1.0)
        last = torch.arange(self.modalities, device=u.device) == rank.argmax(-1, keepdim=True)
        if present is not None:
            last = last & present
        return keep | (last & ~keep.any(-1, keepdim=True))

    def _filled(self, m: int, x: Tensor, present: Tensor) -> Tensor:
        here = present[..., m].reshape(*present.shape[:-1], *(1,) * (x.dim() - present.dim() + 1))
        return zero_absent(x, here) if self.fills is None else torch.where(here, x, self.fills[m].to(x.dtype))

    def extra_repr(self) -> str:
        return f"modalities={self.modalities}, p={self.probabilities}, row_dims={self.row_dims}"
