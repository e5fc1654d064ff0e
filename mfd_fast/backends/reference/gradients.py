"""The gradients of :mod:`mfd_fast.divergences` written out, for registered ops: autograd does not record inside them.

For a divergence D of q and p, a_j = q_j ∂D/∂q_j and b_j = p_j ∂D/∂p_j (a up to a constant times q); then
    dD/du = a − q Σa,    dD/dv = b − p Σb
with respect to the softened logits. Of several teachers p = Σ w_k p_k, so b_k = (p_k/p) b,
dD/dv_k = w_k (b_k − p_k Σb_k) and dD/dw_k = Σ b_k. With the temperature, dD/dx = (dD/du)/T and
dD/dT = −Σ_j (dD/du_j) x_j / T².
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...divergences import (
    DKD,
    JSD,
    NKD,
    TVD,
    AlphaBeta,
    CrossEntropy,
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
)
from ...reference.distill_loss import STANDARDIZE_EPS
from ...reference.divergences import difference, over_mixture, sign, without_label
from ...types import LogitTransform

Slopes = tuple[Tensor, Tensor]


def slopes(divergence: Divergence, log_p: Tensor, log_q: Tensor, label: Tensor | None) -> Slopes:
    """a and b; for NKD those of its second term, without γ."""
    p, q = log_p.exp(), log_q.exp()
    if isinstance(divergence, ForwardKL):
        return -p, _times(p, log_p, log_q) + p
    if isinstance(divergence, CrossEntropy):
        return -p, -_entropic(p, log_q)
    if isinstance(divergence, ReverseKL):
        return _times(q, log_q, log_p), -q
    if isinstance(divergence, TVD):
        half = 0.5 * sign(q - p)
        return q * half, -p * half
    if isinstance(divergence, AlphaBeta):
        return _alpha_beta(log_p, log_q, *divergence.parameters)
    if isinstance(divergence, (DKD, NKD)):
        assert label is not None
        return _of_label(divergence, log_p, log_q, label)
    log_p_over_m, log_q_over_m = over_mixture(divergence, log_p, log_q)
    if isinstance(divergence, JSD):
        return (1 - divergence.beta) * q * log_q_over_m, divergence.beta * p * log_p_over_m
    product = torch.where((p == 0) | (q == 0), torch.zeros_like(p), p * log_q_over_m.exp())  # p q/m
    if isinstance(divergence, SkewKL):
        lam = divergence.lam
        return -(1 - lam) * product, p * (1 + log_p_over_m - lam * log_p_over_m.exp())
    assert isinstance(divergence, SkewReverseKL)
    lam = divergence.lam
    return q * (log_q_over_m - lam * log_q_over_m.exp()), -(1 - lam) * product


def _times(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p − log q), 0 at p = 0."""
    none = p == 0
    zero = torch.zeros_like(p)
    return p * (torch.where(none, zero, log_p) - torch.where(none, zero, log_q))


def _alpha_beta(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Slopes:
    """(q^(α+β) − p^α q^β)/α and (p^(α+β) − p^α q^β)/β."""
    p_zero, q_zero = log_p == -torch.inf, log_q == -torch.inf
    none, zero, total = p_zero | q_zero, torch.zeros_like(log_p), alpha + beta
    lp, lq = torch.where(none, zero, log_p), torch.where(none, zero, log_q)
    mixed = alpha * lp + beta * lq
    a = torch.where(none, zero, -difference(mixed, total * lq, alpha, lp - lq))
    b = torch.where(none, zero, difference(total * lp, mixed, beta, lp - lq))
    if total > 0 and alpha > 0:
        a = torch.where(p_zero, (total * log_q).exp() / alpha, a)
    if total > 0 and beta > 0:
        b = torch.where(q_zero, (total * log_p).exp() / beta, b)
    return a, b


def _of_label(divergence: DKD | NKD, log_p: Tensor, log_q: Tensor, label: Tensor) -> Slopes:
    index = label[:, None]
    (p_rest, log_p_hat), (q_rest, log_q_hat) = without_label(log_p, label), without_label(log_q, label)
    p_hat, q_hat = log_p_hat.exp(), log_q_hat.exp()
    some = (p_rest > -torch.inf) | p_rest.isnan()  # the teacher has mass besides the label
    a = torch.where(some, q_hat - p_hat, torch.zeros_like(p_hat))
    if isinstance(divergence, NKD):
        each = -_entropic(p_hat, log_q_hat)
        return a, each - p_hat * each.sum(-1, keepdim=True)
    each = _times(p_hat, log_p_hat, log_q_hat)
    b = each - p_hat * each.sum(-1, keepdim=True)
    if divergence.beta == 0:
        a, b = torch.zeros_like(a), torch.zeros_like(b)
    else:
        a, b = divergence.beta * a, divergence.beta * b
    if divergence.alpha != 0:
        log_p_label, log_q_label = log_p.gather(-1, index), log_q.gather(-1, index)
        pair = torch.cat((log_p_label, p_rest), -1), torch.cat((log_q_label, q_rest), -1)
        of_label, of_rest = _times(pair[0].exp(), *pair).split(1, -1)
        a = a - divergence.alpha * (p_rest.exp() * q_hat).scatter(-1, index, log_p_label.exp())
        b = b + divergence.alpha * (of_rest * p_hat).scatter(-1, index, of_label)
    return a, b


def _entropic(p: Tensor, log_q: Tensor) -> Tensor:
    """p log q, 0 at p = 0."""
    return p * torch.where(p == 0, torch.zeros_like(p), log_q)


def label_slopes(log_p: Tensor, log_q: Tensor, label: Tensor) -> Slopes:
    """a and b of −p_y log q_y, the first term of NKD."""
    index, zero = label[:, None], torch.zeros_like(log_p)
    p = log_p.gather(-1, index).exp()
    return zero.scatter(-1, index, -p), zero.scatter(-1, index, -_entropic(p, log_q.gather(-1, index)))


def project(slope: Tensor, probs: Tensor) -> Tensor:
    """a − q Σa, per row."""
    return slope - probs * slope.sum(-1, keepdim=True)


def temperature_slope(gradient: Tensor, logits: Tensor, temperature: float | Tensor) -> Tensor:
    """−Σ_j (dD/du_j) x_j / T² per row; x may be shifted, as the gradient sums to 0, and −inf has none."""
    shifted = logits - logits.amax(-1, keepdim=True)
    shifted = torch.where(shifted == -torch.inf, torch.zeros_like(shifted), shifted)
    return -(gradient * shifted).sum(-1) / temperature**2


def through_transform(gradient: Tensor, logits: Tensor, transform: LogitTransform | None) -> Tensor:
    """Gradient of the raw ``logits`` from that of the transformed ones, both ``[N, C]``."""
    if transform is None:
        return gradient
    scaled = logits * transform.scale
    cap = transform.softcap
    capped = scaled if cap is None else cap * torch.tanh(scaled / cap)
    if transform.standardize:
        # (g − mean g)/s − (Σ g x̃)/s · (x−μ)/((C−1)σ), x̃ = (x−μ)/s, s = σ + ε
        centred = capped - capped.mean(-1, keepdim=True)
        degrees = max(logits.shape[-1] - 1, 1)
        deviation = (centred.square().sum(-1, keepdim=True) / degrees).sqrt()
        s = deviation + STANDARDIZE_EPS
        constant = deviation == 0
        bend = (gradient * centred).sum(-1, keepdim=True) / (s * degrees * torch.where(constant, s, deviation))
        bend = torch.where(constant, torch.zeros_like(bend), bend)
        gradient = (gradient - gradient.mean(-1, keepdim=True) - bend * centred) / s
    if cap is not None:
        gradient = gradient * (1 - (capped / cap).square())
    return gradient * transform.scale
