"""mfd_loss on the native CPU kernels: pool and feature term, head GEMM, rows, GEMMs, pool backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...codes import FEATURE_KINDS
from ...divergences import CrossEntropy, ForwardKL
from ...problems.checks import is_used, temperature_range
from ...problems.mfd import MFDProblem
from ...types import MFDOutput
from .. import allocate
from ..native import NO_ROWS, address, cast, dense, feature_gradients, reads_mfd, row_matrix
from ..plans import Places
from ..protocol import MFDGradients, MFDNeeds
from . import distill_loss, native, streams
from . import modal_pool as pooling
from .gemm import NATIVE_PRODUCTS, has_pair_product, head_gradient, linear, pair_product

__all__ = ["call_plan", "can_run", "has_one_pass", "scalar"]

#: Logits of fewer rows may be shared between threads by columns, which read what others would overwrite.
IN_PLACE_ROWS = 64


#: Below this many multiplications bfloat16 saves less than the conversions cost.
NARROW_PRODUCTS = 1 << 22


def can_run(problem: MFDProblem) -> str | None:
    """Why the native kernels cannot take this call, None if they can."""
    return pooling.can_run(problem.pool) or distill_loss.can_run(problem.rows)


def has_one_pass(p: MFDProblem) -> bool:  # noqa: ARG001
    """Every call is one pass."""
    return True


def call_plan(p: MFDProblem, places: Places) -> Any:
    """The native plan of :func:`scalar` for calls like this one.

    None where there is more to do than read the arguments, for 16-bit or float64 arithmetic of the head, and for
    products that a library does faster.
    """
    rows, loss, n, classes = p.rows, p.loss, p.rows.n_rows, p.rows.classes
    if rows.dtype is not torch.float32 or n * classes * p.pool.width > NATIVE_PRODUCTS:
        return None
    if not reads_mfd(p, places, True):
        return None
    use_hard = rows.labels is not None and loss.use_hard
    use_feature, use_pool = is_used(p.feature_weight), is_used(p.pool_weight)
    module = native()
    keep: list[Any] = []
    call = module.Mfd(
        pooling.pool_description(module, p.pool, keep),
        distill_loss.row_description(module, rows, keep),
        row_matrix(p.teacher_features, keep) if use_feature and p.teacher_features is not None else NO_ROWS,
        FEATURE_KINDS[p.feature_kind],
        address(p.teacher_pool_weights) if use_pool else 0,
        *(0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0),
        loss.use_soft,
        use_hard,
    )
    in_place = n >= IN_PLACE_ROWS and type(rows.divergence) in (ForwardKL, CrossEntropy)
    mean = loss.reduction == "mean"
    return module.MFDPlan(call, p.pool.stacked, mean, in_place, *temperature_range(rows.dtype), *places.first())


def scalar(p: MFDProblem, needs: MFDNeeds) -> tuple[MFDOutput, MFDGradients]:
    """The outputs and, from the same pass, all gradients."""
    module = native()
    keep: list[Any] = []
    threads = torch.get_num_threads()
    rows, pool, terms, dtype, device = p.rows, p.pool, p.loss, p.rows.dtype, p.device
    n, classes, width = rows.n_rows, rows.classes, pool.width
    use_soft, use_hard = terms.use_soft, rows.labels is not None and terms.use_hard
    use_feature, use_pool = is_used(p.feature_weight), is_used(p.pool_weight)

    problem = distill_loss.row_description(module, rows, keep)
    counted = distill_loss.count(module, rows, problem)
    call = module.Mfd(
        pooling.pool_description(module, pool, keep),
        problem,
        row_matrix(p.teacher_features, keep) if use_feature and p.teacher_features is not None else NO_ROWS,
        FEATURE_KINDS[p.feature_kind],
        dense(p.teacher_pool_weights, dtype, keep) if use_pool else 0,
        address(terms.weight),
        float(terms.soft_weight),
        float(terms.hard_weight),
        float(p.feature_weight),
        float(p.pool_weight),
        *distill_loss.divisors(module, rows, terms, problem, counted),
        use_soft,
        use_hard,
    )
    pooled = allocate.empty_large(torch.Size([n, width]), dtype, device)
    weights = allocate.empty((*p.leading, pool.modalities), dtype, device)
    module.mfd_pool(call, pooled.data_ptr(), weights.data_ptr(), threads)

    # Logits are never rounded to 16 bits.
    head_weight, head_bias = p.head_weight, None if p.head_bias is None else cast(p.head_bias, dtype)
    narrow_pooled = None
    sixteen = all(x.dtype is torch.bfloat16 for x in (head_weight, *pool.features))
    if sixteen and dtype is torch.float32:  # not beside a float64 teacher
        narrow_pooled = pooled.bfloat16()  # as modal_pool gives it to eager's head
    if narrow_pooled is not None and has_pair_product(narrow_pooled, head_weight):
        logits = pair_product(narrow_pooled, head_weight, head_bias)
    else:
        # The exponential magnifies what the product loses, which no gradient of 16 bits shows.
        logits = linear(pooled, cast(head_weight, dtype), head_bias, exact=head_weight.dtype is dtype)

    need_pool = needs.query or needs.bias or any(needs.features)
    need_any = need_pool or needs.head_weight or needs.head_bias
    need_logits = (use_soft or use_hard) and need_any
    in_place = n >= IN_PLACE_ROWS and type(rows.divergence) in (ForwardKL, CrossEntropy)
    d_logits = None
    if need_logits:
        d_logits = logits if in_place else allocate.empty_gradient(logits)
    loss, soft, hard, feature = [allocate.empty((), dtype, device) for _ in range(4)]
    predictions = allocate.empty(tuple(p.leading), torch.int64, device)
    module.mfd_rows(
        call,
        logits.data_ptr(),
        loss.data_ptr(),
        soft.data_ptr(),
        hard.data_ptr(),
        feature.data_ptr(),
        predictions.data_ptr(),
        address(d_logits),
        streams(d_logits) and not in_place,
        threads,
    )
    found = MFDOutput(loss, soft, hard, feature, weights, predictions)
    if not need_any:
        return found, MFDGradients(None, None, None, None, [None] * len(needs.features))

    d_pooled = d_head_weight = d_head_bias = None
    if d_logits is not None and (need_pool or needs.head_weight):
        # Gradients that end in bfloat16 may pass through it, as eager's do, where that saves time.
        products = n * classes * width
        narrow = p.head_weight.dtype is torch.bfloat16 and dtype is torch.float32 and products >= NARROW_PRODUCTS
        if narrow:
            y = pooled.bfloat16() if narrow_pooled is None else narrow_pooled
            up, w = d_logits.bfloat16(), head_weight
        else:
            up, y, w = d_logits, pooled, cast(head_weight, dtype)
        if needs.head_weight:
            d_head_weight = cast(head_gradient(up, y), p.head_weight.dtype)
        if need_pool:
            d_pooled = linear(up, w.t())
    elif needs.head_weight:
        d_head_weight = allocate.empty((classes, width), p.head_weight.dtype, device).zero_()
    if needs.head_bias:
        d_head_bias = allocate.empty((classes,), dtype, device)
        if d_logits is None:
            d_head_bias.zero_()
    d_query = allocate.empty((width,), dtype, device) if needs.query else None
    d_bias = allocate.empty((pool.modalities,), dtype, device) if needs.bias else None
    d_features, addresses, row_stride = feature_gradients(
        pool.features, needs.features, pool.stacked, pool.modalities, width
    )
    module.mfd_backward(
        call,
        weights.data_ptr(),
        pooled.data_ptr(),
        NO_ROWS if d_pooled is None else row_matrix(d_pooled, keep),
        address(d_logits),
        addresses,
        row_stride,
        streams(*d_features),
        address(d_query),
        address(d_bias),
        0 if d_logits is None else address(d_head_bias),
        threads,
    )

    def like(gradient: Tensor | None, leaf: Tensor | None) -> Tensor | None:
        return None if gradient is None or leaf is None else cast(gradient, leaf.dtype)

    return found, MFDGradients(
        like(d_query, pool.query), like(d_bias, pool.bias), d_head_weight, like(d_head_bias, p.head_bias), d_features
    )
