// Slopes of the soft term to u = x/Ts and v = y/Tt at a vector of classes.
#pragma once

#include "common/annotations.h"
#include "common/rows/saved_row.h"
#include "common/vector/divergences.h"

namespace mfd {

template <class S>
struct SlopePair {
  typename S::V to_u, to_v;
};

// Of forward KL, DKD and NKD; see LinearSlopes.
template <class S>
struct LinearSlope {
  typedef typename S::V V;
  typedef typename S::T T;
  V teacher, extra, rest_weight, mean, rest_shift, zero;
  bool exact;  // DKD

  MFD_MEMBER explicit LinearSlope(const LinearSlopes& s)
      : teacher(S::splat(static_cast<T>(s.teacher))),
        extra(S::splat(static_cast<T>(s.student - s.teacher))),
        rest_weight(S::splat(static_cast<T>(s.rest_weight))),
        mean(S::splat(static_cast<T>(s.mean))),
        rest_shift(S::splat(static_cast<T>(s.rest_shift))),
        zero(S::splat(static_cast<T>(s.mean != s.mean || s.rest_shift != s.rest_shift ? kNan : 0.0))),
        exact(s.student != s.teacher) {}

  // DKD as teacher*(q - p) + (student - teacher)*q, q - p = -q*expm1(r) where the teacher is near: beta
  // magnifies what the two exponentials round away.
  MFD_MEMBER SlopePair<S> operator()(V q, V p, V r, V t) const {
    V difference = q - p;
    if (exact) {
      const V half = S::splat(T(0.5));
      const auto near = (r < half) & (r > -half);
      difference = S::select(near, -(q * S::expm1_of(S::select(near, r, V{}))), difference);
    }
    return {S::fma(extra, q, teacher * difference),
            S::select(p == V{}, zero, p * (weighed<S>(rest_weight, t - mean) + rest_shift))};
  }
};

}  // namespace mfd
