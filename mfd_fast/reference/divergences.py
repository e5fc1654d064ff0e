"""The value of every divergence in plain PyTorch, from the log-probabilities of both sides.

Everything works on logarithms ``log_p``, ``log_q`` ``[N, C]``, so that nothing underflows before it must, and what
vanishes at p ≈ q is computed from the log-ratio r = log p − log q, which keeps its digits there. A class that
contributes a constant or nothing is replaced *before* the arithmetic, so that no gradient is 0·inf.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..divergences import (
    DKD,
    JSD,
    TVD,
    AlphaBeta,
    CrossEntropy,
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
)

#: Exponents of AlphaBeta below this are treated like their limit: by differences, never by quotients of them.
SMALL_EXPONENT = 1e-3
#: exp of this is finite in float32.
LARGE = 80.0


def forward_kl(log_p: Tensor, log_q: Tensor, *, complete: bool = True) -> Tensor:
    """KL(p‖q) per row with 0·log 0 = 0, never negative if p is a ``complete`` distribution."""
    p = log_p.exp()
    zero = p == 0
    ratio = torch.where(zero, torch.zeros_like(p), log_p) - torch.where(zero, torch.zeros_like(p), log_q)
    return kl_sum(p, ratio, log_q.exp()) if complete else (p * ratio).sum(-1)


def kl_sum(p: Tensor, r: Tensor, q: Tensor) -> Tensor:
    """Σ p r with r = log(p/q) of two distributions, never negative.

    Its value is that of Σ (p r − p + q), whose terms are >= 0 and of second order in r, so that rounding in r does not
    show at p ≈ q.
    """
    plain = (p * r).sum(-1)
    with torch.no_grad():
        near = (r.abs() < 0.5) & (p != 0)
        small = torch.where(near, r, torch.zeros_like(r))
        better = torch.where(near, p * (small + torch.expm1(-small)), p * r + (q - p)).sum(-1)
        # Beside a label that has everything p is nothing, and no distribution.
        applies = better.isfinite() & (p != 0).any(-1)
        change = torch.where(applies, better - plain, torch.zeros_like(plain))
    return not_negative(plain + change)


def not_negative(value: Tensor) -> Tensor:
    """Rounding below zero is cut from the value only; the gradient stays as it is."""
    return torch.where(value < 0, value - value.detach(), value)


def pointwise(divergence: Divergence, log_p: Tensor, log_q: Tensor, complete: bool) -> Tensor:
    """Σ f(p, q) per row. ``complete``: p sums to 1 (a sparse teacher's may not)."""
    if isinstance(divergence, ForwardKL):
        return forward_kl(log_p, log_q, complete=complete)
    if isinstance(divergence, ReverseKL):
        return forward_kl(log_q, log_p, complete=complete)
    p, q = log_p.exp(), log_q.exp()
    if isinstance(divergence, CrossEntropy):
        return (p * torch.where(p == 0, torch.zeros_like(p), -log_q)).sum(-1)
    if isinstance(divergence, TVD):
        return 0.5 * ((p - q) * sign(p - q)).sum(-1)
    if isinstance(divergence, AlphaBeta):
        return _alpha_beta(log_p, log_q, *divergence.parameters)
    log_p_over_m, log_q_over_m = over_mixture(divergence, log_p, log_q)
    if isinstance(divergence, JSD):
        beta = divergence.beta
        value = (beta * p * log_p_over_m + (1 - beta) * q * log_q_over_m).sum(-1)
    elif isinstance(divergence, SkewKL):
        value = (p * log_p_over_m).sum(-1)
        if complete:
            value = kl_sum(p, log_p_over_m, divergence.lam * p + (1 - divergence.lam) * q)
    else:
        assert isinstance(divergence, SkewReverseKL)
        value = (q * log_q_over_m).sum(-1)
        if complete:
            value = kl_sum(q, log_q_over_m, divergence.lam * q + (1 - divergence.lam) * p)
    return not_negative(value) if complete else value


def sign(values: Tensor) -> Tensor:
    """−1, 0, 1 or NaN, without a graph: the sign of NaN is 0 in PyTorch."""
    values = values.detach()
    return torch.where(values != values, values, torch.sign(values))


def _teacher_share(divergence: Divergence) -> float:
    """w in the mixture m = w p + (1−w) q."""
    if isinstance(divergence, JSD):
        return divergence.beta
    if isinstance(divergence, SkewKL):
        return divergence.lam
    assert isinstance(divergence, SkewReverseKL)
    return 1 - divergence.lam


def _expm1(z: Tensor) -> Tensor:
    """expm1 of a finite exponential, with the derivative exp: PyTorch's expm1 + 1 has lost its digits far below 1."""
    e = z.exp()
    return torch.expm1(z).detach() + (e - e.detach())


def _log_mean(r: Tensor, share: float) -> Tensor:
    """log((1 − share) + share·e^r): by log1p and expm1 where that is near 0, as written where those would cancel."""
    zero, rise = torch.zeros_like(r), share * _expm1(r)
    low = rise < -0.5
    near = torch.log1p(torch.where(low, zero, rise))
    return torch.where(low, ((1 - share) + share * torch.where(low, r, zero).exp()).log(), near)


def over_mixture(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """log(p/m) and log(q/m), m = w p + (1−w) q; 0 where p, or q, is 0 and the other factor makes it 0 anyhow.

    From r: log(q/m) = −log((1−w) + w e^r) and log(p/m) = −log(w + (1−w) e^−r), which keep their digits for small r
    and small w alike; where the exponential would overflow, from each other: they differ by r.
    """
    share = _teacher_share(divergence)
    p_zero, q_zero = log_p.exp() == 0, log_q.exp() == 0
    none = p_zero | q_zero
    zero = torch.zeros_like(log_p)
    r = torch.where(none, zero, log_p) - torch.where(none, zero, log_q)
    high, low = r > LARGE, r < -LARGE
    p_side = -_log_mean(-torch.where(low, zero, r), 1 - share)
    q_side = -_log_mean(torch.where(high, zero, r), share)
    p_side, q_side = torch.where(low, q_side + r, p_side), torch.where(high, p_side - r, q_side)
    # Where one side is 0 the mixture is the other side times its share.
    p_side = torch.where(q_zero & ~p_zero, torch.full_like(r, -math.log(share)), p_side)
    q_side = torch.where(p_zero & ~q_zero, torch.full_like(r, -math.log1p(-share)), q_side)
    return p_side, q_side


def _alpha_beta(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    """Σ (D_{α+β} − q^β D_α)/β with D_s = (p^s − q^s)/s, and ½ Σ r² at α = β = 0."""
    if abs(beta) < abs(alpha):  # by symmetry; the larger exponent is the one to divide by
        log_p, log_q, alpha, beta = log_q, log_p, beta, alpha
    p_zero, q_zero = log_p == -torch.inf, log_q == -torch.inf
    none, zero = p_zero | q_zero, torch.zeros_like(log_p)
    a, b = torch.where(none, zero, log_p), torch.where(none, zero, log_q)
    total, r = alpha + beta, a - b
    if beta == 0:
        value = 0.5 * r.square()
    else:
        value = difference(total * a, total * b, total, r) - difference(alpha * a + beta * b, total * b, alpha, r)
        value = value / beta
        if min(abs(alpha), abs(total)) > SMALL_EXPONENT:
            # The same sum as it is usually written has the better conditioned derivative, if the mixed term shares
            # its rounding with q^(α+β), from which (q^(α+β) − p^α q^β)/α subtracts it.
            mixed = (total * b + alpha * r).exp()
            plain = (alpha * (total * a).exp() + beta * (total * b).exp()) / total - mixed
            plain = plain / (alpha * beta)
            # Where p^α q^β overflows, of exponents of opposite signs, both are +inf.
            change = (value - plain).detach()
            value = plain + torch.where(plain == torch.inf, zero, change)
    value = torch.where(none, zero, value)
    for absent, other, exponent in ((p_zero, log_q, alpha), (q_zero, log_p, beta)):
        alone = absent & ~(p_zero & q_zero)
        if exponent > 0 and total > 0:
            limit = (total * torch.where(alone, other, zero)).exp() / (exponent * total)
        else:
            limit = torch.full_like(zero, torch.inf)
        value = torch.where(alone, limit, value)
    return not_negative(value.sum(-1))


def difference(high: Tensor, low: Tensor, s: float, r: Tensor) -> Tensor:
    """(e^high − e^low)/s with high − low = s·r, without cancellation; its limit e^low·r at s = 0."""
    if s == 0:
        return low.exp() * r
    rising, zero = s * r > 0, torch.zeros_like(r)
    falling_part = torch.where(rising, zero, low).exp() * _expm1(torch.where(rising, zero, s * r))
    rising_part = torch.where(rising, high, zero).exp() * -_expm1(-torch.where(rising, s * r, zero))
    return torch.where(rising, rising_part, falling_part) / s


def log_sum_exp(logs: Tensor) -> Tensor:
    """log Σ exp over the last dimension, kept; −inf, with a zero gradient, where all are −inf."""
    top = logs.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    total = (logs - top).exp().sum(-1, keepdim=True)
    empty = total == 0
    return torch.where(empty, -torch.inf, torch.where(empty, torch.ones_like(total), total).log() + top)


def without_label(log_p: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 − p_y) ``[N, 1]``, the log-sum-exp of the others, and log p̂ ``[N, C]``, −inf at the label."""
    others = log_p.scatter(-1, label[:, None], -torch.inf)
    rest = log_sum_exp(others)
    empty = rest == -torch.inf
    log_hat = torch.log_softmax(torch.where(empty, torch.zeros_like(others), others), -1)
    # A logit of −inf elsewhere keeps its place in the graph: its gradient is the formula's.
    own = torch.zeros_like(others, dtype=torch.bool).scatter(-1, label[:, None], True)
    return rest, torch.where(empty | own, -torch.inf, log_hat)


def decoupled(divergence: DKD, log_p: Tensor, log_q: Tensor, label: Tensor) -> Tensor:
    """α KL of (label, rest) + β KL(p̂‖q̂) per row."""
    (p_rest, p_hat), (q_rest, q_hat) = without_label(log_p, label), without_label(log_q, label)
    value = torch.zeros_like(p_rest[:, 0])
    if divergence.alpha != 0:
        value = value + divergence.alpha * forward_kl(_pair(log_p, p_rest, label), _pair(log_q, q_rest, label))
    if divergence.beta != 0:
        value = value + divergence.beta * forward_kl(p_hat, q_hat)
    return value


def _pair(log_p: Tensor, rest: Tensor, label: Tensor) -> Tensor:
    return torch.cat((log_p.gather(-1, label[:, None]), rest), -1)


def label_entropy(log_p: Tensor, log_q: Tensor, label: Tensor) -> Tensor:
    """First term of NKD, −p_y log q_y per row."""
    p = log_p.gather(-1, label[:, None]).exp()
    log_q_label = log_q.gather(-1, label[:, None])
    return -(p * torch.where(p == 0, torch.zeros_like(p), log_q_label)).squeeze(-1)


def other_entropy(log_p: Tensor, log_q: Tensor, label: Tensor) -> Tensor:
    """Second term of NKD without its factor, −Σ_{j≠y} p̂_j log q̂_j per row."""
    p_hat, q_hat = without_label(log_p, label)[1].exp(), without_label(log_q, label)[1]
    return -(p_hat * torch.where(p_hat == 0, torch.zeros_like(p_hat), q_hat)).sum(-1)
