"""Feature matching of any number of taps in one launch: distances per row, their weighted sum, gradients.

The taps come as tuples, one entry per tap; a program works on ROWS rows of one tap, dealt out in turn. A tap's
rows are held in one tile [ROWS, BLOCK] or, longer than that, read tile by tile: once, but for the gradient of the
cosine, which needs the whole row first. Rows that a mask excludes are not read and give 0.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..pool.modal_pool import feature_tile
from ..rows.reduce import counted_rows
from .distances import distance_terms, distance_value, gradient_factors, is_scaled, norm_scale, student_part


class Taps(NamedTuple):
    """A tuple per field, with an entry per tap. Inner and outer None: a single level of rows. A number weight comes in
    two parts, as numbers in tuples are float32; the upstream gradient of a row is up[row] or, for the scalar loss, what
    the row counts for in it. None: not given, not wanted.
    """

    student_ptrs: tl.tuple
    student_inners: tl.tuple
    student_outers: tl.tuple
    student_strides: tl.tuple
    teacher_ptrs: tl.tuple
    teacher_inners: tl.tuple
    teacher_outers: tl.tuple
    teacher_strides: tl.tuple
    mask_ptrs: tl.tuple
    count_ptrs: tl.tuple
    weight_ptrs: tl.tuple
    weights: tl.tuple
    weights_low: tl.tuple
    up_ptrs: tl.tuple
    distance_ptrs: tl.tuple
    d_student_ptrs: tl.tuple
    d_teacher_ptrs: tl.tuple


class Tap(NamedTuple):
    """Addresses of one tap in a kernel: both sides, where their rows start, [ROWS], and where the gradients go."""

    student_ptr: tl.tensor
    student_start: tl.tensor
    teacher_ptr: tl.tensor
    teacher_start: tl.tensor
    d_student_ptr: tl.tensor
    d_teacher_ptr: tl.tensor


@triton.jit
def tap_start(row, inner, outer, stride):
    """First element of each row, int64; outer None: a single level of rows."""
    if outer is None:
        return row * stride
    else:
        return (row // inner) * outer + (row % inner) * stride


@triton.jit
def read_tap(tap, col, width, on, DTYPE: tl.constexpr):
    """A tile of both sides."""
    s = feature_tile(tap.student_ptr, tap.student_start, col, width, on, DTYPE)
    return s, feature_tile(tap.teacher_ptr, tap.teacher_start, col, width, on, DTYPE)


@triton.jit
def write_gradients(tap, s, t, factors, by_s, by_t, row, exists, on, col, width, FEATURE_KIND: tl.constexpr):
    """The wanted gradients of one tile, 0 on rows that do not exist."""
    of_s, of_t, of_tt = factors
    at = (row * width)[:, None] + col[None, :]
    keep = exists[:, None] & (col < width)[None, :]
    if tap.d_student_ptr is not None:
        grad = tl.where(on[:, None], student_part(s, t, of_s, of_t, by_s, by_t, FEATURE_KIND), 0.0)
        tl.store(tap.d_student_ptr + at, grad.to(tap.d_student_ptr.dtype.element_ty), mask=keep)
    if tap.d_teacher_ptr is not None:
        if FEATURE_KIND == 2:
            grad = student_part(t, s, of_tt, of_t, by_t, by_s, FEATURE_KIND)
        else:
            grad = -student_part(s, t, of_s, of_t, by_s, by_t, FEATURE_KIND)
        grad = tl.where(on[:, None], grad, 0.0)
        tl.store(tap.d_teacher_ptr + at, grad.to(tap.d_teacher_ptr.dtype.element_ty), mask=keep)


@triton.jit
def scaled_sums(tap, by_s, by_t, on, width, DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The cosine's row sums of scaled rows."""
    a = tl.zeros([ROWS, BLOCK], DTYPE)
    b, c = a, a
    for first in range(0, width, BLOCK):
        s, t = read_tap(tap, tl.arange(0, BLOCK) + first, width, on, DTYPE)
        tile_a, tile_b, tile_c = distance_terms(by_s[:, None] * s, by_t[:, None] * t, 2)
        a, b, c = a + tile_a, b + tile_b, c + tile_c
    return tl.sum(a, 1), tl.sum(b, 1), tl.sum(c, 1)


@triton.jit
def streamed_rows(
    tap,
    share,
    row,
    exists,
    on,
    width,
    FEATURE_KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`tap_rows` of rows longer than a tile."""
    WRITES: tl.constexpr = (tap.d_student_ptr is not None) or (tap.d_teacher_ptr is not None)
    col = tl.arange(0, BLOCK)
    a = tl.zeros([ROWS, BLOCK], DTYPE)
    b, c = a, a
    # Without the cosine the factors depend on no sum over the row.
    none = tl.zeros([ROWS], DTYPE)
    one = none + 1.0
    early = gradient_factors(none, none, none, one, one, share, width, FEATURE_KIND)
    for first in range(0, width, BLOCK):
        here = col + first
        s, t = read_tap(tap, here, width, on, DTYPE)
        tile_a, tile_b, tile_c = distance_terms(s, t, FEATURE_KIND)
        a += tile_a
        if FEATURE_KIND == 2:
            b += tile_b
            c += tile_c
        elif WRITES:
            write_gradients(tap, s, t, early, one, one, row, exists, on, here, width, FEATURE_KIND)
    a, b, c = tl.sum(a, 1), tl.sum(b, 1), tl.sum(c, 1)
    by_s, by_t = one, one
    if FEATURE_KIND == 2:
        by_s, by_t = norm_scale(b, on), norm_scale(c, on)
        if is_scaled(by_s, by_t):
            a, b, c = scaled_sums(tap, by_s, by_t, on, width, DTYPE, ROWS, BLOCK)
    if WRITES and (FEATURE_KIND == 2):
        factors = gradient_factors(a, b, c, by_s, by_t, share, width, FEATURE_KIND)
        for first in range(0, width, BLOCK):
            here = col + first
            s, t = read_tap(tap, here, width, on, DTYPE)
            write_gradients(tap, s, t, factors, by_s, by_t, row, exists, on, here, width, FEATURE_KIND)
    return tl.where(on, distance_value(a, b, c, by_s, by_t, width, FEATURE_KIND), 0.0)


@triton.jit
def held_rows(tap, share, row, exists, on, width, FEATURE_KIND: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """`tap_rows` of rows that a tile holds."""
    WRITES: tl.constexpr = (tap.d_student_ptr is not None) or (tap.d_teacher_ptr is not None)
    col = tl.arange(0, BLOCK)
    s, t = read_tap(tap, col, width, on, DTYPE)
    a, b, c = distance_terms(s, t, FEATURE_KIND)
    a, b, c = tl.sum(a, 1), tl.sum(b, 1), tl.sum(c, 1)
    by_s = tl.full(a.shape, 1.0, DTYPE)
    by_t = by_s
    if FEATURE_KIND == 2:
        by_s, by_t = norm_scale(b, on), norm_scale(c, on)
        if is_scaled(by_s, by_t):
            a, b, c = distance_terms(by_s[:, None] * s, by_t[:, None] * t, FEATURE_KIND)
            a, b, c = tl.sum(a, 1), tl.sum(b, 1), tl.sum(c, 1)
    if WRITES:
        factors = gradient_factors(a, b, c, by_s, by_t, share, width, FEATURE_KIND)
        write_gradients(tap, s, t, factors, by_s, by_t, row, exists, on, col, width, FEATURE_KIND)
    return tl.where(on, distance_value(a, b, c, by_s, by_t, width, FEATURE_KIND), 0.0)


@triton.jit
def row_weights(taps, k: tl.constexpr, rows, width, FEATURE_KIND: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS] float64: what a row of tap k counts for in the scalar loss."""
    if taps.weight_ptrs[k] is None:
        low = tl.full([ROWS], taps.weights_low[k], tl.float64)
        each = tl.full([ROWS], 1.0, tl.float64) * (tl.full([ROWS], taps.weights[k], tl.float64) + low)
    else:
        each = tl.full([ROWS], 1.0, tl.float64) * tl.load(taps.weight_ptrs[k]).to(tl.float64)
    if MEAN:
        if taps.mask_ptrs[k] is None:
            each = each / rows
        elif taps.count_ptrs[k] is None:
            each = each / counted_rows(None, taps.mask_ptrs[k], rows, 0, 1024)
        else:
            each = each / tl.maximum(tl.load(taps.count_ptrs[k]), 1)
    elif FEATURE_KIND != 2:
        each = each * width
    return each


@triton.jit
def match_taps(
    taps,
    partial_ptr,
    coded_rows,
    widths,
    TILES: tl.constexpr,
    FEATURE_KIND: tl.constexpr,
    MEAN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Distances and gradients of every tap's rows; partial[program] = its share of the weighted loss.

    coded_rows[k] = 2*rows + 3, TILES[k] = (LOOP, ROWS, BLOCK).
    """
    pid = tl.program_id(0).to(tl.int64)
    block = pid
    for k in tl.static_range(len(widths)):
        rows = (coded_rows[k].to(tl.int64) - 3) // 2
        width = widths[k]
        if (block >= 0) & (block * TILES[k][1] < rows):
            row = block * TILES[k][1] + tl.arange(0, TILES[k][1])
            exists = row < rows
            on = exists
            if taps.mask_ptrs[k] is not None:
                on = on & (tl.load(taps.mask_ptrs[k] + row, mask=exists, other=0) != 0)
            each = tl.full([TILES[k][1]], 1.0, tl.float64)
            if partial_ptr is not None:
                each = row_weights(taps, k, rows, width, FEATURE_KIND, MEAN, TILES[k][1])
            share = each.to(DTYPE)
            if taps.up_ptrs[k] is not None:
                share = tl.load(taps.up_ptrs[k] + row, mask=on, other=0.0).to(DTYPE)
            s_start = tap_start(row, taps.student_inners[k], taps.student_outers[k], taps.student_strides[k])
            t_start = tap_start(row, taps.teacher_inners[k], taps.teacher_outers[k], taps.teacher_strides[k])
            gradients = (taps.d_student_ptrs[k], taps.d_teacher_ptrs[k])
            tap = Tap(taps.student_ptrs[k], s_start, taps.teacher_ptrs[k], t_start, *gradients)
            if TILES[k][0]:
                distance = streamed_rows(
                    tap, share, row, exists, on, width, FEATURE_KIND, DTYPE, TILES[k][1], TILES[k][2]
                )
            else:
                distance = held_rows(tap, share, row, exists, on, width, FEATURE_KIND, DTYPE, TILES[k][2])
            if taps.distance_ptrs[k] is not None:
                tl.store(taps.distance_ptrs[k] + row, distance, mask=exists)
            if partial_ptr is not None:
                tl.store(partial_ptr + pid, tl.sum(tl.where(on, each * distance, 0.0), 0))
        block -= tl.cdiv(rows, TILES[k][1])
