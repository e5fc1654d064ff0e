"""The single pass of mfd_loss: loss and all row gradients of ROWS rows in one program, with tensor-core tiles.

Phases, with a block barrier between them; what one phase hands to the next is parked in scratch memory that stays in
the L2 cache (y, z and dz of a program's rows), so that the registers hold one tile at a time:
    a, y = pool(x)            feature distance of y on the fly
    z = y W^T + b             by tiles of classes; argmax
    statistics, loss, dz      the rows of `distill_loss`, out of z
    dy = dz W + feature part  by tiles of the width
    ds, dx_m, partial dquery  the backward pass of `modal_pool`
A row that is not counted has no modalities and no logits: nothing of it is read, its weights and gradients are 0.
Rows of z and dz are padded to z_stride, dz with 0; class counts and teacher strides come divided by UNIT, a power of
two: so the compiler sees the alignment of every row.
"""

import triton
import triton.language as tl

from .feature_rows import distance_terms, distance_value, gradient_factors, student_part
from .mfd_rows import logit_rows, multiply_add, operand, pool_divergence, pool_targets, reciprocal
from .modal_pool import (
    attention,
    feature_start,
    feature_tile,
    packed,
    presence,
    score,
    score_gradients,
    store_packed,
    streamed_dot,
    streamed_gradients,
)
from .reduce import counted_rows
from .rows import LAST, divide, row_labels, row_scalar
from .sides import row_start


@triton.jit(do_not_specialize=["n_rows", "ignore_index"])
def mfd_single_pass(
    x_ptrs,
    x_inners,
    x_outers,
    x_strides,
    query_ptr,
    bias_ptr,
    present_ptr,
    pool_temperature_ptr,
    pool_temperature: tl.float64,
    pool_scale: tl.float64,
    head_ptr,
    head_stride,
    head_bias_ptr,
    teacher_ptr,
    teacher_inner,
    teacher_outer,
    teacher_stride,
    labels_ptr,
    mask_ptr,
    weight_ptr,
    features_ptr,
    features_inner,
    features_outer,
    features_stride,
    pool_target_ptr,
    temperature_ptr,
    teacher_temperature_ptr,
    soft_weight_ptr,
    hard_weight_ptr,
    feature_weight_ptr,
    pool_weight_ptr,
    normalizer_ptr,
    temperature: tl.float64,
    teacher_temperature: tl.float64,
    soft_weight: tl.float64,
    hard_weight: tl.float64,
    feature_weight: tl.float64,
    pool_weight: tl.float64,
    normalizer: tl.float64,
    smoothing: tl.float64,
    a: tl.float64,
    b: tl.float64,
    y_ptr,
    z_ptr,
    dz_ptr,
    dy_ptr,
    weights_ptr,
    predictions_ptr,
    terms_ptrs,
    dx_ptrs,
    dx_stride,
    query_partial_ptr,
    bias_partial_ptr,
    head_bias_partial_ptr,
    n_rows: tl.int64,
    ignore_index: tl.int64,
    width,
    classes,
    z_stride,
    M: tl.constexpr,
    M_TILE: tl.constexpr,
    FLAT: tl.constexpr,
    T_FLAT: tl.constexpr,
    F_FLAT: tl.constexpr,
    POOL_STEP: tl.constexpr,
    T_STEP: tl.constexpr,
    TT_STEP: tl.constexpr,
    COUNT: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
    SQUARED: tl.constexpr,
    KIND: tl.constexpr,
    EXACT: tl.constexpr,
    POOL_EXACT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """terms[k][program] = sums over its rows of loss, soft, hard, feature, weighted, over the divisor; gradients."""
    DTYPE: tl.constexpr = tl.float32
    OPERAND: tl.constexpr = y_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    row = pid * ROWS + tl.arange(0, ROWS)
    exists = row < n_rows
    classes = classes * UNIT
    _label, counted, _bad = row_labels(labels_ptr, mask_ptr, row, n_rows, classes, ignore_index, ROWS)
    d_col = tl.arange(0, BLOCK_D)
    by = tl.full([1], 1.0, tl.float64)
    if COUNT:
        by = by * counted_rows(labels_ptr, mask_ptr, n_rows, ignore_index, 512)
    elif normalizer_ptr is not None:
        by = by * tl.load(normalizer_ptr)
    else:
        by = by * normalizer
    per_row = reciprocal(by)

    # Pool and feature distance.
    pool_scale = tl.full([1], pool_scale, DTYPE)
    tau = row_scalar(pool_temperature, pool_temperature_ptr, row, exists, POOL_STEP, ROWS, DTYPE)
    starts, active, scores = (), (), ()
    for m in tl.static_range(M):
        start = feature_start(row, x_inners, x_outers, x_strides, m, FLAT)
        on = presence(present_ptr, row, counted, m, M)
        s = tl.zeros([ROWS], DTYPE)
        if query_ptr is not None:
            s = pool_scale * streamed_dot(x_ptrs[m], start, on, query_ptr, None, None, width, ROWS, BLOCK_D, DTYPE)
        starts = starts + (start,)
        active = active + (on,)
        scores = scores + (score(s, None, bias_ptr, row, on, m, M, DTYPE),)
    weights, logs = attention(scores, active, tau, POOL_EXACT, M)
    pool_kl = tl.zeros([ROWS], DTYPE)
    if pool_target_ptr is not None:
        pool_kl = pool_divergence(pool_target_ptr, row, counted, logs, M, DTYPE)
    store_packed(weights_ptr, packed(weights, M, M_TILE), row, exists, M, M_TILE)

    features_start = row_start(row, features_inner, features_outer, features_stride, F_FLAT, 1)
    terms_a = tl.zeros([ROWS, BLOCK_D], DTYPE)
    terms_b, terms_c = terms_a, terms_a
    y_row = (row * width)[:, None]
    for first in range(0, width, BLOCK_D):
        here = d_col + first
        y = weights[0][:, None] * feature_tile(x_ptrs[0], starts[0], here, width, active[0], DTYPE)
        for m in tl.static_range(1, M):
            y += weights[m][:, None] * feature_tile(x_ptrs[m], starts[m], here, width, active[m], DTYPE)
        keep = exists[:, None] & (here < width)[None, :]
        tl.store(y_ptr + y_row + here[None, :], operand(y, OPERAND), mask=keep)
        if features_ptr is not None:
            t = feature_tile(features_ptr, features_start, here, width, counted, DTYPE)
            tile_a, tile_b, tile_c = distance_terms(y, t, KIND)
            terms_a += tile_a
            if KIND == 2:
                terms_b += tile_b
                terms_c += tile_c
            if dy_ptr is not None:
                tl.store(dy_ptr + y_row + here[None, :], y, mask=keep)
    tl.debug_barrier()

    # Logits.
    best = tl.full([ROWS], float("-inf"), DTYPE)
    best_at = tl.full([ROWS], LAST, tl.int32)
    nan_at = best_at
    z_row = row * z_stride
    k = tl.arange(0, BLOCK_K)
    for c_first in range(0, classes, BLOCK_C):
        c = c_first + tl.arange(0, BLOCK_C)
        head_at = head_ptr + c.to(tl.int64)[None, :] * head_stride
        z = tl.zeros([ROWS, BLOCK_C], DTYPE)
        for d_first in range(0, width, BLOCK_K):
            d = d_first + k
            y = tl.load(y_ptr + y_row + d[None, :], mask=exists[:, None] & (d < width)[None, :], other=0.0)
            head = tl.load(head_at + d[:, None], mask=(d < width)[:, None] & (c < classes)[None, :], other=0.0)
            z = multiply_add(y, head.to(OPERAND), z)
        if head_bias_ptr is not None:
            z += tl.load(head_bias_ptr + c, mask=c < classes, other=0.0).to(DTYPE)[None, :]
        inside = (c < classes)[None, :]
        tl.store(z_ptr + z_row[:, None] + c[None, :], z, mask=exists[:, None] & (c < z_stride)[None, :])
        top = tl.max(tl.where(inside, z, float("-inf")), 1)
        at = tl.min(tl.where(inside & (z == top[:, None]), c[None, :], LAST), 1)
        best_at = tl.where(top > best, at, tl.where(top == best, tl.minimum(best_at, at), best_at))
        best = tl.maximum(best, top)
        nan_at = tl.minimum(nan_at, tl.min(tl.where(inside & (z != z), c[None, :], LAST), 1))
    found = tl.where(nan_at < LAST, nan_at, best_at)
    tl.store(predictions_ptr + row, tl.where(counted, found, -1).to(tl.int64), mask=exists)
    tl.debug_barrier()

    # Loss of the logits and its gradient, one row per warp at a time.
    soft_total = tl.zeros([GROUP], tl.float64)
    hard_total, loss_total = soft_total, soft_total
    for group in range(0, ROWS, GROUP):
        part = pid * ROWS + group + tl.arange(0, GROUP)
        loss, soft, hard = logit_rows(
            part,
            group > 0,
            pid,
            per_row,
            z_ptr,
            dz_ptr,
            head_bias_partial_ptr,
            teacher_ptr,
            teacher_inner,
            teacher_outer,
            teacher_stride,
            labels_ptr,
            mask_ptr,
            weight_ptr,
            temperature_ptr,
            teacher_temperature_ptr,
            soft_weight_ptr,
            hard_weight_ptr,
            temperature,
            teacher_temperature,
            soft_weight,
            hard_weight,
            smoothing,
            a,
            b,
            n_rows,
            ignore_index,
            classes,
            z_stride,
            T_FLAT,
            T_STEP,
            TT_STEP,
            DIVERGENCE,
            HARD,
            SMOOTH,
            SQUARED,
            EXACT,
            CONTIGUOUS,
            UNIT,
            GROUP,
            LANES,
            VEC,
            DTYPE,
        )
        loss_total += loss
        soft_total += soft
        hard_total += hard

    # What features and pool weights add to the loss.
    w = tl.full([ROWS], 1.0, DTYPE)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + row, mask=counted, other=0.0)
    share64 = w.to(tl.float64) * per_row
    share = share64.to(DTYPE)
    none = tl.zeros([ROWS], DTYPE)
    extra, feature = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
    of_y, of_t = none, none
    if features_ptr is not None:
        sum_a, sum_b, sum_c = tl.sum(terms_a, 1), tl.sum(terms_b, 1), tl.sum(terms_c, 1)
        feature_w = row_scalar(feature_weight, feature_weight_ptr, row, exists, 0, ROWS, tl.float64)
        feature = tl.where(counted, share64 * distance_value(sum_a, sum_b, sum_c, width, KIND), 0.0)
        extra += feature_w * feature
        of_y, of_t, _of_tt = gradient_factors(sum_a, sum_b, sum_c, feature_w.to(DTYPE) * share, width, KIND)
    pool_share = none
    if pool_target_ptr is not None:
        pool_w = row_scalar(pool_weight, pool_weight_ptr, row, exists, 0, ROWS, tl.float64)
        extra += pool_w * tl.where(counted, share64 * pool_kl, 0.0)
        pool_share = pool_w.to(DTYPE) * share
    tl.store(terms_ptrs[0] + pid, tl.sum(loss_total, 0) + tl.sum(extra, 0))
    tl.store(terms_ptrs[1] + pid, tl.sum(soft_total, 0))
    tl.store(terms_ptrs[2] + pid, tl.sum(hard_total, 0))
    tl.store(terms_ptrs[3] + pid, tl.sum(feature, 0))

    if dy_ptr is not None:
        tl.debug_barrier()
        # dy = dz W + the gradient of the feature distance.
        for d_first in range(0, width, BLOCK_C):
            d = d_first + tl.arange(0, BLOCK_C)
            dy = tl.zeros([ROWS, BLOCK_C], DTYPE)
            for c_first in range(0, z_stride, BLOCK_K):
                c = c_first + k
                head_at = head_ptr + c.to(tl.int64)[:, None] * head_stride + d[None, :]
                head = tl.load(head_at, mask=(c < classes)[:, None] & (d < width)[None, :], other=0.0)
                dz_at = dz_ptr + z_row[:, None] + c[None, :]
                dz = tl.load(dz_at, mask=exists[:, None] & (c < z_stride)[None, :], other=0.0)
                dy = multiply_add(dz, head.to(OPERAND), dy)
            keep = exists[:, None] & (d < width)[None, :]
            at = dy_ptr + y_row + d[None, :]
            if features_ptr is not None:
                y = tl.load(at, mask=keep, other=0.0)
                t = feature_tile(features_ptr, features_start, d, width, counted, DTYPE)
                dy += tl.where(counted[:, None], student_part(y, t, of_y, of_t, KIND), 0.0)
                tl.debug_barrier()
            tl.store(at, dy, mask=keep)
        tl.debug_barrier()

        # Backward pass of the pool.
        dots = ()
        for m in tl.static_range(M):
            dot = streamed_dot(
                x_ptrs[m], starts[m], active[m], dy_ptr, row * width, exists, width, ROWS, BLOCK_D, DTYPE
            )
            dots = dots + (dot,)
        ds = score_gradients(weights, active, dots, tau, M)
        if pool_target_ptr is not None:
            target = pool_targets(pool_target_ptr, row, active, M, DTYPE)
            target_sum = none
            for m in tl.static_range(M):
                target_sum += target[m]
            both = ()
            for m in tl.static_range(M):
                extra = divide(pool_share * (weights[m] * target_sum - target[m]), tau)
                both = both + (ds[m] + tl.where(active[m], extra, 0.0),)
            ds = both
        if bias_partial_ptr is not None:
            column = tl.arange(0, M_TILE)
            total = tl.sum(packed(ds, M, M_TILE), 0)
            tl.store(bias_partial_ptr + pid * M + column, total, mask=column < M)
        streamed_gradients(
            x_ptrs,
            starts,
            active,
            weights,
            ds,
            dy_ptr,
            row * width,
            query_ptr,
            dx_ptrs,
            dx_stride,
            query_partial_ptr,
            pid,
            False,
            row,
            exists,
            pool_scale,
            width,
            M,
            ROWS,
            BLOCK_D,
            DTYPE,
        )
