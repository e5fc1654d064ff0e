"""Row losses of logits whose classes are divided over a process group (tensor parallelism), in plain PyTorch.

Each rank holds ``[N, C_r]`` columns of both sides, in the order of the ranks, and all labels. Per row, with u = x/T,
v = y/T and M, S, Z sums over all classes, three all-reduces of O(N) numbers:
    maxima of u, v, x  →  Σ exp(u − max), Σ exp(v − max), Σ exp(x − max), x_label, Σ x  →  Σ_j f(q_j, p_j), entropy
Gradients are local: d/du_j = q_j·(g_j − E_q[g]), g = ∂f/∂q, for forward KL q − p, for reverse KL −q·(r + KL(q‖p)) with
r = log p − log q, for JSD (1−β)·q·(log(q/m) − KL(q‖m)), m = (1−β)q + βp. Sums like Σ p·r − (p − q), whose terms are
never negative, keep the digits where p is close to q.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..divergences import JSD, Divergence, ForwardKL, ReverseKL
from ..problems.rows import RowProblem
from ..reference.distill_loss import transform_logits
from .protocol import ByProducts, RowGradients, RowNeeds, RowOutputs

SUPPORTED = (ForwardKL, ReverseKL, JSD)


def why_not(rows: RowProblem) -> str | None:
    """None if class-sharded logits of this call can be compared, else the reason."""
    if type(rows.divergence) not in SUPPORTED:
        return f"{rows.divergence.name} of class-sharded logits; there are forward_kl, reverse_kl and jsd"
    if rows.ignored_labels == "term":
        return "ignored_labels='term' of class-sharded logits"
    if rows.topk is not None or len(rows.teachers) > 1:
        return "a TopK or several teachers beside class-sharded logits"
    for name, transform in (("student", rows.student_transform), ("teacher", rows.teacher_transform)):
        if transform is not None and transform.standardize:
            return f"{name}_transform with standardize of class-sharded logits"
    return None


class _Points(NamedTuple):
    """``[N, C_r]``: log q, log p, log softmax(x), and the derivative of the student's transform."""

    log_q: Tensor
    log_p: Tensor
    log_x: Tensor
    slope: Tensor | None


class ClassSharded:
    """The row entry points of a backend (see :mod:`mfd_fast.backends.protocol`) on one rank's columns."""

    def __init__(self, group: Any, columns: int, device: torch.device) -> None:
        self.group = group
        own = torch.full((1,), columns, dtype=torch.int64, device=device)
        sizes = [torch.zeros_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, own, group=group)
        counts = torch.cat(sizes).tolist()
        #: First class of this rank, the number of classes of all ranks, and of the rank that has most.
        self.first, self.classes, self.most = sum(counts[: dist.get_rank(group)]), sum(counts), max(counts)

    def add_up(self, tensor: Tensor) -> None:
        """``tensor`` becomes the sum over the ranks, in place."""
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group=self.group)

    def _sum(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Each ``[N]`` added up over the ranks, in one all-reduce."""
        packed = torch.stack(rows)
        self.add_up(packed)
        return packed.unbind()

    def _own_label(self, rows: RowProblem) -> tuple[Tensor, Tensor]:
        """Column of each row's label on this rank, and whether it lies here."""
        assert rows.labels is not None
        column = rows.labels - self.first
        here = (column >= 0) & (column < rows.classes)
        return torch.where(here, column, torch.zeros_like(column))[:, None], here

    def _has_label(self, rows: RowProblem) -> Tensor:
        """Whether each row's label is a class of some rank; elsewhere than on a CPU nobody has asked."""
        assert rows.labels is not None
        return (rows.labels >= 0) & (rows.labels < self.classes)

    def per_row(self, rows: RowProblem, *, terms: bool) -> RowOutputs:
        """soft, hard, the statistics, and of the by-products the entropies."""
        x, _, u, v, _ = _softened(rows)
        top = torch.stack([u.amax(-1), v.amax(-1), x.amax(-1)])
        dist.all_reduce(top, dist.ReduceOp.MAX, group=self.group)
        of_u, of_v, of_x = (m[:, None] for m in top.unbind())
        parts = [(side - m).exp().sum(-1) for side, m in ((u, of_u), (v, of_v), (x, of_x))]
        zero = x.new_zeros(rows.n_rows)
        at_label = spread = zero
        if rows.labels is not None:
            column, here = self._own_label(rows)
            at_label = torch.where(here, (x - of_x).gather(-1, column).squeeze(-1), zero)
            spread = (x - of_x).sum(-1) if rows.label_smoothing else zero
        *sums, at_label, spread = self._sum(*parts, at_label, spread)
        # Relative to the maxima, whose size would cost the digits of what is left.
        log_u, log_v, log_x = (total.log() for total in sums)
        log_q, log_p = u - of_u - log_u[:, None], v - of_v - log_v[:, None]
        own = [-(s.exp() * torch.where(s == -torch.inf, torch.zeros_like(s), s)).sum(-1) for s in (log_q, log_p)]
        # The second sum is what the gradient's expectation E_q[g] is made of.
        divergence, expected, entropy, of_teacher = self._sum(*_sums(rows.divergence, log_q, log_p), *own)
        squared = rows.temperature**2 if rows.scale_by_temperature else 1.0
        soft, hard = divergence * squared, zero
        if rows.labels is not None:
            e = rows.label_smoothing
            hard = log_x - ((1 - e) * at_label if e < 1 else 0.0) - (e / self.classes * spread if e else 0.0)
            hard = torch.where(self._has_label(rows), hard, torch.nan)
        stats = torch.stack([*top.unbind(), log_u, log_v, log_x, expected], 1)
        # agreement would need an all-reduce of its own, for which nobody asks.
        by_products = ByProducts(entropy, of_teacher, None, None, None) if terms else None  # type: ignore[arg-type]
        return RowOutputs(soft, hard, stats, by_products)

    def per_row_backward(
        self,
        rows: RowProblem,
        stats: Tensor,
        grad_soft: Tensor,
        grad_hard: Tensor,
        needs: RowNeeds,
        *,
        in_place: bool = False,  # noqa: ARG002
        student_dtype: torch.dtype | None = None,
    ) -> RowGradients:
        """The gradient of this rank's columns of the student."""
        if not needs.student:
            return RowGradients(None, None, None, None, [None])
        x, _, u, v, slope = _softened(rows)
        of_u, of_v, of_x, log_u, log_v, log_x, expected = stats[:, :, None].unbind(1)
        t = rows.temperature[..., None] if isinstance(rows.temperature, Tensor) else rows.temperature
        factor = grad_soft[:, None] * (t if rows.scale_by_temperature else 1 / t)
        d = factor * _d_softened(rows.divergence, u - of_u - log_u, v - of_v - log_v, expected)
        if rows.labels is not None:
            e = rows.label_smoothing
            column, here = self._own_label(rows)
            hard = (x - of_x - log_x).exp() - e / self.classes
            hard.scatter_add_(-1, column, (e - 1) * here[:, None].to(hard.dtype))
            d = d + grad_hard[:, None] * torch.where(self._has_label(rows)[:, None], hard, torch.nan)
        d = d if slope is None else d * slope
        return RowGradients(d, None, None, None, [None]).with_student_of(student_dtype)


def _softened(rows: RowProblem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """x, y after their transforms, x/T, y/T, and dx by the raw logit (None: 1)."""
    raw, dtype = rows.student.to(rows.dtype), rows.dtype
    transform = rows.student_transform
    x, y = transform_logits(raw, transform), transform_logits(rows.teacher.to(dtype), rows.teacher_transform)
    slope = None
    if transform is not None:
        cap = transform.softcap
        slope = torch.full_like(x, transform.scale) if cap is None else transform.scale * (1 - (x / cap).square())
    t, teacher_t = (v[..., None] if isinstance(v, Tensor) else v for v in (rows.temperature, rows.teacher_temperature))
    return x, y, x / t, y / teacher_t, slope


def _log_ratio(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """a − b of log-probabilities, 0 where ``weight`` is: 0·log 0 = 0."""
    return torch.where(weight == 0, torch.zeros_like(a), a - b)


def _sums(divergence: Divergence, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's share of D(p, q), and of what :func:`_d_softened` subtracts."""
    q, p = log_q.exp(), log_p.exp()
    if isinstance(divergence, ForwardKL):
        value = (p * _log_ratio(log_p, log_q, p) - (p - q)).sum(-1)
        return value, torch.zeros_like(value)
    if isinstance(divergence, ReverseKL):
        value = (q * _log_ratio(log_q, log_p, q) - (q - p)).sum(-1)
        return value, value
    assert isinstance(divergence, JSD)
    beta = divergence.beta
    log_m = _log_mixture(beta, log_q, log_p)
    m = log_m.exp()
    of_p = (p * _log_ratio(log_p, log_m, p) - (p - m)).sum(-1)
    of_q = (q * _log_ratio(log_q, log_m, q) - (q - m)).sum(-1)
    return beta * of_p + (1 - beta) * of_q, of_q


def _log_mixture(beta: float, log_q: Tensor, log_p: Tensor) -> Tensor:
    return torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))


def _d_softened(divergence: Divergence, log_q: Tensor, log_p: Tensor, expected: Tensor) -> Tensor:
    """∂D/∂u of this rank's columns."""
    q = log_q.exp()
    if isinstance(divergence, ForwardKL):
        return q - log_p.exp()
    if isinstance(divergence, ReverseKL):
        return q * (_log_ratio(log_q, log_p, q) - expected)
    assert isinstance(divergence, JSD)
    log_m = _log_mixture(divergence.beta, log_q, log_p)
    return (1 - divergence.beta) * q * (_log_ratio(log_q, log_m, q) - expected)
