"""The single pass of mfd_loss: loss and all row gradients of ROWS rows in one program, with tensor-core tiles.

Phases, with a block barrier between them; what one phase hands to the next is parked in scratch memory that stays in
the L2 cache (y, z and dz of a program's rows), so that the registers hold one tile at a time:
    a, y = pool(x)            feature distance of y on the fly
    z = y W^T + b             by tiles of classes; argmax
    statistics, loss, dz      the rows of `distill`, out of z
    dy = dz W + feature part  by tiles of the width
    ds, dx_m, partial dquery  the backward pass of `modal_pool`
A row that is not counted has no modalities and no logits: nothing of it is read, its weights and gradients are 0.
Rows of z and dz are padded to z_stride, dz with 0; class counts and teacher strides come divided by UNIT, a power of
two: so the compiler sees the alignment of every row.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..features.distances import (
    distance_terms,
    distance_value,
    gradient_factors,
    is_scaled,
    norm_scale,
    student_part,
)
from ..pool.modal_pool import (
    PoolGradients,
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
    streamed_sum,
)
from ..rows.arithmetic import LAST, divide, row_labels, row_scalar
from ..rows.reduce import counted_rows
from ..rows.sides import row_start
from .logit_rows import logit_rows, multiply_add, operand, pool_divergence, pool_targets, reciprocal


class Extra(NamedTuple):
    """What mfd_loss has beside rows and pool: the head, the teacher's features and pool weights, and their weights.

    COUNT: the loss is divided by the number of counted rows. F_FLAT: as in `structs.Logits`.
    """

    head_ptr: tl.tensor
    head_bias_ptr: tl.tensor
    features_ptr: tl.tensor
    pool_target_ptr: tl.tensor
    feature_weight_ptr: tl.tensor
    pool_weight_ptr: tl.tensor
    F_FLAT: tl.constexpr
    FEATURE_KIND: tl.constexpr
    COUNT: tl.constexpr


class Outputs(NamedTuple):
    """Parked y, z, dz, dy [N, ...] (dz, dy None where no gradient needs them), results, and sums per program."""

    y_ptr: tl.tensor
    z_ptr: tl.tensor
    dz_ptr: tl.tensor
    dy_ptr: tl.tensor
    weights_ptr: tl.tensor
    predictions_ptr: tl.tensor
    terms_ptrs: tl.tuple
    head_bias_partial_ptr: tl.tensor
    pool: PoolGradients


class Tiles(NamedTuple):
    """ROWS of a program, columns of tiles of products, features, and their summands."""

    ROWS: tl.constexpr
    BLOCK_C: tl.constexpr
    BLOCK_D: tl.constexpr
    BLOCK_K: tl.constexpr


class MFDNumbers(NamedTuple):
    """The numbers that `logit_rows` needs."""

    temperature: tl.tensor
    teacher_temperature: tl.tensor
    soft_weight: tl.tensor
    hard_weight: tl.tensor
    smoothing: tl.tensor
    a: tl.tensor
    b: tl.tensor
    n_rows: tl.tensor
    ignore_index: tl.tensor
    classes: tl.tensor
    z_stride: tl.tensor
    t_inner: tl.tensor
    t_outer: tl.tensor
    t_row: tl.tensor


@triton.jit
def modality_starts(p, row, counted):
    """Per modality where its rows start, and whether it takes part."""
    starts, active = (), ()
    for m in tl.static_range(p.M):
        starts = starts + (feature_start(p.x, row, m),)
        active = active + (presence(p, row, counted, m),)
    return starts, active


@triton.jit
def pool_weights(p, out, starts, active, row, exists, tau, scale, width, how):
    """Per modality its weight and the logarithm of that; stored."""
    scores = ()
    for m in tl.static_range(p.M):
        s = tl.zeros([how.ROWS], tl.float32)
        if p.query_ptr is not None:
            s = scale * streamed_dot(p.x.ptrs[m], starts[m], active[m], p.query_ptr, None, None, width, how)
        scores = scores + (score(p, s, row, active[m], m),)
    weights, logs = attention(scores, active, tau, how.EXACT, p.M)
    store_packed(out.weights_ptr, packed(weights, p.M, p.M_TILE), row, exists, p.M, p.M_TILE)
    return weights, logs


@triton.jit
def park_pooled(p, extra, out, starts, active, weights, row, exists, counted, features_start, width, how):
    """Parks y (and a copy in dy for the feature gradient); the row sums of `distance_terms`."""
    DTYPE: tl.constexpr = tl.float32
    OPERAND: tl.constexpr = out.y_ptr.dtype.element_ty
    terms_a = tl.zeros([how.ROWS, how.BLOCK_D], DTYPE)
    terms_b, terms_c = terms_a, terms_a
    y_row = (row * width)[:, None]
    for first in range(0, width, how.BLOCK_D):
        here = tl.arange(0, how.BLOCK_D) + first
        y = streamed_sum(p.x, starts, active, weights, here, width, p.M, DTYPE)
        keep = exists[:, None] & (here < width)[None, :]
        tl.store(out.y_ptr + y_row + here[None, :], operand(y, OPERAND), mask=keep)
        if extra.features_ptr is not None:
            t = feature_tile(extra.features_ptr, features_start, here, width, counted, DTYPE)
            tile_a, tile_b, tile_c = distance_terms(y, t, extra.FEATURE_KIND)
            terms_a += tile_a
            if extra.FEATURE_KIND == 2:
                terms_b += tile_b
                terms_c += tile_c
            if out.dy_ptr is not None:
                tl.store(out.dy_ptr + y_row + here[None, :], y, mask=keep)
    return tl.sum(terms_a, 1), tl.sum(terms_b, 1), tl.sum(terms_c, 1)


@triton.jit
def scaled_distance(p, extra, starts, active, weights, by_y, by_t, counted, features_start, width, how):
    """The row sums of the cosine's `distance_terms` of scaled rows, whose squares are within range."""
    terms_a = tl.zeros([how.ROWS, how.BLOCK_D], tl.float32)
    terms_b, terms_c = terms_a, terms_a
    for first in range(0, width, how.BLOCK_D):
        here = tl.arange(0, how.BLOCK_D) + first
        y = streamed_sum(p.x, starts, active, weights, here, width, p.M, tl.float32)
        t = feature_tile(extra.features_ptr, features_start, here, width, counted, tl.float32)
        tile_a, tile_b, tile_c = distance_terms(by_y[:, None] * y, by_t[:, None] * t, 2)
        terms_a, terms_b, terms_c = terms_a + tile_a, terms_b + tile_b, terms_c + tile_c
    return tl.sum(terms_a, 1), tl.sum(terms_b, 1), tl.sum(terms_c, 1)


@triton.jit
def pool_phase(p, extra, out, row, exists, counted, tau, scale, features_start, width, how):
    """Parks y; the divergence of the pool weights, the row sums of the feature distance and the scales of its rows."""
    starts, active = modality_starts(p, row, counted)
    weights, logs = pool_weights(p, out, starts, active, row, exists, tau, scale, width, how)
    pool_kl = tl.zeros([how.ROWS], tl.float32)
    if extra.pool_target_ptr is not None:
        pool_kl = pool_divergence(extra.pool_target_ptr, row, counted, logs, p.M, tl.float32)
    a, b, c = park_pooled(p, extra, out, starts, active, weights, row, exists, counted, features_start, width, how)
    by_y = tl.full([how.ROWS], 1.0, tl.float32)
    by_t = by_y
    if (extra.features_ptr is not None) and (extra.FEATURE_KIND == 2):
        by_y, by_t = norm_scale(b, counted), norm_scale(c, counted)
        if is_scaled(by_y, by_t):
            a, b, c = scaled_distance(
                p, extra, starts, active, weights, by_y, by_t, counted, features_start, width, how
            )
    return pool_kl, a, b, c, by_y, by_t


@triton.jit
def park_logits(extra, out, row, exists, counted, width, classes, z_stride, head_stride, tiles):
    """Parks z = y W^T + b and stores the argmax, the first NaN if there is one, -1 where a row is not counted."""
    OPERAND: tl.constexpr = out.y_ptr.dtype.element_ty
    best = tl.full([tiles.ROWS], float("-inf"), tl.float32)
    best_at = tl.full([tiles.ROWS], LAST, tl.int32)
    nan_at = best_at
    y_row, z_row = (row * width)[:, None], row * z_stride
    for c_first in range(0, classes, tiles.BLOCK_C):
        c = c_first + tl.arange(0, tiles.BLOCK_C)
        head_at = extra.head_ptr + c.to(tl.int64)[None, :] * head_stride
        z = tl.zeros([tiles.ROWS, tiles.BLOCK_C], tl.float32)
        for d_first in range(0, width, tiles.BLOCK_K):
            d = d_first + tl.arange(0, tiles.BLOCK_K)
            y = tl.load(out.y_ptr + y_row + d[None, :], mask=exists[:, None] & (d < width)[None, :], other=0.0)
            head = tl.load(head_at + d[:, None], mask=(d < width)[:, None] & (c < classes)[None, :], other=0.0)
            z = multiply_add(y, head.to(OPERAND), z)
        if extra.head_bias_ptr is not None:
            z += tl.load(extra.head_bias_ptr + c, mask=c < classes, other=0.0).to(tl.float32)[None, :]
        inside = (c < classes)[None, :]
        tl.store(out.z_ptr + z_row[:, None] + c[None, :], z, mask=exists[:, None] & (c < z_stride)[None, :])
        top = tl.max(tl.where(inside, z, float("-inf")), 1)
        at = tl.min(tl.where(inside & (z == top[:, None]), c[None, :], LAST), 1)
        best_at = tl.where(top > best, at, tl.where(top == best, tl.minimum(best_at, at), best_at))
        best = tl.maximum(best, top)
        nan_at = tl.minimum(nan_at, tl.min(tl.where(inside & (z != z), c[None, :], LAST), 1))
    found = tl.where(nan_at < LAST, nan_at, best_at)
    tl.store(out.predictions_ptr + row, tl.where(counted, found, -1).to(tl.int64), mask=exists)


@triton.jit
def loss_of_logits(rows, loss, out, pid, per_row, numbers, tiles, how):
    """Sums over the program of the shares of loss, soft and hard; writes dz. One row per warp at a time."""
    soft_total = tl.zeros([how.ROWS], tl.float64)
    hard_total, loss_total = soft_total, soft_total
    for group in range(0, tiles.ROWS, how.ROWS):
        row = pid * tiles.ROWS + group + tl.arange(0, how.ROWS)
        total, soft, hard = logit_rows(rows, loss, out, row, group > 0, pid, per_row, numbers, how)
        loss_total += total
        soft_total += soft
        hard_total += hard
    return tl.sum(loss_total, 0), tl.sum(soft_total, 0), tl.sum(hard_total, 0)


@triton.jit
def other_losses(extra, numbers, pool_kl, a, b, c, by_y, by_t, share64, row, exists, counted, width):
    """[ROWS] what features and pool weights add to the loss, the share of the features, and for the gradients
    the factors of `student_part` and what a row counts for in the divergence of the pool weights.
    """
    ROWS: tl.constexpr = row.shape[0]
    feature = tl.zeros([ROWS], tl.float64)
    more, share = feature, share64.to(tl.float32)
    of_y = tl.zeros([ROWS], tl.float32)
    of_t, pool_share = of_y, of_y
    if extra.features_ptr is not None:
        feature_w = row_scalar(numbers[0], extra.feature_weight_ptr, row, exists, 0, ROWS, tl.float64)
        distance = distance_value(a, b, c, by_y, by_t, width, extra.FEATURE_KIND)
        feature = tl.where(counted, share64 * distance, 0.0)
        more += feature_w * feature
        each = feature_w.to(tl.float32) * share
        of_y, of_t, _of_tt = gradient_factors(a, b, c, by_y, by_t, each, width, extra.FEATURE_KIND)
    if extra.pool_target_ptr is not None:
        pool_w = row_scalar(numbers[1], extra.pool_weight_ptr, row, exists, 0, ROWS, tl.float64)
        more += pool_w * tl.where(counted, share64 * pool_kl, 0.0)
        pool_share = pool_w.to(tl.float32) * share
    return more, feature, of_y, of_t, pool_share


@triton.jit
def park_dy(extra, out, row, exists, counted, features_start, factors, width, classes, z_stride, head_stride, tiles):
    """Parks dy = dz W + the gradient of the feature distance, which takes the y that was parked there.

    factors: of_y, of_t and the scales of the rows, as `student_part` takes them.
    """
    of_y, of_t, by_y, by_t = factors
    OPERAND: tl.constexpr = out.y_ptr.dtype.element_ty
    y_row, z_row = (row * width)[:, None], (row * z_stride)[:, None]
    for d_first in range(0, width, tiles.BLOCK_C):
        d = d_first + tl.arange(0, tiles.BLOCK_C)
        dy = tl.zeros([tiles.ROWS, tiles.BLOCK_C], tl.float32)
        for c_first in range(0, z_stride, tiles.BLOCK_K):
            c = c_first + tl.arange(0, tiles.BLOCK_K)
            head_at = extra.head_ptr + c.to(tl.int64)[:, None] * head_stride + d[None, :]
            head = tl.load(head_at, mask=(c < classes)[:, None] & (d < width)[None, :], other=0.0)
            dz_at = out.dz_ptr + z_row + c[None, :]
            dz = tl.load(dz_at, mask=exists[:, None] & (c < z_stride)[None, :], other=0.0)
            dy = multiply_add(dz, head.to(OPERAND), dy)
        keep = exists[:, None] & (d < width)[None, :]
        at = out.dy_ptr + y_row + d[None, :]
        if extra.features_ptr is not None:
            y = tl.load(at, mask=keep, other=0.0)
            t = feature_tile(extra.features_ptr, features_start, d, width, counted, tl.float32)
            dy += tl.where(counted[:, None], student_part(y, t, of_y, of_t, by_y, by_t, extra.FEATURE_KIND), 0.0)
            tl.debug_barrier()
        tl.store(at, dy, mask=keep)


@triton.jit
def pool_gradients(p, extra, out, pool_share, tau, pid, row, exists, counted, scale, width, stride, how):
    """The backward pass of the pool, from the parked dy and the weights that were stored."""
    starts, active = modality_starts(p, row, counted)
    weights = ()
    for m in tl.static_range(p.M):
        weights = weights + (tl.load(out.weights_ptr + row * p.M + m, mask=active[m], other=0.0),)
    dots = ()
    for m in tl.static_range(p.M):
        x_ptr = p.x.ptrs[m]
        dots = dots + (streamed_dot(x_ptr, starts[m], active[m], out.dy_ptr, row * width, exists, width, how),)
    ds = score_gradients(weights, active, dots, tau, p.M)
    if extra.pool_target_ptr is not None:
        target = pool_targets(extra.pool_target_ptr, row, active, p.M, tl.float32)
        target_sum = tl.zeros([how.ROWS], tl.float32)
        for m in tl.static_range(p.M):
            target_sum += target[m]
        both = ()
        for m in tl.static_range(p.M):
            more = divide(pool_share * (weights[m] * target_sum - target[m]), tau)
            both = both + (ds[m] + tl.where(active[m], more, 0.0),)
        ds = both
    of = out.pool
    if of.bias_partial_ptr is not None:
        column = tl.arange(0, p.M_TILE)
        total = tl.sum(packed(ds, p.M, p.M_TILE), 0)
        tl.store(of.bias_partial_ptr + pid * p.M + column, total, mask=column < p.M)
    up, up_start = out.dy_ptr, row * width
    streamed_gradients(
        p, of, starts, active, weights, ds, up, up_start, pid, False, row, exists, scale, width, stride, how
    )


@triton.jit(do_not_specialize=["n_rows", "ignore_index"])
def mfd_single_pass(
    pool,
    rows,
    loss,
    extra,
    out,
    pool_how,
    how,
    tiles,
    pool_temperature: tl.float64,
    pool_scale: tl.float64,
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
    n_rows: tl.int64,
    ignore_index: tl.int64,
    width,
    classes,
    z_stride,
    head_stride,
    teacher_inner,
    teacher_outer,
    teacher_stride,
    features_inner,
    features_outer,
    features_stride,
    dx_stride,
):
    """terms[k][program] = sums over its rows of loss, soft, hard, feature, weighted, over the divisor; gradients."""
    ROWS: tl.constexpr = tiles.ROWS
    pid = tl.program_id(0).to(tl.int64)
    row = pid * ROWS + tl.arange(0, ROWS)
    exists = row < n_rows
    classes = classes * rows.teacher.UNIT
    _label, counted, _labelled, _bad = row_labels(
        rows.labels_ptr, rows.mask_ptr, row, n_rows, classes, ignore_index, False, ROWS
    )
    by = tl.full([1], 1.0, tl.float64)
    if extra.COUNT:
        by = by * counted_rows(rows.labels_ptr, rows.mask_ptr, n_rows, ignore_index, 512)
    elif loss.normalizer_ptr is not None:
        by = by * tl.load(loss.normalizer_ptr)
    else:
        by = by * normalizer
    per_row = reciprocal(by)

    pool_scale = tl.full([1], pool_scale, tl.float32)
    tau = row_scalar(pool_temperature, pool.temperature_ptr, row, exists, pool.STEP, ROWS, tl.float32)
    features_start = row_start(row, features_inner, features_outer, features_stride, extra.F_FLAT, 1)
    pool_kl, sum_a, sum_b, sum_c, by_y, by_t = pool_phase(
        pool, extra, out, row, exists, counted, tau, pool_scale, features_start, width, pool_how
    )
    w = tl.full([ROWS], 1.0, tl.float32)
    if loss.weight_ptr is not None:
        w = tl.load(loss.weight_ptr + row, mask=counted, other=0.0)
    weights = (feature_weight, pool_weight)
    sums = (pool_kl, sum_a, sum_b, sum_c, by_y, by_t)
    more, feature, of_y, of_t, pool_share = other_losses(
        extra, weights, *sums, w.to(tl.float64) * per_row, row, exists, counted, width
    )
    tl.store(out.terms_ptrs[3] + pid, tl.sum(feature, 0))
    more = tl.sum(more, 0)
    tl.debug_barrier()
    park_logits(extra, out, row, exists, counted, width, classes, z_stride, head_stride, tiles)
    tl.debug_barrier()
    shape = (n_rows, ignore_index, classes, z_stride, teacher_inner, teacher_outer, teacher_stride)
    numbers = MFDNumbers(temperature, teacher_temperature, soft_weight, hard_weight, smoothing, a, b, *shape)
    loss_total, soft_total, hard_total = loss_of_logits(rows, loss, out, pid, per_row, numbers, tiles, how)
    tl.store(out.terms_ptrs[0] + pid, loss_total + more)
    tl.store(out.terms_ptrs[1] + pid, soft_total)
    tl.store(out.terms_ptrs[2] + pid, hard_total)
    if out.dy_ptr is not None:
        tl.debug_barrier()
        factors = (of_y, of_t, by_y, by_t)
        park_dy(extra, out, row, exists, counted, features_start, factors, width, classes, z_stride, head_stride, tiles)
        tl.debug_barrier()
        pool_gradients(
            pool, extra, out, pool_share, tau, pid, row, exists, counted, pool_scale, width, dx_stride, pool_how
        )
