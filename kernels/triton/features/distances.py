"""Distances between rows of features and their gradients, tile by tile. Formulas in `mfd_fast.reference.feature_loss`.

FEATURE_KIND: 0 mse, 1 smooth_l1, 2 cosine. Notation per row: s, t student and teacher features.
"""

import triton
import triton.language as tl

from ..rows.arithmetic import divide, root

#: Least norm in the cosine's denominator.
LEAST_NORM: tl.constexpr = tl.constexpr(1e-8)


@triton.jit
def distance_terms(s, t, FEATURE_KIND: tl.constexpr):
    """Three tiles whose row sums make the distance: the elementwise loss, or st, ss and tt."""
    if FEATURE_KIND == 2:
        return s * t, s * s, t * t
    else:
        e = s - t
        if FEATURE_KIND == 1:
            size = tl.abs(e)
            loss = tl.where(size < 1.0, 0.5 * e * e, size - 0.5)
        else:
            loss = e * e
        return loss, loss, loss


@triton.jit
def norm_scale(squares, on):
    """[ROWS] power of two to scale a row with before its norm is taken, from the sum of its squares as it is: 1 where
    they are within the range of their dtype and the norm is not below `LEAST_NORM`.
    """
    DOUBLE: tl.constexpr = squares.dtype == tl.float64
    up = tl.full(squares.shape, 2.0**520 if DOUBLE else 2.0**75, squares.dtype)
    down = tl.full(squares.shape, 2.0**-600 if DOUBLE else 2.0**-80, squares.dtype)
    most = tl.full(squares.shape, 2.0**900 if DOUBLE else 2.0**100, squares.dtype)
    one = tl.full(squares.shape, 1.0, squares.dtype)
    low = squares < LEAST_NORM * LEAST_NORM
    return tl.where(on, tl.where(low, up, tl.where(squares <= most, one, down)), one)


@triton.jit
def is_scaled(by_s, by_t):
    """Whether a row of the tile has another scale than 1."""
    return tl.max(tl.where((by_s != 1.0) | (by_t != 1.0), 1, 0), 0) > 0


@triton.jit
def denominators(b, c, by_s, by_t):
    """Both norms, at least `LEAST_NORM` before they were scaled, and where they are that; 1 beside a zero vector."""
    nothing = (b == 0.0) | (c == 0.0)
    s, t = root(tl.where(nothing, 1.0, b)), root(tl.where(nothing, 1.0, c))
    least_s, least_t = by_s * LEAST_NORM, by_t * LEAST_NORM
    low_s, low_t = (s < least_s) & (by_s != 1.0), (t < least_t) & (by_t != 1.0)
    return tl.where(low_s, least_s, s), tl.where(low_t, least_t, t), low_s | nothing, low_t | nothing, nothing


@triton.jit
def distance_value(a, b, c, by_s, by_t, width, FEATURE_KIND: tl.constexpr):
    """[ROWS] distance from the row sums of `distance_terms`: mean over the width, or 1 - cos of scaled rows."""
    if FEATURE_KIND == 2:
        s, t, _low_s, _low_t, nothing = denominators(b, c, by_s, by_t)
        return 1.0 - tl.where(nothing, 0.0, divide(a, s * t))
    else:
        return divide(a, tl.full(a.shape, width, a.dtype))


@triton.jit
def gradient_factors(a, b, c, by_s, by_t, share, width, FEATURE_KIND: tl.constexpr):
    """[ROWS] factors of `student_part` and `teacher_part`, which hold the upstream gradient `share`.

    Student gradient: of_s*s + of_t*t for the cosine, of_s*(ds of the elementwise loss) else. Teacher gradient:
    of_tt*t + of_t*s for the cosine, the negative of the student's else.
    """
    if FEATURE_KIND == 2:
        s, t, low_s, low_t, nothing = denominators(b, c, by_s, by_t)
        inverse = divide(share, s * t)
        of_t = tl.where(nothing, 0.0, -inverse)
        of_s = tl.where(low_s, 0.0, divide(a * inverse, tl.where(low_s, 1.0, b)))
        of_tt = tl.where(low_t, 0.0, divide(a * inverse, tl.where(low_t, 1.0, c)))
        return of_s, of_t, of_tt
    else:
        each = divide(share, tl.full(a.shape, width, a.dtype))
        return each, each, each


@triton.jit
def student_part(s, t, of_s, of_t, by_s, by_t, FEATURE_KIND: tl.constexpr):
    """Gradient of the student's tile [ROWS, BLOCK]."""
    if FEATURE_KIND == 2:
        return by_s[:, None] * (of_s[:, None] * (by_s[:, None] * s) + of_t[:, None] * (by_t[:, None] * t))
    else:
        e = s - t
        if FEATURE_KIND == 1:
            size = tl.abs(e)
            slope = tl.where(size < 1.0, e, tl.where(e > 0.0, 1.0, tl.where(e < 0.0, -1.0, e)))
        else:
            slope = 2.0 * e
        return of_s[:, None] * slope
