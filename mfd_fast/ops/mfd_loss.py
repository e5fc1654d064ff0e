"""mfd_loss: the whole multimodal distillation step of the student's head in one call.

Per row: pooled = modal_pool(features), z = pooled·Wᵀ + b, and
    loss = weight·(soft_weight·soft + hard_weight·hard + feature_weight·feature + pool_weight·pool)
with soft and hard of distill_loss(z, teacher_logits), feature the distance of pooled to the teacher's
features, pool = KL(teacher_pool_weights ‖ weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import check_not_traced, choose, mfd_backend
from ..backends.protocol import MFDNeeds
from ..divergences import Divergence
from ..problems.checks import by_pytorch, is_recorded
from ..problems.features import distances_of
from ..problems.mfd import MFDProblem, check_mfd_loss
from ..problems.rows import RowProblem
from ..reference.mfd_loss import mfd_loss as reference_loss
from ..types import MFDOutput
from .autograd import needs_reference, ready_gradients, reference_gradients, requires_grad, save, saved
from .distill_loss import row_terms
from .feature_loss import distances
from .modal_pool import pool
from .registration import flatten, unflatten

# ------------------------------------------------------------------------------------------- one scalar loss


class _ScalarLoss(torch.autograd.Function):
    """The loss; every gradient is computed beside it and handed to the first backward. ``others`` receives the
    detached fields of MFDOutput.
    """

    @staticmethod
    def forward(
        ctx: Any,
        problem: MFDProblem,
        backend: str,
        grad_enabled: bool,
        others: list[Tensor],
        *leaves: Tensor | None,  # noqa: ARG004
    ) -> Tensor:
        # Under no_grad (`grad_enabled` is False) autograd still says that a leaf needs its gradient.
        needs = _needs([grad_enabled and need for need in ctx.needs_input_grad[4:]])
        (loss, *fields), gradients = mfd_backend(backend).scalar(problem, needs)
        others.extend(fields)
        if any(flatten(needs)):
            save(ctx, (problem,), *flatten(gradients))
            ctx.backend = backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[4:]
        if needs_reference(grad_loss):
            (problem,), _ = saved(ctx)

            def loss_of(leaves: list[Any]) -> list[Tensor]:
                return [reference_loss(_with_leaves(problem, leaves)).loss]

            return None, None, None, None, *reference_gradients(_leaves(problem), loss_of, [grad_loss], needs)

        def again() -> list[Tensor | None]:
            (problem,), _ = saved(ctx)
            return flatten(mfd_backend(ctx.backend).scalar(problem, _needs(needs))[1])

        return None, None, None, None, *ready_gradients(ctx, grad_loss, ctx.backend, ctx.count, again)


def _needs(flat: Sequence[bool]) -> MFDNeeds:
    needs: MFDNeeds = unflatten(MFDNeeds, flat, len(flat) - 4)
    return needs


def _leaves(p: MFDProblem) -> tuple[Tensor | None, ...]:
    return p.pool.query, p.pool.bias, p.head_weight, p.head_bias, *p.pool.features


def _with_leaves(problem: MFDProblem, leaves: Sequence[Any]) -> MFDProblem:
    query, bias, head_weight, head_bias, *features = leaves
    pooled = problem.pool.replace(query=query, bias=bias, features=features)
    return problem.replace(pool=pooled, head_weight=head_weight, head_bias=head_bias)


# --------------------------------------------------------------------------------------------- from the ops


def _composed(problem: MFDProblem, backend: str) -> MFDOutput:
    """The reference's composition with the parts replaced by this library's ops: differentiable to everything."""

    def attention(features: list[Tensor], present: Tensor | None, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        flat = problem.pool.replace(features=features, stacked=False, present=present, temperature=temperature)
        flat.measure()
        return pool(flat, backend)

    def terms(rows: RowProblem, soft: bool, hard: bool) -> tuple[Tensor, Tensor]:
        zeros = rows.student.new_zeros(rows.n_rows)
        if not (soft or hard):
            return zeros, zeros
        soft_rows, hard_rows, *_ = row_terms(rows if soft else rows.without_teacher(), backend, False)
        return soft_rows if soft else zeros, hard_rows if hard else zeros

    def distance(pooled: Tensor, target: Tensor, kind: str) -> Tensor:
        return distances(distances_of([pooled], [target], kind), backend)[0]

    return reference_loss(problem, attention, terms, distance)


def _gradients_fit_one_pass(p: MFDProblem) -> bool:
    """The scalar pass differentiates the loss to features, query, bias and head, and to nothing else."""
    rows, loss = p.rows, p.loss
    if requires_grad(
        *(rows.teacher, rows.temperature, rows.own_teacher_temperature, p.pool.temperature),
        *(p.teacher_features, p.teacher_pool_weights, p.feature_weight, p.pool_weight),
        *(loss.soft_weight, loss.hard_weight, loss.weight, loss.normalizer),
    ):
        return False
    # float16 gradients would underflow before a loss scale reaches them.
    return all(t is None or t.dtype != torch.float16 for t in (*p.pool.features, p.pool.query, p.head_weight))


# ------------------------------------------------------------------------------------------- public function


def mfd_loss(
    features: Sequence[Tensor] | Tensor,
    query: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    teacher_features: Tensor | None = None,
    present: Tensor | None = None,
    bias: Tensor | None = None,
    pool_temperature: float | Tensor = 1.0,
    pool_scale: float | None = None,
    divergence: str | Divergence = "forward_kl",
    temperature: float | Tensor = 1.0,
    soft_weight: float | Tensor = 1.0,
    hard_weight: float | Tensor = 0.0,
    feature_weight: float | Tensor = 0.0,
    feature_kind: str = "mse",
    teacher_pool_weights: Tensor | None = None,
    pool_weight: float | Tensor = 0.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    scale_by_temperature: bool = True,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> MFDOutput:
    """Fusion, classification head and all distillation terms in one call.

    Args:
        features, query, bias, present, pool_temperature, pool_scale: as in :func:`mfd_fast.modal_pool`
            (``query`` None: a weighted average by ``bias``).
        head_weight, head_bias: ``[C, D]`` and ``[C]`` or None. On "triton" and "cuda" the product of bfloat16 inputs
            reads the pooled features as bfloat16 and sums in float32.
        teacher_logits: ``[..., C]``; labels: int64 ``[...]``.
        teacher_features: ``[..., D]``, matched to the pooled features by ``feature_kind``.
        teacher_pool_weights: ``[..., M]``, each row a distribution over the modalities; adds
            ``pool_weight·KL(teacher_pool_weights ‖ weights)`` (+inf where it gives weight to an absent modality).
        soft_weight, hard_weight, feature_weight, pool_weight: number or 0-d tensor; a term whose weight is
            the number 0 is not computed.
        divergence, temperature, label_smoothing, scale_by_temperature: as in :func:`mfd_fast.distill_loss`.
        mask, weight, ignore_index, reduction, normalizer: as there. A row that is masked or ignored contributes
            nothing to any term.
        backend: "reference", "cpu", "triton", "cuda" or None for the fastest that can run.

    Returns:
        :class:`~mfd_fast.types.MFDOutput`. ``loss`` is differentiable to every floating input; ``soft``,
        ``hard`` and ``feature`` are the detached terms before their weights (0 if not computed), reduced
        like the loss (row ``weight`` included); on rows that are not counted ``weights`` is 0 and
        ``predictions`` is -1.

    Raises:
        TypeError, ValueError: an argument breaks the contract. BackendError: the backend cannot run.

    >>> import torch, mfd_fast as mfd
    >>> image, text = torch.randn(4, 8), torch.randn(4, 8)
    >>> out = mfd.mfd_loss([image, text], torch.randn(8), torch.randn(5, 8), None, torch.randn(4, 5))
    >>> out.loss.shape, out.weights.shape, out.predictions.shape
    (torch.Size([]), torch.Size([4, 2]), torch.Size([4]))
    """
    check_not_traced("mfd_loss", backend)
    problem = check_mfd_loss(
        "mfd_loss",
        features,
        query,
        head_weight,
        head_bias,
        teacher_logits,
        labels,
        teacher_features=teacher_features,
        present=present,
        bias=bias,
        pool_temperature=pool_temperature,
        pool_scale=pool_scale,
        divergence=divergence,
        temperature=temperature,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        feature_weight=feature_weight,
        feature_kind=feature_kind,
        teacher_pool_weights=teacher_pool_weights,
        pool_weight=pool_weight,
        mask=mask,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        scale_by_temperature=scale_by_temperature,
        reduction=reduction,
        normalizer=normalizer,
    )
    recorded = is_recorded()
    # Under torch.compile the registered ops choose when they run: no choice is baked into the graph.
    name = backend or "" if recorded else choose("mfd_loss", problem, backend)
    if name == "reference":
        return by_pytorch("mfd_loss", problem.named_tensors, lambda: reference_loss(problem))
    chained = recorded or reduction == "none" or not _gradients_fit_one_pass(problem)
    if chained or not mfd_backend(name).has_one_pass(problem):
        return _composed(problem, name)
    others: list[Tensor] = []
    loss = _ScalarLoss.apply(problem, name, torch.is_grad_enabled(), others, *_leaves(problem))
    return MFDOutput(loss, *others)
