"""Feature matching of any number of taps in one launch: distances per row, their weighted sum, gradients.

The taps come as tuples, one entry per tap; a program works on ROWS rows of one tap, dealt out in turn. A tap's
rows are held in one tile [ROWS, BLOCK] or, longer than that, read tile by tile: once, but for the gradient of the
cosine, which needs the whole row first. Rows that a mask excludes are not read and give 0.
"""

import triton
import triton.language as tl

from .feature_rows import distance_terms, distance_value, gradient_factors, student_part
from .modal_pool import feature_tile
from .reduce import counted_rows


@triton.jit
def tap_start(row, inner, outer, stride):
    """First element of each row, int64; outer None: a single level of rows."""
    if outer is None:
        return row * stride
    else:
        return (row // inner) * outer + (row % inner) * stride


@triton.jit
def write_gradients(s, t, factors, d_student_ptr, d_teacher_ptr, row, exists, on, col, width, KIND: tl.constexpr):
    """The wanted gradients of one tile, 0 on rows that do not exist."""
    of_s, of_t, of_tt = factors
    at = (row * width)[:, None] + col[None, :]
    keep = exists[:, None] & (col < width)[None, :]
    if d_student_ptr is not None:
        grad = tl.where(on[:, None], student_part(s, t, of_s, of_t, KIND), 0.0)
        tl.store(d_student_ptr + at, grad.to(d_student_ptr.dtype.element_ty), mask=keep)
    if d_teacher_ptr is not None:
        if KIND == 2:
            grad = student_part(t, s, of_tt, of_t, KIND)
        else:
            grad = -student_part(s, t, of_s, of_t, KIND)
        grad = tl.where(on[:, None], grad, 0.0)
        tl.store(d_teacher_ptr + at, grad.to(d_teacher_ptr.dtype.element_ty), mask=keep)


@triton.jit
def tap_rows(
    student_ptr,
    student_start,
    teacher_ptr,
    teacher_start,
    d_student_ptr,
    d_teacher_ptr,
    share,
    row,
    exists,
    on,
    width,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    LOOP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[ROWS] distances; writes the gradients of sum share*distance where there is a place for them."""
    col = tl.arange(0, BLOCK)
    WRITES: tl.constexpr = (d_student_ptr is not None) or (d_teacher_ptr is not None)
    if LOOP:
        a = tl.zeros([ROWS, BLOCK], DTYPE)
        b, c = a, a
        # Without the cosine the factors depend on no sum over the row.
        none = tl.zeros([ROWS], DTYPE)
        early = gradient_factors(none, none, none, share, width, KIND)
        for first in range(0, width, BLOCK):
            here = col + first
            s = feature_tile(student_ptr, student_start, here, width, on, DTYPE)
            t = feature_tile(teacher_ptr, teacher_start, here, width, on, DTYPE)
            tile_a, tile_b, tile_c = distance_terms(s, t, KIND)
            a += tile_a
            if KIND == 2:
                b += tile_b
                c += tile_c
            elif WRITES:
                write_gradients(s, t, early, d_student_ptr, d_teacher_ptr, row, exists, on, here, width, KIND)
        a, b, c = tl.sum(a, 1), tl.sum(b, 1), tl.sum(c, 1)
        if WRITES and (KIND == 2):
            factors = gradient_factors(a, b, c, share, width, KIND)
            for first in range(0, width, BLOCK):
                here = col + first
                s = feature_tile(student_ptr, student_start, here, width, on, DTYPE)
                t = feature_tile(teacher_ptr, teacher_start, here, width, on, DTYPE)
                write_gradients(s, t, factors, d_student_ptr, d_teacher_ptr, row, exists, on, here, width, KIND)
    else:
        s = feature_tile(student_ptr, student_start, col, width, on, DTYPE)
        t = feature_tile(teacher_ptr, teacher_start, col, width, on, DTYPE)
        a, b, c = distance_terms(s, t, KIND)
        a, b, c = tl.sum(a, 1), tl.sum(b, 1), tl.sum(c, 1)
        if WRITES:
            factors = gradient_factors(a, b, c, share, width, KIND)
            write_gradients(s, t, factors, d_student_ptr, d_teacher_ptr, row, exists, on, col, width, KIND)
    return tl.where(on, distance_value(a, b, c, width, KIND), 0.0)


@triton.jit
def match_taps(
    student_ptrs,
    student_inners,
    student_outers,
    student_strides,
    teacher_ptrs,
    teacher_inners,
    teacher_outers,
    teacher_strides,
    mask_ptrs,
    count_ptrs,
    weight_ptrs,
    weights,
    weights_low,
    up_ptrs,
    distance_ptrs,
    d_student_ptrs,
    d_teacher_ptrs,
    partial_ptr,
    coded_rows,
    widths,
    TAPS: tl.constexpr,
    TILES: tl.constexpr,
    KIND: tl.constexpr,
    MEAN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Distances and gradients of every tap's rows; partial[program] = its share of the weighted loss.

    coded_rows[k] = 2*rows + 3, TILES[k] = (LOOP, ROWS, BLOCK). The upstream gradient of a row is up[k][row] or, for
    the scalar loss, what the row counts for in it. A number weight arrives in two parts, as numbers in tuples are
    float32.
    """
    pid = tl.program_id(0).to(tl.int64)
    block = pid
    for k in tl.static_range(TAPS):
        rows = (coded_rows[k].to(tl.int64) - 3) // 2
        width = widths[k]
        if (block >= 0) & (block * TILES[k][1] < rows):
            row = block * TILES[k][1] + tl.arange(0, TILES[k][1])
            exists = row < rows
            on = exists
            if mask_ptrs[k] is not None:
                on = on & (tl.load(mask_ptrs[k] + row, mask=exists, other=0) != 0)
            each = tl.full([TILES[k][1]], 1.0, tl.float64)
            if partial_ptr is not None:
                if weight_ptrs[k] is None:
                    low = tl.full([TILES[k][1]], weights_low[k], tl.float64)
                    each = each * (tl.full([TILES[k][1]], weights[k], tl.float64) + low)
                else:
                    each = each * tl.load(weight_ptrs[k]).to(tl.float64)
                if MEAN:
                    if mask_ptrs[k] is None:
                        each = each / rows
                    elif count_ptrs[k] is None:
                        each = each / counted_rows(None, mask_ptrs[k], rows, 0, 1024)
                    else:
                        each = each / tl.maximum(tl.load(count_ptrs[k]), 1)
                elif KIND != 2:
                    each = each * width
            share = each.to(DTYPE)
            if up_ptrs[k] is not None:
                share = tl.load(up_ptrs[k] + row, mask=on, other=0.0).to(DTYPE)
            distance = tap_rows(
                student_ptrs[k],
                tap_start(row, student_inners[k], student_outers[k], student_strides[k]),
                teacher_ptrs[k],
                tap_start(row, teacher_inners[k], teacher_outers[k], teacher_strides[k]),
                d_student_ptrs[k],
                d_teacher_ptrs[k],
                share,
                row,
                exists,
                on,
                width,
                KIND,
                DTYPE,
                TILES[k][0],
                TILES[k][1],
                TILES[k][2],
            )
            if distance_ptrs[k] is not None:
                tl.store(distance_ptrs[k] + row, distance, mask=exists)
            if partial_ptr is not None:
                tl.store(partial_ptr + pid, tl.sum(tl.where(on, each * distance, 0.0), 0))
        block -= tl.cdiv(rows, TILES[k][1])
