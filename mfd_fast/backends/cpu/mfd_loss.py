"""mfd_loss on the native CPU kernels: pool and feature term, head GEMM, rows, GEMMs, pool backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...divergences import ForwardKL
from ...reference.feature_loss import KINDS
from ...rows import is_used
from .. import allocate
from . import distill_loss, native
from .gemm import has_pair_product, linear, pair_product
from .modal_pool import can_run as pool_can_run
from .modal_pool import feature_gradients, native_pool
from .rows import NO_ROWS, address, cast, dense, rows_argument, streams

#: Logits of fewer rows may be shared between threads by columns, which read what others would overwrite.
IN_PLACE_ROWS = 64


#: Below this many multiplications bfloat16 saves less than the conversions cost.
NARROW_PRODUCTS = 1 << 22


def can_run(problem: Any) -> str | None:
    """Why the native kernels cannot take this call, None if they can."""
    return pool_can_run(problem.pool) or distill_loss.can_run(problem.rows)


def scalar(p: Any, needs: Sequence[bool]) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """The fields of MFDOutput, and the gradients of query, bias, head weight, head bias and each of the features."""
    module = native()
    keep: list[Tensor] = []
    threads = torch.get_num_threads()
    rows, pool, dtype, device = p.rows, p.pool, p.rows.dtype, p.device
    n, classes, width = rows.n_rows, rows.classes, pool.width
    use_soft, use_hard = is_used(p.soft_weight), rows.labels is not None and is_used(p.hard_weight)
    use_feature, use_pool = is_used(p.feature_weight), is_used(p.pool_weight)

    problem = distill_loss.native_problem(module, rows, rows.labels, keep)
    counted = distill_loss.count(module, rows, problem)
    divisor = 1.0
    if p.reduction == "mean":
        divisor = float(max(counted, 1) if p.normalizer is None else p.normalizer)
    call = module.Mfd(
        native_pool(module, pool, keep),
        problem,
        rows_argument(p.teacher_features, keep) if use_feature else NO_ROWS,
        KINDS.index(p.feature_kind),
        dense(p.teacher_pool_weights, dtype, keep) if use_pool else 0,
        address(p.weight),
        float(p.soft_weight),
        float(p.hard_weight),
        float(p.feature_weight),
        float(p.pool_weight),
        divisor,
        use_soft,
        use_hard,
    )
    pooled = allocate.empty_large(torch.Size([n, width]), dtype, device)
    weights = allocate.empty((*p.leading, pool.modalities), dtype, device)
    module.mfd_pool(call, pooled.data_ptr(), weights.data_ptr(), threads)

    # Logits are never rounded to 16 bits.
    head_weight, head_bias = p.head_weight, None if p.head_bias is None else cast(p.head_bias, dtype)
    narrow_pooled = None
    if head_weight.dtype is torch.bfloat16 and all(x.dtype is torch.bfloat16 for x in pool.features):
        narrow_pooled = pooled.bfloat16()  # as modal_pool gives it to eager's head
    if narrow_pooled is not None and has_pair_product(narrow_pooled, head_weight):
        logits = pair_product(narrow_pooled, head_weight, head_bias)
    else:
        # The exponential magnifies what the product loses, which no gradient of 16 bits shows.
        logits = linear(pooled, cast(head_weight, dtype), head_bias, exact=head_weight.dtype is dtype)

    need_query, need_bias, need_head_weight, need_head_bias, *need_features = needs
    need_pool = need_query or need_bias or any(need_features)
    need_logits = (use_soft or use_hard) and any(needs)
    in_place = n >= IN_PLACE_ROWS and type(rows.divergence) is ForwardKL
    d_logits = None
    if need_logits:
        d_logits = logits if in_place else allocate.empty_gradient(logits)
    loss, soft, hard, feature = outputs = [allocate.empty((), dtype, device) for _ in range(4)]
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
    fields = (*outputs, weights, predictions)
    if not any(needs):
        return fields, [None] * len(needs)

    d_pooled = d_head_weight = d_head_bias = None
    if d_logits is not None and (need_pool or need_head_weight):
        # Gradients that end in bfloat16 may pass through it, as eager's do, where that saves time.
        narrow = p.head_weight.dtype is torch.bfloat16 and n * classes * width >= NARROW_PRODUCTS
        if narrow:
            y = pooled.bfloat16() if narrow_pooled is None else narrow_pooled
            up, w = d_logits.bfloat16(), head_weight
        else:
            up, y, w = d_logits, pooled, cast(head_weight, dtype)
        if need_head_weight:
            d_head_weight = cast(linear(up.t(), y.t()), p.head_weight.dtype)
        if need_pool:
            d_pooled = linear(up, w.t())
    elif need_head_weight:
        d_head_weight = allocate.empty((classes, width), p.head_weight.dtype, device).zero_()
    if need_head_bias:
        d_head_bias = allocate.empty((classes,), dtype, device)
        if d_logits is None:
            d_head_bias.zero_()
    d_query = allocate.empty((width,), dtype, device) if need_query else None
    d_bias = allocate.empty((pool.modalities,), dtype, device) if need_bias else None
    d_features, addresses, row_stride = feature_gradients(
        pool.features, need_features, pool.stacked, pool.modalities, width
    )
    module.mfd_backward(
        call,
        weights.data_ptr(),
        pooled.data_ptr(),
        NO_ROWS if d_pooled is None else rows_argument(d_pooled, keep),
        address(d_logits),
        addresses,
        row_stride,
        streams(*d_features),
        address(d_query),
        address(d_bias),
        0 if d_logits is None else address(d_head_bias),
        threads,
    )
    if d_query is not None:
        d_query = cast(d_query, pool.query.dtype)
    if d_bias is not None:
        d_bias = cast(d_bias, pool.bias.dtype)
    if d_head_bias is not None:
        d_head_bias = cast(d_head_bias, p.head_bias.dtype)
    return fields, [d_query, d_bias, d_head_weight, d_head_bias, *d_features]
