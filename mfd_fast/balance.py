"""Balance between modalities: how well each one alone predicts, and gradients that hold back the dominant one.

All statistics and coefficients are tensors on the logits' device: nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .ops.distill_terms import distill_terms
from .problems import checks as contract

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["GradientModulation", "ModalityStatistics", "modality_statistics", "ogm_coefficients"]


class ModalityStatistics(NamedTuple):
    """Each ``[..., M]``, detached, 0 where a modality is absent or the row's label is ignored."""

    label_prob: Tensor
    entropy: Tensor
    cross_entropy: Tensor


def modality_statistics(
    logits: Sequence[Tensor] | Tensor,
    labels: Tensor,
    *,
    present: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
) -> ModalityStatistics:
    """What each modality alone says of the labels: p_m(y), H(p_m) and −log p_m(y) per row and modality.

    They are by-products of one pass of :func:`mfd_fast.distill_terms` over each modality's logits.

    Args:
        logits: M tensors ``[..., C]`` of one shape, or one ``[..., M, C]``: each modality's own predictions.
        labels: int64 ``[...]``.
        present: bool ``[..., M]``; what an absent modality holds has no effect.
        temperature: p_m = softmax(logits_m / temperature) for the probability and the entropy; number, 0-d tensor
            or one per row ``[...]``. The cross-entropy is at temperature 1.
        ignore_index: rows with this label give 0.
        backend: as in :func:`mfd_fast.distill_terms`.

    Raises:
        TypeError, ValueError: an argument breaks the contract. BackendError: the backend cannot run.

    >>> import torch, mfd_fast as mfd
    >>> image, text = torch.zeros(1, 4), torch.tensor([[9.0, 0.0, 0.0, 0.0]])
    >>> mfd.balance.modality_statistics([image, text], torch.tensor([0])).label_prob
    tensor([[0.2500, 0.9996]])
    """
    op = "modality_statistics"
    each = _per_modality(op, logits)
    leading, device = each[0].shape[:-1], each[0].device
    contract.check_row_tensor(op, "labels", labels, leading, device, torch.int64)
    if present is not None:
        contract.check_row_tensor(op, "present", present, torch.Size([*leading, len(each)]), device, torch.bool)
    rows = []
    with torch.no_grad():
        for m, z in enumerate(each):
            mask = None if present is None else present[..., m]
            terms = distill_terms(
                z, z, labels, temperature=temperature, mask=mask, ignore_index=ignore_index, backend=backend
            )
            assert terms.student_label_prob is not None
            assert terms.hard is not None
            rows.append((terms.student_label_prob, terms.student_entropy, terms.hard))
        return ModalityStatistics(*(torch.stack(field, -1) for field in zip(*rows, strict=True)))


def _per_modality(op: str, logits: object) -> list[Tensor]:
    """M floating tensors ``[..., C]`` of one shape and device."""
    if isinstance(logits, Tensor) and logits.dim() >= 2:
        logits = logits.unbind(-2)
    if isinstance(logits, (str, Tensor)) or not isinstance(logits, Sequence) or not logits:
        raise contract.type_error(op, "logits", logits, "a sequence of tensors or one tensor [..., M, C]")
    each = [contract.check_floating(op, f"logits[{m}]", z) for m, z in enumerate(logits)]
    for m, z in enumerate(each):
        if z.dim() < 1 or z.shape != each[0].shape:
            raise contract.value_error(op, f"logits[{m}]", z, f"of shape {list(each[0].shape) or '[..., C]'}")
        contract.check_device(op, f"logits[{m}]", z, each[0].device)
    return each


def ogm_coefficients(label_prob: Tensor, *, alpha: float | Tensor, present: Tensor | None = None) -> Tensor:
    """OGM-GE's gradient coefficients for M modalities.

    With s_m the mean of p_m(y) over the rows where modality m is present,

        ρ_m = s_m / mean_{j≠m} s_j,   k_m = 1 − tanh(alpha·ρ_m) if ρ_m > 1, else 1.

    For two modalities this is the paper's equation (ρ_v = Σp_v/Σp_a); for more, each modality is compared with the
    mean of the others, so that the ratio of equals is 1 whatever their number. A modality that no row has gets 1
    and is left out of the others' mean; so does a modality with nothing to compare it with (M = 1), and one whose
    s_m or rivals are NaN.
    Peng et al., Balanced Multimodal Learning via On-the-fly Gradient Modulation, arXiv:2203.15332.

    Args:
        label_prob: ``[..., M]`` of :func:`modality_statistics`.
        alpha: strength, number or 0-d tensor; 0 gives 1 everywhere.
        present: bool ``[..., M]``, also False where a row has no label; None: all are counted.

    Returns:
        ``[M]`` in float32 (float64 for float64), detached, in [0, 1].

    Raises:
        TypeError, ValueError: an argument breaks the contract.

    >>> import torch, mfd_fast as mfd
    >>> mfd.balance.ogm_coefficients(torch.tensor([[0.2, 0.2, 0.6]]), alpha=0.1)
    tensor([1.0000, 1.0000, 0.7087])
    """
    op = "ogm_coefficients"
    contract.check_floating(op, "label_prob", label_prob)
    if label_prob.dim() < 1 or label_prob.shape[-1] < 1:
        raise contract.value_error(op, "label_prob", label_prob, "of shape [..., M] with M >= 1")
    contract.check_scalar(op, "alpha", alpha)
    modalities = label_prob.shape[-1]
    p = label_prob.detach().to(contract.compute_dtype(label_prob)).reshape(-1, modalities)
    if present is None:
        counts = torch.full((modalities,), len(p), dtype=p.dtype, device=p.device)
    else:
        contract.check_row_tensor(op, "present", present, label_prob.shape, label_prob.device, torch.bool)
        here = present.reshape(-1, modalities)
        p = torch.where(here, p, torch.zeros_like(p))
        counts = here.sum(0).to(p.dtype)
    score = p.sum(0) / counts.clamp_min(1)
    exists = (counts > 0).to(p.dtype)
    # [M, M] without its diagonal: the others of each modality.
    others = exists * (1 - torch.eye(modalities, dtype=p.dtype, device=p.device))
    rivals = others.sum(-1)
    mean_of_others = (others * score).sum(-1) / rivals.clamp_min(1)
    dominates = (score > mean_of_others) & (rivals > 0)
    ratio = score / mean_of_others.clamp_min(torch.finfo(p.dtype).tiny)
    strength = alpha.detach().to(p) if isinstance(alpha, Tensor) else alpha
    return torch.where(dominates, 1 - torch.tanh(strength * ratio), torch.ones_like(ratio))


class GradientModulation:
    """Multiplies the gradients of each modality's parameters by that modality's coefficient.

    grad ← k_m·grad (+ N(0, std(grad)²) per parameter with ``noise``: the generalisation enhancement of OGM-GE,
    arXiv:2203.15332, whose code modulates convolution weights only: pass those). It works through gradient hooks,
    so each ``backward()`` is modulated by the coefficients set before it, also while gradients accumulate, and the
    optimizer needs no change. A parameter with one element gets no noise; a sparse gradient gets it in the rows that
    it holds, with the deviation of those rows. Under DDP the hooks act before the all-reduce: set the same
    coefficients on every rank.

    Args:
        parameters: M iterables of leaf parameters, one per modality.
        noise: add the noise.
        generator: ``torch.Generator`` of the noise, on the parameters' device.

    Use :meth:`set` before each ``backward()`` and :meth:`remove`, or a ``with`` block, to end it. Until the first
    :meth:`set` the coefficients are 1.

    >>> import torch, mfd_fast as mfd
    >>> image, text = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    >>> with mfd.balance.GradientModulation([image.parameters(), text.parameters()]) as modulation:
    ...     modulation.set(torch.tensor([0.5, 1.0]))
    ...     (image(torch.ones(1, 2)) + text(torch.ones(1, 2))).sum().backward()
    >>> image.weight.grad, text.weight.grad
    (tensor([[0.5000, 0.5000]]), tensor([[1., 1.]]))
    """

    def __init__(
        self,
        parameters: Sequence[Iterable[Tensor]],
        *,
        noise: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        op = "GradientModulation"
        if not isinstance(parameters, Sequence):
            raise contract.type_error(op, "parameters", parameters, "a sequence of iterables of parameters")
        contract.check_bool(op, "noise", noise)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise contract.type_error(op, "generator", generator, "a torch.Generator or None")
        groups = [list(group.parameters() if isinstance(group, nn.Module) else group) for group in parameters]
        for m, group in enumerate(groups):
            for i, parameter in enumerate(group):
                contract.check_floating(op, f"parameters[{m}][{i}]", parameter)
                if not (parameter.is_leaf and parameter.requires_grad):
                    raise contract.value_error(op, f"parameters[{m}][{i}]", parameter, "a leaf that requires grad")
        if not any(groups):
            raise contract.value_error(op, "parameters", parameters, "at least one parameter")
        self.noise, self.generator = noise, generator
        first = next(parameter for group in groups for parameter in group)
        self.coefficients = torch.ones(len(groups), device=first.device)
        self._handles = [
            parameter.register_hook(partial(self._modulated, m))
            for m, group in enumerate(groups)
            for parameter in group
        ]

    def set(self, coefficients: Tensor) -> None:
        """Takes a copy of ``coefficients [M]``."""
        op = "GradientModulation"
        contract.check_floating(op, "coefficients", coefficients)
        if coefficients.shape != self.coefficients.shape:
            raise contract.value_error(op, "coefficients", coefficients, f"of shape {list(self.coefficients.shape)}")
        self.coefficients.copy_(coefficients.detach())

    def remove(self) -> None:
        """Takes the hooks away: gradients are left alone again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _modulated(self, modality: int, grad: Tensor) -> Tensor:
        coefficient = self.coefficients[modality].to(device=grad.device, dtype=grad.dtype)
        if not grad.is_sparse:
            return self._noisy(grad * coefficient, grad)
        grad = grad.coalesce()
        values = self._noisy(grad.values() * coefficient, grad.values())
        return torch.sparse_coo_tensor(grad.indices(), values, grad.shape, is_coalesced=True, check_invariants=False)

    def _noisy(self, modulated: Tensor, grad: Tensor) -> Tensor:
        """``modulated`` with noise of the deviation of ``grad``."""
        if not self.noise or grad.numel() < 2:
            return modulated
        draw = torch.randn(grad.shape, dtype=grad.dtype, device=grad.device, generator=self.generator)
        return modulated + draw * grad.std()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()
