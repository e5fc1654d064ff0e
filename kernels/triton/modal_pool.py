"""Pooling of M modalities: weights and pooled features, and their gradients. Formulas in `mfd_fast.ops.modal_pool`.

The features come as a tuple of pointers, so that no table has to be copied to the device, each modality keeps its
dtype, and the unrolled loops over them hold every x_m in registers. An absent modality is not read. A program owns
ROWS rows; without LOOP it holds their M features, BLOCK_D wide, from the scores to the sum; with LOOP it reads them
a second time, tile by tile. Numbers arrive as float64 and are rounded to DTYPE, the dtype of the arithmetic.
"""

import triton
import triton.language as tl

from .rows import INF, divide, power, row_scalar
from .sides import per_temperature


@triton.jit
def feature_start(row, inners, outers, strides, m: tl.constexpr, FLAT: tl.constexpr):
    """First element of each row of modality m, int64."""
    if FLAT:
        return row * strides[m]
    else:
        return (row // inners[m]) * outers[m] + (row % inners[m]) * strides[m]


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
def presence(present_ptr, row, exists, m: tl.constexpr, M: tl.constexpr):
    """Whether modality m takes part in each row."""
    on = exists
    if present_ptr is not None:
        on = on & (tl.load(present_ptr + row * M + m, mask=exists, other=0) != 0)
    return on


@triton.jit
def score(s, scores_ptr, bias_ptr, row, on, m: tl.constexpr, M: tl.constexpr, DTYPE: tl.constexpr):
    """s (scale*<query, x_m>, or 0) or the given score, plus the bias of modality m."""
    if scores_ptr is not None:
        s = tl.load(scores_ptr + row * M + m, mask=on, other=0.0).to(DTYPE)
    if bias_ptr is not None:
        s = s + tl.load(bias_ptr + m).to(DTYPE)
    return s


@triton.jit
def streamed_dot(
    a_ptr, a_start, a_on, b_ptr, b_start, b_on, width, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr
):
    """[ROWS] inner products of rows that are read tile by tile; b_on None: b is one vector for all rows."""
    col = tl.arange(0, BLOCK_D)
    dots = tl.zeros([ROWS, BLOCK_D], DTYPE)
    for first in range(0, width, BLOCK_D):
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


@triton.jit(do_not_specialize=["n_rows"])
def pool_forward(
    x_ptrs,
    x_inners,
    x_outers,
    x_strides,
    query_ptr,
    scores_ptr,
    bias_ptr,
    present_ptr,
    temperature_ptr,
    pooled_ptr,
    weights_ptr,
    temperature: tl.float64,
    scale: tl.float64,
    n_rows: tl.int64,
    width,
    M: tl.constexpr,
    M_TILE: tl.constexpr,
    FLAT: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    EXACT: tl.constexpr,
    LOOP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """weights[n, m] and pooled[n] = sum_m weights[n, m]*x_m[n]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < n_rows
    col = tl.arange(0, BLOCK_D)
    scale = tl.full([1], scale, DTYPE)
    tau = row_scalar(temperature, temperature_ptr, row, exists, STEP, ROWS, DTYPE)
    starts, active, xs, scores = (), (), (), ()
    for m in tl.static_range(M):
        start = feature_start(row, x_inners, x_outers, x_strides, m, FLAT)
        on = presence(present_ptr, row, exists, m, M)
        s = tl.zeros([ROWS], DTYPE)
        if LOOP:
            if query_ptr is not None:
                s = scale * streamed_dot(x_ptrs[m], start, on, query_ptr, None, None, width, ROWS, BLOCK_D, DTYPE)
        else:
            x = feature_tile(x_ptrs[m], start, col, width, on, DTYPE)
            xs = xs + (x,)
            if query_ptr is not None:
                s = tl.sum(x * vector_tile(query_ptr, col, width, DTYPE), 1) * scale
        starts = starts + (start,)
        active = active + (on,)
        scores = scores + (score(s, scores_ptr, bias_ptr, row, on, m, M, DTYPE),)
    weights, _logs = attention(scores, active, tau, EXACT, M)
    store_packed(weights_ptr, packed(weights, M, M_TILE), row, exists, M, M_TILE)

    pooled_row = pooled_ptr + (row * width)[:, None]
    if LOOP:
        for first in range(0, width, BLOCK_D):
            here = col + first
            pooled = weights[0][:, None] * feature_tile(x_ptrs[0], starts[0], here, width, active[0], DTYPE)
            for m in tl.static_range(1, M):
                x = feature_tile(x_ptrs[m], starts[m], here, width, active[m], DTYPE)
                pooled += weights[m][:, None] * x
            keep = exists[:, None] & (here < width)[None, :]
            tl.store(pooled_row + here[None, :], pooled.to(pooled_ptr.dtype.element_ty), mask=keep)
    else:
        pooled = weights[0][:, None] * xs[0]
        for m in tl.static_range(1, M):
            pooled += weights[m][:, None] * xs[m]
        keep = exists[:, None] & (col < width)[None, :]
        tl.store(pooled_row + col[None, :], pooled.to(pooled_ptr.dtype.element_ty), mask=keep)


@triton.jit
def write_feature_gradient(
    ptr, row_stride, row, exists, on, col, width, d_pooled, weight, ds, scale, query_ptr, DTYPE: tl.constexpr
):
    """dx_m = a_m*dpooled + ds_m*scale*query, 0 where absent."""
    grad = weight[:, None] * d_pooled
    if query_ptr is not None:
        grad += (ds * scale)[:, None] * vector_tile(query_ptr, col, width, DTYPE)
    grad = tl.where(on[:, None], grad, 0.0)
    keep = exists[:, None] & (col < width)[None, :]
    tl.store(ptr + (row * row_stride)[:, None] + col[None, :], grad.to(ptr.dtype.element_ty), mask=keep)


@triton.jit
def streamed_gradients(
    x_ptrs,
    starts,
    on,
    weights,
    ds,
    d_pooled_ptr,
    d_pooled_start,
    query_ptr,
    dx_ptrs,
    dx_stride,
    query_partial_ptr,
    pid,
    add,
    row,
    exists,
    scale,
    width,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """dx_m tile by tile; sum over rows and m of ds_m*scale*x_m goes to query_partial[pid], added if `add`."""
    col = tl.arange(0, BLOCK_D)
    for first in range(0, width, BLOCK_D):
        here = col + first
        d_pooled = tl.zeros([ROWS, BLOCK_D], DTYPE)
        if d_pooled_ptr is not None:
            d_pooled = feature_tile(d_pooled_ptr, d_pooled_start, here, width, exists, DTYPE)
        d_query = tl.zeros([ROWS, BLOCK_D], DTYPE)
        for m in tl.static_range(M):
            if dx_ptrs[m] is not None:
                write_feature_gradient(
                    dx_ptrs[m],
                    dx_stride,
                    row,
                    exists,
                    on[m],
                    here,
                    width,
                    d_pooled,
                    weights[m],
                    ds[m],
                    scale,
                    query_ptr,
                    DTYPE,
                )
            if query_partial_ptr is not None:
                x = feature_tile(x_ptrs[m], starts[m], here, width, on[m], DTYPE)
                d_query += (ds[m] * scale)[:, None] * x
        if query_partial_ptr is not None:
            at = query_partial_ptr + pid * width + here
            before = tl.load(at, mask=(here < width) & add, other=0.0)
            tl.store(at, before + tl.sum(d_query, 0), mask=here < width)


@triton.jit(do_not_specialize=["n_rows"])
def pool_backward(
    x_ptrs,
    x_inners,
    x_outers,
    x_strides,
    query_ptr,
    scores_ptr,
    bias_ptr,
    present_ptr,
    temperature_ptr,
    weights_ptr,
    d_pooled_ptr,
    d_pooled_inners,
    d_pooled_outers,
    d_pooled_strides,
    d_weights_ptr,
    dx_ptrs,
    d_scores_ptr,
    d_temperature_ptr,
    query_partial_ptr,
    bias_partial_ptr,
    temperature_partial_ptr,
    temperature: tl.float64,
    scale: tl.float64,
    n_rows: tl.int64,
    width,
    dx_stride,
    M: tl.constexpr,
    M_TILE: tl.constexpr,
    FLAT: tl.constexpr,
    D_FLAT: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    EXACT: tl.constexpr,
    LOOP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx_m, d_scores, d_temperature per row; partial sums over this program's rows for what all rows share.

    A program walks over every num_programs-th block of rows, so that there are few partial sums to add up.
    """
    pid = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    scale = tl.full([1], scale, DTYPE)
    d_query = tl.zeros([ROWS, BLOCK_D], DTYPE)
    d_bias = tl.zeros([ROWS, M_TILE], DTYPE)
    d_tau = tl.zeros([ROWS], tl.float64)
    step = tl.num_programs(0).to(tl.int64) * ROWS
    for first_row in range(pid * ROWS, n_rows, step):
        row = first_row + tl.arange(0, ROWS)
        exists = row < n_rows
        tau = row_scalar(temperature, temperature_ptr, row, exists, STEP, ROWS, DTYPE)
        d_pooled = tl.zeros([ROWS, BLOCK_D], DTYPE)
        up_start = row
        if d_pooled_ptr is not None:
            up_start = feature_start(row, d_pooled_inners, d_pooled_outers, d_pooled_strides, 0, D_FLAT)
            if not LOOP:
                d_pooled = feature_tile(d_pooled_ptr, up_start, col, width, exists, DTYPE)
        starts, active, xs, weights, g = (), (), (), (), ()
        for m in tl.static_range(M):
            start = feature_start(row, x_inners, x_outers, x_strides, m, FLAT)
            on = presence(present_ptr, row, exists, m, M)
            weight = tl.load(weights_ptr + row * M + m, mask=on, other=0.0)
            dot = tl.zeros([ROWS], DTYPE)
            if LOOP:
                if d_pooled_ptr is not None:
                    dot = streamed_dot(
                        x_ptrs[m], start, on, d_pooled_ptr, up_start, exists, width, ROWS, BLOCK_D, DTYPE
                    )
            else:
                x = feature_tile(x_ptrs[m], start, col, width, on, DTYPE)
                xs = xs + (x,)
                dot = tl.sum(d_pooled * x, 1)
            if d_weights_ptr is not None:
                dot += tl.load(d_weights_ptr + row * M + m, mask=on, other=0.0).to(DTYPE)
            starts = starts + (start,)
            active = active + (on,)
            weights = weights + (weight,)
            g = g + (dot,)
        ds = score_gradients(weights, active, g, tau, M)
        if (d_scores_ptr is not None) or (bias_partial_ptr is not None):
            tile = packed(ds, M, M_TILE)
            if d_scores_ptr is not None:
                store_packed(d_scores_ptr, tile, row, exists, M, M_TILE)
            d_bias += tile
        if (d_temperature_ptr is not None) or (temperature_partial_ptr is not None):
            moment = temperature_gradient(weights, active, g, tau, M)
            if d_temperature_ptr is not None:
                tl.store(d_temperature_ptr + row, moment.to(d_temperature_ptr.dtype.element_ty), mask=exists)
            d_tau += moment
        if LOOP:
            streamed_gradients(
                x_ptrs,
                starts,
                active,
                weights,
                ds,
                d_pooled_ptr,
                up_start,
                query_ptr,
                dx_ptrs,
                dx_stride,
                query_partial_ptr,
                pid,
                first_row > pid * ROWS,
                row,
                exists,
                scale,
                width,
                M,
                ROWS,
                BLOCK_D,
                DTYPE,
            )
        else:
            for m in tl.static_range(M):
                if dx_ptrs[m] is not None:
                    write_feature_gradient(
                        dx_ptrs[m],
                        dx_stride,
                        row,
                        exists,
                        active[m],
                        col,
                        width,
                        d_pooled,
                        weights[m],
                        ds[m],
                        scale,
                        query_ptr,
                        DTYPE,
                    )
                if query_partial_ptr is not None:
                    d_query += (ds[m] * scale)[:, None] * xs[m]
    if (query_partial_ptr is not None) and (not LOOP):
        tl.store(query_partial_ptr + pid * width + col, tl.sum(d_query, 0), mask=col < width)
    if bias_partial_ptr is not None:
        column = tl.arange(0, M_TILE)
        tl.store(bias_partial_ptr + pid * M + column, tl.sum(d_bias, 0), mask=column < M)
    if temperature_partial_ptr is not None:
        tl.store(temperature_partial_ptr + pid, tl.sum(d_tau, 0))
