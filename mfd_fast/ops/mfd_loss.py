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

from ..backends import check_not_traced, choose, choose_recorded, mfd_backend
from ..backends.plans import Done, Plans
from ..backends.protocol import MFDNeeds
from ..divergences import Divergence
from ..problems.checks import by_pytorch, is_recorded
from ..problems.features import distances_of
from ..problems.mfd import MFDProblem, check_mfd_loss
from ..problems.rows import Normalizer, RowProblem
from ..reference.mfd_loss import mfd_loss as reference_loss
from ..types import MFDOutput
from .autograd import (
    apply_of_plans,
    needs_reference,
    planned_gradients,
    ready_gradients,
    reference_gradients,
    requires_grad,
)
from .distill_loss import row_terms
from .feature_loss import distances
from .modal_pool import pool
from .registration import flatten, unflatten

# ------------------------------------------------------------------------------------------- one scalar loss


class _ScalarLoss(torch.autograd.Function):
    """A computed loss; the first backward hands out the gradients that were computed beside it without a copy."""

    @staticmethod
    def forward(ctx: Any, done: Done, *leaves: Tensor | None) -> Tensor:  # noqa: ARG004
        ((loss, *_), gradients), backend, tensors, rest, plan = done
        ctx.save_for_backward(*tensors, *gradients)
        ctx.call = backend, rest, -len(gradients), plan
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        backend, rest, place, plan = ctx.call
        kept = ctx.saved_tensors
        if (gradients := planned_gradients(ctx, kept, grad_loss, place, plan)) is not None:
            return (None, *gradients)
        needs = ctx.needs_input_grad[1:]

        def problem() -> MFDProblem:
            return _PLANS.problem(rest, iter(kept))

        if needs_reference(grad_loss):
            p = problem()

            def loss_of(leaves: list[Any]) -> list[Tensor]:
                return [reference_loss(_with_leaves(p, leaves)).loss]

            return None, *reference_gradients(_leaves(p), loss_of, [grad_loss], needs)

        def again() -> list[Tensor | None]:
            return flatten(mfd_backend(backend).scalar(problem(), _needs(needs))[1])

        return None, *ready_gradients(ctx, kept[place:], grad_loss, backend, again)


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
        *(loss.soft_weight, loss.hard_weight, loss.weight, loss.normalizer, loss.hard_normalizer),
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
    teacher_logits: Tensor | None,
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
    absent_pool_weights: str = "infinite",
    pool_weight: float | Tensor = 0.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    ignored_labels: str = "row",
    label_smoothing: float = 0.0,
    scale_by_temperature: bool = True,
    reduction: str = "mean",
    normalizer: Normalizer = None,
    backend: str | None = None,
) -> MFDOutput:
    """Fusion, classification head and all distillation terms in one call.

    Args:
        features, query, bias, present, pool_temperature, pool_scale: as in :func:`mfd_fast.modal_pool`
            (``query`` None: a weighted average by ``bias``).
        head_weight, head_bias: ``[C, D]`` and ``[C]`` or None. On "triton" and "cuda" the product of bfloat16 inputs
            reads the pooled features as bfloat16 and sums in float32.
        teacher_logits: ``[..., C]``, or None where ``soft_weight`` is the number 0; labels: int64 ``[...]``.
        teacher_features: ``[..., D]``, matched to the pooled features by ``feature_kind``.
        teacher_pool_weights: ``[..., M]``, each row a distribution over the modalities; adds
            ``pool_weight·KL(teacher_pool_weights ‖ weights)``.
        absent_pool_weights: of a teacher that gives weight to a modality that is absent here, "infinite": the KL is
            +inf; "renormalize": its weights of those that are present, divided by their sum (0 if that is 0).
        soft_weight, hard_weight, feature_weight, pool_weight: number or 0-d tensor; a term whose weight is
            the number 0 is not computed.
        divergence, temperature, label_smoothing, scale_by_temperature: as in :func:`mfd_fast.distill_loss`.
        mask, weight, ignore_index, ignored_labels, reduction, normalizer: as there. A row that is masked or ignored
            contributes nothing to any term; with ``ignored_labels="term"`` an ignored one loses the hard term alone.
            Of a pair of normalizers the first one is that of all terms but the hard one.
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
    arguments = (
        *(features, query, head_weight, head_bias, teacher_logits, labels, teacher_features, present, bias),
        *(pool_temperature, pool_scale, divergence, temperature, soft_weight, hard_weight, feature_weight),
        *(feature_kind, teacher_pool_weights, absent_pool_weights, pool_weight, mask, weight, ignore_index),
        *(ignored_labels, label_smoothing, scale_by_temperature, reduction, normalizer, backend),
    )
    if not torch.compiler.is_compiling() and (done := _PLANS.run(arguments)) is not None:
        outputs = done[0][0]
        if done[2] is None:
            return MFDOutput(*outputs)
        each = (features,) if isinstance(features, Tensor) else features
        return MFDOutput(_apply(done, query, bias, head_weight, head_bias, *each), *outputs[1:])

    check_not_traced("mfd_loss", backend)
    problem = _PLANS.check(arguments)
    recorded = is_recorded()
    name = (choose_recorded if recorded else choose)("mfd_loss", problem, backend)
    if name == "reference":
        return by_pytorch("mfd_loss", problem.named_tensors, lambda: reference_loss(problem))
    chained = recorded or reduction == "none" or not _gradients_fit_one_pass(problem)
    if chained or not mfd_backend(name).has_one_pass(problem):
        return _composed(problem, name)
    leaves = _leaves(problem)
    needs = [requires_grad(leaf) for leaf in leaves]
    with torch.no_grad():
        outputs, gradients = mfd_backend(name).scalar(problem, _needs(needs))
    paired = isinstance(normalizer, (tuple, list))  # a plan reads one number
    plan = None if paired else getattr(mfd_backend(name), "call_plan", None)
    done = _PLANS.computed((outputs, flatten(gradients)), name, problem, arguments, plan, problem)
    return MFDOutput(_ScalarLoss.apply(done, *leaves), *outputs[1:]) if any(needs) else outputs


_apply = apply_of_plans(_ScalarLoss)
_PLANS = Plans(
    mfd_loss,
    check_mfd_loss,
    numbers=(
        *("temperature", "pool_temperature", "soft_weight", "hard_weight", "feature_weight", "pool_weight"),
        "normalizer",
    ),
)
