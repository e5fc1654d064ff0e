"""Distances between rows of features and their gradients, tile by tile. Formulas in `mfd_fast.reference.feature_loss`.

FEATURE_KIND: 0 mse, 1 smooth_l1, 2 cosine. Notation per row: s, t student and teacher features.
"""

import triton
import triton.language as tl

from ..rows.arithmetic import divide, root


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
def distance_value(a, b, c, width, FEATURE_KIND: tl.constexpr):
    """[ROWS] distance from the row sums of `distance_terms`: mean over the width, or 1 - cos."""
    if FEATURE_KIND == 2:
        nothing = (b == 0.0) | (c == 0.0)
        norms = root(tl.where(nothing, 1.0, b)) * root(tl.where(nothing, 1.0, c))
        return 1.0 - tl.where(nothing, 0.0, divide(a, norms))
    else:
        return divide(a, tl.full(a.shape, width, a.dtype))


@triton.jit
def gradient_factors(a, b, c, share, width, FEATURE_KIND: tl.constexpr):
    """[ROWS] factors of `student_part` and `teacher_part`, which hold the upstream gradient `share`.

    Student gradient: of_s*s + of_t*t for the cosine, of_s*(ds of the elementwise loss) else. Teacher gradient:
    of_tt*t + of_t*s for the cosine, the negative of the student's else.
    """
    if FEATURE_KIND == 2:
        nothing = (b == 0.0) | (c == 0.0)
        ss, tt = tl.where(nothing, 1.0, b), tl.where(nothing, 1.0, c)
        inverse = divide(share, root(ss) * root(tt))
        of_t = tl.where(nothing, 0.0, -inverse)
        of_s = tl.where(nothing, 0.0, divide(a * inverse, ss))
        of_tt = tl.where(nothing, 0.0, divide(a * inverse, tt))
        return of_s, of_t, of_tt
    else:
        each = divide(share, tl.full(a.shape, width, a.dtype))
        return each, each, each


@triton.jit
def student_part(s, t, of_s, of_t, FEATURE_KIND: tl.constexpr):
    """Gradient of the student's tile [ROWS, BLOCK]."""
    if FEATURE_KIND == 2:
        return of_s[:, None] * s + of_t[:, None] * t
    else:
        e = s - t
        if FEATURE_KIND == 1:
            size = tl.abs(e)
            slope = tl.where(size < 1.0, e, tl.where(e > 0.0, 1.0, tl.where(e < 0.0, -1.0, e)))
        else:
            slope = 2.0 * e
        return of_s[:, None] * slope
