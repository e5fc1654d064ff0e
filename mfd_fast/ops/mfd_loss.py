"""mfd_loss: the whole multimodal distillation step of the student's head in one call.

Per row: pooled = modal_pool(features), z = pooled·Wᵀ + b, and
    loss = weight·(soft_weight·soft + hard_weight·hard + feature_weight·feature + pool_weight·pool)
with soft and hard of distill_loss(z, teacher_logits), feature the distance of pooled to the teacher's
features, pool = KL(teacher_pool_weights ‖ weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import contract
from ..backends import check_not_traced, choose, implementation
from ..divergences import Divergence
from ..reference.mfd_loss import mfd_loss as reference_loss
from ..rows import Rows
from ..types import MFDOutput
from .distill_loss import row_terms
from .feature_loss import distances
from .feature_problem import FeatureProblem, Tap
from .mfd_problem import MFDProblem, check_mfd_loss
from .modal_pool import pool
from .upstream import scale_gradients_

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
        recorded: bool,
        others: list[Tensor],
        query: Tensor | None,
        bias: Tensor | None,
        head_weight: Tensor,
        head_bias: Tensor | None,
        *features: Tensor,
    ) -> Tensor:
        # Under no_grad (`recorded` is False) autograd still says that a leaf needs its gradient.
        needs = [recorded and need for need in ctx.needs_input_grad[4:]]
        (loss, *fields), gradients = implementation(backend, "mfd_loss").scalar(problem, needs)
        others.extend(fields)
        if True in needs:
            ctx.gradients = gradients
            ctx.call = (problem, backend)
            # The last three are read again by a second backward only; autograd notices if they have changed.
            told = (problem.rows.teacher, problem.teacher_features, problem.teacher_pool_weights)
            ctx.save_for_backward(query, bias, head_weight, head_bias, *features, *told)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        problem, backend = ctx.call
        leaves = ctx.saved_tensors[:-3]
        needs = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():
            return (None, None, None, None, *_differentiable_gradients(problem, leaves, grad_loss, needs))
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # a second backward: the tensors were given away, so the pass is run again
            _, gradients = implementation(backend, "mfd_loss").scalar(_with_leaves(problem, leaves), needs)
        scale_gradients_([g for g in gradients if g is not None], grad_loss, backend)
        return (None, None, None, None, *gradients)


def _with_leaves(problem: MFDProblem, leaves: Sequence[Any]) -> MFDProblem:
    query, bias, head_weight, head_bias, *features = leaves
    pool = replace(problem.pool, query=query, bias=bias, features=features)
    return replace(problem, pool=pool, head_weight=head_weight, head_bias=head_bias)


def _differentiable_gradients(
    problem: MFDProblem, leaves: Sequence[Tensor | None], grad_loss: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """backward(create_graph=True): the same gradients as differentiable expressions, by the reference."""
    # One alias per role: a tensor that serves in two of them gets each role's gradient once.
    leaves = [None if t is None else t.view_as(t) for t in leaves]
    loss = reference_loss(_with_leaves(problem, leaves)).loss
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need and leaf is not None]
    found = iter(torch.autograd.grad(loss, wanted, grad_loss, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


# --------------------------------------------------------------------------------------------- from the ops


def _composed(problem: MFDProblem, backend: str) -> MFDOutput:
    """The reference's composition with the parts replaced by this library's ops: differentiable to everything."""

    def attention(features: list[Tensor], present: Tensor | None, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        p = problem.pool
        leading = features[0].shape[:-1]
        flat = replace(p, features=features, stacked=False, present=present, temperature=temperature, leading=leading)
        return pool(flat, backend)

    def terms(rows: Rows, soft: bool, hard: bool) -> tuple[Tensor, Tensor]:
        zeros = rows.student.new_zeros(rows.n_rows)
        if not (soft or hard):
            return zeros, zeros
        if not soft:  # the teacher has no part in the loss
            rows = rows.replace(teacher=rows.student.detach(), teacher_temperature=rows.temperature)
        soft_rows, hard_rows, *_ = row_terms(rows, backend, False, contract.is_recorded())
        return soft_rows if soft else zeros, hard_rows if hard else zeros

    def distance(pooled: Tensor, target: Tensor, kind: str) -> Tensor:
        tap = Tap(pooled, target, None, None, 1.0)
        return distances(FeatureProblem([tap], kind, "none", pooled.dtype, pooled.device), backend)[0]

    return reference_loss(problem, attention, terms, distance)


def _gradients_fit_one_pass(p: MFDProblem) -> bool:
    """The scalar pass differentiates the loss to features, query, bias and head, and to nothing else."""
    others = (
        p.rows.teacher,
        p.rows.temperature,
        p.rows.teacher_temperature,
        p.pool.temperature,
        p.teacher_features,
        p.teacher_pool_weights,
        p.soft_weight,
        p.hard_weight,
        p.feature_weight,
        p.pool_weight,
        p.weight,
        p.normalizer,
    )
    if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in others):
        return False
    # float16 gradients would underflow before a loss scale reaches them.
    return all(t is None or t.dtype != torch.float16 for t in (*p.pool.features, p.pool.query, p.head_weight))


def _has_one_pass(problem: MFDProblem, backend: str) -> bool:
    """Whether the backend computes this call in one pass; else it runs as a chain of the ops."""
    return backend == "cpu" or bool(implementation(backend, "mfd_loss").has_one_pass(problem))


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
        divergence, temperature, mask, weight, ignore_index, label_smoothing, scale_by_temperature,
            reduction, normalizer: as in :func:`mfd_fast.distill_loss`. A row that is masked or ignored
            contributes nothing to any term.
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
    compiling = contract.is_recorded()
    # Under torch.compile the registered ops choose when they run: no choice is baked into the graph.
    name = backend or "" if compiling else choose("mfd_loss", problem, backend)
    if name == "reference":
        return contract.by_pytorch("mfd_loss", problem.tensors(), lambda: reference_loss(problem))
    chained = compiling or reduction == "none" or not _gradients_fit_one_pass(problem)
    if chained or not _has_one_pass(problem, name):
        return _composed(problem, name)
    p = problem
    others: list[Tensor] = []
    leaves = (p.pool.query, p.pool.bias, p.head_weight, p.head_bias, *p.pool.features)
    loss = _ScalarLoss.apply(p, name, torch.is_grad_enabled(), others, *leaves)
    return MFDOutput(loss, *others)
