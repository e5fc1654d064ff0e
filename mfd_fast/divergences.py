"""The row divergences D(p, q) between a teacher p and a student q, both softened.

A pointwise divergence is a sum Σ_j f(p_j, q_j) over the classes. With g = ∂f/∂q and h = ∂f/∂p its gradients
with respect to the softened logits u = x/T and v = y/T are, for every one of them, ::

    dD/du_j = q_j (g_j − E_q[g]),    dD/dv_j = p_j (h_j − E_p[h])

(a constant added to g or h changes nothing, unless p sums to less than 1: a TopK with the tail "zero").
DKD and NKD depend on the label as well and are written out.
The soft term of the losses is T²·D, except where a docstring says otherwise.

Special values common to all: classes that are −inf on both sides contribute 0 and receive a zero gradient;
one class gives 0; a NaN, a +inf logit or a row of only −inf gives NaN for the row. Where a row's value is
+inf its gradient is finite for ForwardKL, CrossEntropy, DKD and NKD and not meaningful for the others.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields
from typing import Any, ClassVar

from .number import is_real

__all__ = [
    "DIVERGENCES",
    "DKD",
    "JSD",
    "NKD",
    "TVD",
    "AlphaBeta",
    "CrossEntropy",
    "Divergence",
    "ForwardKL",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "divergence_from",
]


def _check_number(where: str, value: Any, low: float, high: float, need: str, *, below: bool = False) -> None:
    """TypeError if ``value`` is no number, ValueError if it is outside [low, high] (``below``: [low, high))."""
    if not is_real(value):
        raise TypeError(f"{where} must be a number, got {value!r}")
    if not (math.isfinite(value) and low <= value and (value < high if below else value <= high)):
        raise ValueError(f"{where} must be {need}, got {value!r}")


@dataclass(frozen=True)
class Divergence:
    """Base of the row divergences. A divergence is a value: compare, hash, print and pickle it freely.

    Attributes:
        name: the string that selects this divergence with its default parameters.
        needs_labels: the divergence treats the class of the label apart, so ``labels`` must be given.
    """

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = False

    @property
    def parameters(self) -> tuple[float, float]:
        """The parameters in the order of the fields, 0 where there are fewer than two."""
        first, second = (*map(float, astuple(self)), 0.0, 0.0)[:2]
        return first, second

    @property
    def near_a_limit(self) -> bool:
        """The value is a small difference or quotient of large terms; only the reference keeps its digits."""
        return False

    def why_no_kernel(self) -> str | None:
        """None if kernels compute it, else the reason."""
        return f"{self} is so close to a limit that a kernel would lose its digits" if self.near_a_limit else None

    def canonical(self) -> Divergence:
        """The simplest divergence that is exactly this one; what the backends receive."""
        return self


#: A parameter that differs from a limit by less than this is near it.
_NEAR = 0.01


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p‖q) = Σ p (log p − log q). Gradient with respect to the softened student logits: q − p.

    Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv:1503.02531.

    g = −p/q, h = log(p/q) + 1. p = 0 contributes 0; q = 0 < p gives +inf with the finite gradient q − p.
    """

    name = "forward_kl"


@dataclass(frozen=True)
class CrossEntropy(Divergence):
    """−Σ p log q = KL(p‖q) + H(p): the forward KL valued as a cross-entropy with the teacher's probabilities.

    Its gradient with respect to the student is that of the forward KL, q − p; that to the softened teacher is
    p (−log q − CE). Not 0 at p = q. torchtune, open_clip and AutoGluon report it.

    g = −p/q, h = −log q. p = 0 contributes 0; q = 0 < p gives +inf with the finite gradient q − p.
    """

    name = "cross_entropy"


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q‖p) = Σ q (log q − log p). Gradient: q (log(q/p) − KL(q‖p)); mode-seeking.

    Gu et al.: MiniLLM, arXiv:2306.08543.

    g = log(q/p), h = −q/p (to the softened teacher logits: p − q). q = 0 contributes 0; p = 0 < q gives +inf.
    """

    name = "reverse_kl"


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon: β KL(p‖m) + (1−β) KL(q‖m) with m = βp + (1−β)q.

    Gradient: (1−β) q (log(q/m) − KL(q‖m)). β = 0 *is* the forward KL and β = 1 *is* the reverse KL (their
    limits after division by β or 1−β). Agarwal et al.: On-Policy Distillation of Language Models (GKD),
    arXiv:2306.13649.

    g = (1−β) log(q/m), h = β log(p/m). For 0 < β < 1 always finite: p = 0 < q contributes −(1−β) q log(1−β),
    q = 0 < p contributes −β p log β.

    Args:
        beta: in [0, 1].
    """

    beta: float = 0.5
    name = "jsd"

    def __post_init__(self) -> None:
        _check_number("JSD: beta", self.beta, 0, 1, "in [0, 1]")

    @property
    def near_a_limit(self) -> bool:
        return min(self.beta, 1 - self.beta) < _NEAR

    def canonical(self) -> Divergence:
        return ForwardKL() if self.beta == 0 else ReverseKL() if self.beta == 1 else self


@dataclass(frozen=True)
class SkewKL(Divergence):
    """KL(p‖m) with m = λp + (1−λ)q. Gradient: −(1−λ) q (w − E_q[w]) with w = p/m. λ = 0 is the forward KL.

    Ko et al.: DistiLLM, arXiv:2402.03898.

    g = −(1−λ) p/m, h = log(p/m) + 1 − λ p/m. For λ > 0 always finite: p = 0 contributes 0, q = 0 < p contributes
    −p log λ.

    Args:
        lam: λ in [0, 1).
    """

    lam: float = 0.1
    name = "skew_kl"

    def __post_init__(self) -> None:
        _check_number("SkewKL: lam", self.lam, 0, 1, "in [0, 1)", below=True)

    def canonical(self) -> Divergence:
        return ForwardKL() if self.lam == 0 else self


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q‖m) with m = (1−λ)p + λq. Gradient: q (g − E_q[g]) with g = log(q/m) − λ q/m. λ = 0 is the reverse KL.

    Ko et al.: DistiLLM, arXiv:2402.03898.

    h = −(1−λ) q/m. For λ > 0 always finite: q = 0 contributes 0, p = 0 < q contributes −q log λ.

    Args:
        lam: λ in [0, 1).
    """

    lam: float = 0.1
    name = "skew_reverse_kl"

    def __post_init__(self) -> None:
        _check_number("SkewReverseKL: lam", self.lam, 0, 1, "in [0, 1)", below=True)

    def canonical(self) -> Divergence:
        return ReverseKL() if self.lam == 0 else self


@dataclass(frozen=True)
class TVD(Divergence):
    """Total variation ``½ Σ |p − q|``. Gradient: q (g − E_q[g]) with g = ½ sign(q − p), 0 at a tie; h = −g.

    Wen et al.: f-Divergence Minimization for Sequence-Level Knowledge Distillation, arXiv:2307.15190.

    Always in [0, 1] and finite; a class that is 0 on one side contributes half of the other side's mass.
    """

    name = "tvd"


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """Alpha-beta: −1/(αβ) Σ (p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β)), with its limits.

    Gradient: q (g − E_q[g]) with g = q^(β−1) (q^α − p^α)/α, and h = p^(α−1) (p^β − q^β)/β, where (a^s − b^s)/s
    is log(a/b) at s = 0. The limits of the value are ::

        β = 0:   1/α² Σ (p^α log(p^α/q^α) − p^α + q^α)      (α = 1: the forward KL)
        α = 0:   1/β² Σ (q^β log(q^β/p^β) − q^β + p^β)      (β = 1: the reverse KL)
        α = −β:  1/α² Σ (log(q^α/p^α) + p^α/q^α − 1)
        α = β = 0:  ½ Σ (log p − log q)²

    All of them are f = (D_{α+β} − q^β D_α)/β with D_s the difference quotient above
    (D_{α+β} = (p^(α+β) − q^(α+β))/(α+β), q^β D_α = (p^α q^β − q^(α+β))/α), free of cancellation by expm1 where β is
    the larger exponent; α and β may be exchanged together with p and q.
    It has no name by itself: two exponents without a customary default. Cichocki, Cruces, Amari: Generalized
    Alpha-Beta Divergences, Entropy 13 (2011); Wang et al.: ABKD, arXiv:2505.04560.

    p = 0 < q contributes q^(α+β)/(α(α+β)) if α > 0 and α+β > 0, else +inf; q = 0 < p contributes
    p^(α+β)/(β(α+β)) if β > 0 and α+β > 0, else +inf.

    Args:
        alpha, beta: finite numbers of any sign.
    """

    alpha: float
    beta: float
    name = "alpha_beta"

    def __post_init__(self) -> None:
        for field in ("alpha", "beta"):
            _check_number(f"AlphaBeta: {field}", getattr(self, field), -math.inf, math.inf, "finite")

    @property
    def near_a_limit(self) -> bool:
        return any(0 < abs(value) < _NEAR for value in (self.alpha, self.beta, self.alpha + self.beta))

    def canonical(self) -> Divergence:
        ends: dict[tuple[float, float], Divergence] = {(1.0, 0.0): ForwardKL(), (0.0, 1.0): ReverseKL()}
        return ends.get(self.parameters, self)


@dataclass(frozen=True)
class DKD(Divergence):
    """Decoupled: α KL of the pair (label, rest) + β KL(p̂‖q̂), p̂ and q̂ renormalised over the other classes.

    Gradient, y the label: α (q_y − p_y) for the label, −α (q_y − p_y) q̂_j + β (q̂_j − p̂_j) for the others. To the
    softened teacher, with s = log(p_y/q_y) − log((1−p_y)/(1−q_y)): α p_y (1−p_y) s for the label,
    −α p_y p_j s + β p̂_j (log(p̂_j/q̂_j) − KL(p̂‖q̂)) for the others. α = 1, β = 1−p_y would be the forward KL.
    Zhao et al.: Decoupled Knowledge Distillation, arXiv:2203.08679.

    log(1−q_y) is the log-sum-exp over the other classes. Two classes have no second part. A teacher without
    mass besides the label has none either (value and gradient 0); q = 0 < p gives +inf with a finite gradient.

    Args:
        alpha, beta: finite numbers >= 0. A part whose factor is 0 is not computed.
    """

    alpha: float = 1.0
    beta: float = 8.0
    name = "dkd"
    needs_labels = True

    def __post_init__(self) -> None:
        for field in ("alpha", "beta"):
            _check_number(f"DKD: {field}", getattr(self, field), 0, math.inf, "finite and >= 0")


@dataclass(frozen=True)
class NKD(Divergence):
    """Normalised: −p¹_y log q¹_y − γ Σ_{j≠y} p̂_j log q̂_j, y the label, p¹ and q¹ at temperature 1.

    The factor T² belongs to the second term only; scaled, the gradient with respect to the logits is
    p¹_y (q¹ − e_y) + γ T (q̂ − p̂). To the teacher's: −log(q¹_y) p¹_y (e_y − p¹) + γ (T²/T_t) p̂_j (−log q̂_j − CE(p̂, q̂)).
    A cross-entropy: not 0 at p = q. Yang et al.: From Knowledge Distillation to Self-Knowledge Distillation,
    arXiv:2303.13005.

    A probability of the teacher that is 0 contributes 0; q = 0 < p gives +inf with a finite gradient.

    Args:
        gamma: finite number >= 0. The second term is not computed at 0.
    """

    gamma: float = 1.5
    name = "nkd"
    needs_labels = True

    def __post_init__(self) -> None:
        _check_number("NKD: gamma", self.gamma, 0, math.inf, "finite and >= 0")


#: Divergences that a string selects. AlphaBeta is not among them: it has no default exponents.
DIVERGENCES: dict[str, Divergence] = {
    d.name: d for d in (ForwardKL(), CrossEntropy(), ReverseKL(), JSD(), SkewKL(), SkewReverseKL(), TVD(), DKD(), NKD())
}


def divergence_from(name: str, parameters: tuple[float, float]) -> Divergence:
    """Inverse of ``(divergence.name, divergence.parameters)``.

    >>> divergence_from("jsd", (0.25, 0.0))
    JSD(beta=0.25)
    """
    kind = AlphaBeta if name == AlphaBeta.name else type(DIVERGENCES[name])
    return kind(*parameters[: len(fields(kind))])
