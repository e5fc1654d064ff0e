"""Backward of several teachers on Triton; the kernel is ``kernels/triton/distill/mixture_backward.py``."""

from __future__ import annotations

from torch import Tensor

from ...divergences import DKD, NKD, AlphaBeta, Divergence, ReverseKL
from ...problems.rows import RowProblem
from .. import allocate
from ..protocol import RowGradients, RowNeeds
from .launch import constants, finish, gradient, kernels, launch, taken
from .row_arguments import RowArguments


def has_exponents(divergence: Divergence) -> bool:
    """Whether dD/dp may be beyond the arithmetic's range where p is not in it."""
    return isinstance(divergence, (ReverseKL, AlphaBeta, DKD, NKD))


def mixture_backward(
    rows: RowProblem,
    common: RowArguments | None,
    mixed: Tensor | None,
    exponents: Tensor | None,
    at_one: Tensor | None,
    needs: RowNeeds,
) -> RowGradients:
    """The gradients of the teachers' side alone.

    ``mixed`` [N, classes]: the gradient with respect to the mixture's logits T log p, over p; None if not needed.
    ``exponents``: None, or logarithms of what to multiply it by.
    ``at_one`` [N]: of NKD, that with respect to the mixture's probability of the label at temperature 1.
    """
    n, count = rows.n_rows, len(rows.teachers)
    temperature = allocate.empty((n,), rows.dtype, rows.device) if needs.teacher_temperature else None
    weights = allocate.empty((n, count), rows.dtype, rows.device) if needs.teacher_weights else None
    pairs = [gradient(logits) for logits in rows.teachers] if any(needs.teachers) else []
    if mixed is not None and common is not None:
        widths = tuple(logits.shape[-1] for logits in rows.teachers)
        module = kernels("distill.mixture_backward")
        outputs = module.MixtureGradients(
            ratio_ptr=mixed,
            exponent_ptr=exponents,
            at_one_ptr=at_one,
            d_ptrs=tuple(written for written, _ in pairs) or None,
            d_widths=tuple(width // common.unit for width in widths) if pairs else None,
            d_weights_ptr=weights,
            d_temperature_ptr=temperature,
        )
        kernel = module.mixture_backward
        # What the kernel does not look at must not compile it anew.
        how = common.how(soft=False, hard=False, smooth=False)._replace(**constants({"SQUARED": False}))
        width = max(widths) // common.unit if pairs else common.numbers["classes"]
        arguments = common.numbers | {"p": common.problem, "of": outputs, "how": how, "width": width}
        launch(kernel, -(-n // common.blocks.rows), rows.device, common.blocks.warps, taken(kernel, arguments))
    found = [finish(*pair) if need else None for pair, need in zip(pairs, needs.teachers, strict=False)]
    return RowGradients(None, None, temperature, weights, found or [None] * count)
