"""Pooling of M modalities: weights and pooled features, and their gradients. Formulas in `mfd_fast.ops.modal_pool`.

The features come as a tuple of pointers, so that no table has to be copied to the device, each modality keeps its
dtype, and the unrolled loops over them hold every x_m in registers. An absent modality is not read. A program owns
ROWS rows; without LOOP it holds their M features, BLOCK_D wide, from the scores to the sum; with LOOP it reads them
a second time, tile by tile. Numbers arrive as float64 and are rounded to DTYPE, the dtype of the arithmetic.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..rows.arithmetic import INF, divide, power, row_scalar
from ..rows.sides import per_temperature


class Features(NamedTuple):
    """Rows of features as tuples, one entry per modality; FLAT: the strides alone lead from row to row."""

    ptrs: tl.tuple
    inners: tl.tuple
    outers: tl.tuple
    strides: tl.tuple
    FLAT: tl.constexpr


class PoolProblem(NamedTuple):
    """The features of M modalities and what weighs them; None: not given. temperature_ptr: one (STEP 0) or one per row
    (STEP 1). M_TILE: M, rounded up to a power of two.
    """

    x: Features
    query_ptr: tl.tensor
    scores_ptr: tl.tensor
    bias_ptr: tl.tensor
    present_ptr: tl.tensor
    temperature_ptr: tl.tensor
    M: tl.constexpr
    M_TILE: tl.constexpr
    STEP: tl.constexpr


class PoolHow(NamedTuple):
    """The arithmetic, as in `structs.How`, and the tile [ROWS, BLOCK_D]; LOOP: a row of features is longer."""

    EXACT: tl.constexpr
    FLOAT64: tl.constexpr
    LOOP: tl.constexpr
    ROWS: tl.constexpr
    BLOCK_D: tl.constexpr


class PoolGradients(NamedTuple):
    """What comes from upstream and where the gradients go; None: not given, not wanted. The partial sums are per
    program, of what all rows share.
    """

    weights_ptr: tl.tensor
    d_pooled: Features
    d_weights_ptr: tl.tensor
    dx_ptrs: tl.tuple
    d_scores_ptr: tl.tensor
    d_temperature_ptr: tl.tensor
    query_partial_ptr: tl.tensor
    bias_partial_ptr: tl.tensor
    temperature_partial_ptr: tl.tensor


@triton.jit
def feature_start(of, row, m: tl.constexpr):
    """First element of each row of modality m, int64."""
    if of.FLAT:
        return row * of.strides[m]
    else:
        return (row // of.inners[m]) * of.outers[m] + (row % of.inners[m]) * of.strides[m]


@triton.jit
def feature_tile(ptr, start, col, width, on, DTYPE: tl.constexpr):
    """[ROWS, BLOCK_D] features, 0 where the modality is absent (nothing is read there)."""
    keep = on[:, None] & (col < width)[None, :]
    return tl.load(ptr + start[:, None] + col[None, :], mask=keep, other=0.0).to(DTYPE)


@triton.jit
def vector_tile(ptr, col, width, DTYPE: tl.constexpr):
    """[1, BLOCK_D] of a vector."""
    return tl.load(ptr + col, mask=col < width, other=0.0).to(DTYPE)[None, :]


@triton.jit
def presence(p, row, exists, m: tl.constexpr):
    """Whether modality m takes part in each row."""
    on = exists
    if p.present_ptr is not None:
        on = on & (tl.load(p.present_ptr + row * p.M + m, mask=exists, other=0) != 0)
    return on


@triton.jit
def score(p, s, row, on, m: tl.constexpr):
    """s (scale*<query, x_m>, or 0) or the given score, plus the bias of modality m."""
    if p.scores_ptr is not None:
        s = tl.load(p.scores_ptr + row * p.M + m, mask=on, other=0.0).to(s.dtype)
    if p.bias_ptr is not None:
        s = s + tl.load(p.bias_ptr + m).to(s.dtype)
    return s


@triton.jit
def streamed_dot(a_ptr, a_start, a_on, b_ptr, b_start, b_on, width, how):
    """[ROWS] inner products of rows that are read tile by tile; b_on None: b is one vector for all rows."""
    DTYPE: tl.constexpr = tl.float64 if how.FLOAT64 else tl.float32
    col = tl.arange(0, how.BLOCK_D)
    dots = tl.zeros([how.ROWS, how.BLOCK_D], DTYPE)
    for first in range(0, width, how.BLOCK_D):
        a = feature_tile(a_ptr, a_start, col + first, width, a_on, DTYPE)
        if b_on is None:
            dots += a * vector_tile(b_ptr, col + first, width, DTYPE)
        else:
            dots += a * feature_tile(b_ptr, b_start, col + first, width, b_on, DTYPE)
    return tl.sum(dots, 1)


@triton.jit
def attention(scores, on, temperature, EXACT: tl.constexpr, M: tl.constexpr):
    """Tuple of softmax_m(s_m/temperature) over the present modalities, 0 where none is.

    And of its logarithms, finite where it underflows and -inf where a modality is absent.
    """
    c = per_temperature(temperature, EXACT)
    top = tl.where(on[0], scores[0], -INF)
    some = on[0]
    for m in tl.static_range(1, M):
        top = tl.maximum(top, tl.where(on[m], scores[m], -INF))
        some = some | on[m]
    parts = ()
    total = tl.where(some, 0.0, 1.0).to(top.dtype)
    for m in tl.static_range(M):
        part = tl.where(on[m], power(scores[m] - top, c), 0.0)
        total = total + part
        parts = parts + (part,)
    weights, logs = (), ()
    log_total = tl.log(total)
    for m in tl.static_range(M):
        # Of a NaN row what is absent is still 0.
        weights = weights + (tl.where(on[m], divide(parts[m], total), 0.0),)
        logs = logs + (tl.where(on[m], divide(scores[m] - top, temperature) - log_total, -INF),)
    return weights, logs


@triton.jit
def packed(values, M: tl.constexpr, M_TILE: tl.constexpr):
    """A tuple of M [ROWS] as the columns of [ROWS, M_TILE]."""
    column = tl.arange(0, M_TILE)[None, :]
    tile = tl.where(column == 0, values[0][:, None], 0.0)
    for m in tl.static_range(1, M):
        tile = tl.where(column == m, values[m][:, None], tile)
    return tile


@triton.jit
def store_packed(ptr, tile, row, exists, M: tl.constexpr, M_TILE: tl.constexpr):
    """Writes [ROWS, M_TILE] to rows of M."""
    column = tl.arange(0, M_TILE)[None, :]
    at = ptr + row[:, None] * M + column
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=exists[:, None] & (column < M))


@triton.jit
def score_gradients(weights, on, g, temperature, M: tl.constexpr):
    """Tuple of ds_m = a_m (g_m - sum_j a_j g_j)/temperature."""
    mean = tl.where(on[0], weights[0] * g[0], 0.0)
    for m in tl.static_range(1, M):
        mean = mean + tl.where(on[m], weights[m] * g[m], 0.0)
    found = ()
    for m in tl.static_range(M):
        ds = divide(weights[m] * (g[m] - mean), temperature)
        found = found + (tl.where(on[m], ds, 0.0),)
    return found


@triton.jit
def temperature_gradient(weights, on, g, temperature, M: tl.constexpr):
    """-sum_m ds_m*s_m/temperature in float64; log a_m may stand for s_m/temperature, as sum_m ds_m = 0."""
    total, mean, level = 0.0, 0.0, 0.0
    for m in tl.static_range(M):
        a = weights[m].to(tl.float64)
        total += a
        mean += tl.where(on[m], a * g[m], 0.0)
        level += a * tl.log(tl.where(a == 0.0, 1.0, a))
    some = tl.where(total == 0.0, 1.0, total)
    mean, level = mean / some, level / some
    moment = total * 0.0
    for m in tl.static_range(M):
        a = weights[m].to(tl.float64)
        moment -= tl.where(on[m], a * (g[m] - mean) * (tl.log(tl.where(a == 0.0, 1.0, a)) - level), 0.0)
    return moment / temperature


@triton.jit
def streamed_sum(x, starts, on, weights, here, width, M: tl.constexpr, DTYPE: tl.constexpr):
    """sum_m weights_m*x_m of a tile that is read."""
    pooled = weights[0][:, None] * feature_tile(x.ptrs[0], starts[0], here, width, on[0], DTYPE)
    for m in tl.static_range(1, M):
        pooled += weights[m][:, None] * feature_tile(x.ptrs[m], starts[m], here, width, on[m], DTYPE)
    return pooled


@triton.jit(do_not_specialize=["n_rows"])
def pool_forward(p, how, pooled_ptr, weights_ptr, temperature: tl.float64, scale: tl.float64, n_rows: tl.int64, width):
    """weights[n, m] and pooled[n] = sum_m weights[n, m]*x_m[n]."""
    DTYPE: tl.constexpr = tl.float64 if how.FLOAT64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * how.ROWS + tl.arange(0, how.ROWS)
    exists = row < n_rows
    col = tl.arange(0, how.BLOCK_D)
    scale = tl.full([1], scale, DTYPE)
    tau = row_scalar(temperature, p.temperature_ptr, row, exists, p.STEP, how.ROWS, DTYPE)
    starts, active, xs, scores = (), (), (), ()
    for m in tl.static_range(p.M):
        start = feature_start(p.x, row, m)
        on = presence(p, row, exists, m)
        s = tl.zeros([how.ROWS], DTYPE)
        if how.LOOP:
            if p.query_ptr is not None:
                s = scale * streamed_dot(p.x.ptrs[m], start, on, p.query_ptr, None, None, width, how)
        else:
            x = feature_tile(p.x.ptrs[m], start, col, width, on, DTYPE)
            xs = xs + (x,)
            if p.query_ptr is not None:
                s = tl.sum(x * vector_tile(p.query_ptr, col, width, DTYPE), 1) * scale
        starts = starts + (start,)
        active = active + (on,)
        scores = scores + (score(p, s, row, on, m),)
    weights, _logs = attention(scores, active, tau, how.EXACT, p.M)
    store_packed(weights_ptr, packed(weights, p.M, p.M_TILE), row, exists, p.M, p.M_TILE)

    pooled_row = pooled_ptr + (row * width)[:, None]
    if how.LOOP:
        for first in range(0, width, how.BLOCK_D):
            here = col + first
            pooled = streamed_sum(p.x, starts, active, weights, here, width, p.M, DTYPE)
            keep = exists[:, None] & (here < width)[None, :]
            tl.store(pooled_row + here[None, :], pooled.to(pooled_ptr.dtype.element_ty), mask=keep)
    else:
        pooled = weights[0][:, None] * xs[0]
        for m in tl.static_range(1, p.M):
            pooled += weights[m][:, None] * xs[m]
        keep = exists[:, None] & (col < width)[None, :]
        tl.store(pooled_row + col[None, :], pooled.to(pooled_ptr.dtype.element_ty), mask=keep)


@triton.jit
def write_feature_gradient(ptr, row_stride, row, exists, on, col, width, d_pooled, weight, ds_scaled, query_ptr):
    """dx_m = a_m*dpooled + ds_m*scale*query, 0 where absent."""
    grad = weight[:, None] * d_pooled
    if query_ptr is not None:
        grad += ds_scaled[:, None] * vector_tile(query_ptr, col, width, d_pooled.dtype)
    grad = tl.where(on[:, None], grad, 0.0)
    keep = exists[:, None] & (col < width)[None, :]
    tl.store(ptr + (row * row_stride)[:, None] + col[None, :], grad.to(ptr.dtype.element_ty), mask=keep)


@triton.jit
def streamed_gradients(p, of, starts, on, weights, ds, up, up_start, pid, add, row, exists, scale, width, stride, how):
    """dx_m tile by tile; sum over rows and m of ds_m*scale*x_m goes to query_partial[pid], added if `add`.

    up: where dpooled is, or None; stride: of the rows of dx_m.
    """
    DTYPE: tl.constexpr = tl.float64 if how.FLOAT64 else tl.float32
    col = tl.arange(0, how.BLOCK_D)
    for first in range(0, width, how.BLOCK_D):
        here = col + first
        d_pooled = tl.zeros([how.ROWS, how.BLOCK_D], DTYPE)
        if up is not None:
            d_pooled = feature_tile(up, up_start, here, width, exists, DTYPE)
        d_query = tl.zeros([how.ROWS, how.BLOCK_D], DTYPE)
        for m in tl.static_range(p.M):
            to, share = of.dx_ptrs[m], ds[m] * scale
            if to is not None:
                write_feature_gradient(
                    to, stride, row, exists, on[m], here, width, d_pooled, weights[m], share, p.query_ptr
                )
            if of.query_partial_ptr is not None:
                x = feature_tile(p.x.ptrs[m], starts[m], here, width, on[m], DTYPE)
                d_query += share[:, None] * x
        if of.query_partial_ptr is not None:
            to = of.query_partial_ptr + pid * width + here
            before = tl.load(to, mask=(here < width) & add, other=0.0)
            tl.store(to, before + tl.sum(d_query, 0), mask=here < width)


@triton.jit
def held_gradients(p, of, on, xs, weights, ds, d_pooled, row, exists, col, scale, width, stride):
    """dx_m of features that are held; sum over m of ds_m*scale*x_m, [ROWS, BLOCK_D], 0 if it is not wanted."""
    d_query = tl.zeros_like(d_pooled)
    for m in tl.static_range(p.M):
        to, share = of.dx_ptrs[m], ds[m] * scale
        if to is not None:
            write_feature_gradient(to, stride, row, exists, on[m], col, width, d_pooled, weights[m], share, p.query_ptr)
        if of.query_partial_ptr is not None:
            d_query += share[:, None] * xs[m]
    return d_query


@triton.jit
def load_dots(p, of, row, exists, up, up_start, d_pooled, width, how):
    """Per modality: where its rows start, whether it takes part, its features (without LOOP), its weight, and
    g_m = <dpooled, x_m> + da_m.
    """
    DTYPE: tl.constexpr = tl.float64 if how.FLOAT64 else tl.float32
    col = tl.arange(0, how.BLOCK_D)
    starts, active, xs, weights, g = (), (), (), (), ()
    for m in tl.static_range(p.M):
        start = feature_start(p.x, row, m)
        on = presence(p, row, exists, m)
        weight = tl.load(of.weights_ptr + row * p.M + m, mask=on, other=0.0)
        dot = tl.zeros([how.ROWS], DTYPE)
        if how.LOOP:
            if up is not None:
                dot = streamed_dot(p.x.ptrs[m], start, on, up, up_start, exists, width, how)
        else:
            x = feature_tile(p.x.ptrs[m], start, col, width, on, DTYPE)
            xs = xs + (x,)
            dot = tl.sum(d_pooled * x, 1)
        if of.d_weights_ptr is not None:
            dot += tl.load(of.d_weights_ptr + row * p.M + m, mask=on, other=0.0).to(DTYPE)
        starts = starts + (start,)
        active = active + (on,)
        weights = weights + (weight,)
        g = g + (dot,)
    return starts, active, xs, weights, g


@triton.jit(do_not_specialize=["n_rows"])
def pool_backward(p, of, how, temperature: tl.float64, scale: tl.float64, n_rows: tl.int64, width, dx_stride):
    """dx_m, d_scores, d_temperature per row; partial sums over this program's rows for what all rows share.

    A program walks over every num_programs-th block of rows, so that there are few partial sums to add up.
    """
    DTYPE: tl.constexpr = tl.float64 if how.FLOAT64 else tl.float32
    M: tl.constexpr = p.M
    pid = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, how.BLOCK_D)
    scale = tl.full([1], scale, DTYPE)
    d_query = tl.zeros([how.ROWS, how.BLOCK_D], DTYPE)
    d_bias = tl.zeros([how.ROWS, p.M_TILE], DTYPE)
    d_tau = tl.zeros([how.ROWS], tl.float64)
    step = tl.num_programs(0).to(tl.int64) * how.ROWS
    up = of.d_pooled.ptrs[0]
    for first_row in range(pid * how.ROWS, n_rows, step):
        row = first_row + tl.arange(0, how.ROWS)
        exists = row < n_rows
        tau = row_scalar(temperature, p.temperature_ptr, row, exists, p.STEP, how.ROWS, DTYPE)
        d_pooled = tl.zeros([how.ROWS, how.BLOCK_D], DTYPE)
        up_start = row
        if up is not None:
            up_start = feature_start(of.d_pooled, row, 0)
            if not how.LOOP:
                d_pooled = feature_tile(up, up_start, col, width, exists, DTYPE)
        starts, active, xs, weights, g = load_dots(p, of, row, exists, up, up_start, d_pooled, width, how)
        ds = score_gradients(weights, active, g, tau, M)
        if (of.d_scores_ptr is not None) or (of.bias_partial_ptr is not None):
            tile = packed(ds, M, p.M_TILE)
            if of.d_scores_ptr is not None:
                store_packed(of.d_scores_ptr, tile, row, exists, M, p.M_TILE)
            d_bias += tile
        if (of.d_temperature_ptr is not None) or (of.temperature_partial_ptr is not None):
            moment = temperature_gradient(weights, active, g, tau, M)
            if of.d_temperature_ptr is not None:
                tl.store(of.d_temperature_ptr + row, moment.to(of.d_temperature_ptr.dtype.element_ty), mask=exists)
            d_tau += moment
        if how.LOOP:
            add = first_row > pid * how.ROWS
            streamed_gradients(
                p, of, starts, active, weights, ds, up, up_start, pid, add, row, exists, scale, width, dx_stride, how
            )
        else:
            d_query += held_gradients(
                p, of, active, xs, weights, ds, d_pooled, row, exists, col, scale, width, dx_stride
            )
    if (of.query_partial_ptr is not None) and (not how.LOOP):
        tl.store(of.query_partial_ptr + pid * width + col, tl.sum(d_query, 0), mask=col < width)
    if of.bias_partial_ptr is not None:
        column = tl.arange(0, p.M_TILE)
        tl.store(of.bias_partial_ptr + pid * M + column, tl.sum(d_bias, 0), mask=column < M)
    if of.temperature_partial_ptr is not None:
        tl.store(of.temperature_partial_ptr + pid, tl.sum(d_tau, 0))
