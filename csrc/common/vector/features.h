// Distances between features, element by element.
#pragma once

#include "common/annotations.h"
#include "common/problems/fusion.h"

namespace mfd {

template <class S>
MFD_INLINE typename S::V clamp_unit(typename S::V e) {
  typedef typename S::T T;
  const typename S::V one = S::splat(T(1));
  return S::select(e > one, one, S::select(e < -one, -one, e));
}

// h(e): e^2 or smooth L1 with threshold 1, e^2/2 or |e| - 1/2.
template <class S, int kKind>
MFD_INLINE typename S::V error_of(typename S::V e) {
  typedef typename S::T T;
  if (kKind == kMse) return e * e;
  const typename S::V size = S::select(e < typename S::V{}, -e, e), half = S::splat(T(0.5));
  return S::select(size < S::splat(T(1)), half * e * e, size - half);
}

// Gradient to s of a distance to t: a*t + b*s for the cosine, else a*h'(s - t) without the 2 of (e^2)'.
template <class S, int kKind>
MFD_INLINE typename S::V feature_slope(typename S::V s, typename S::V t, typename S::V a, typename S::V b) {
  if (kKind == kCosine) return S::fma(a, t, b * s);
  return a * (kKind == kMse ? s - t : clamp_unit<S>(s - t));
}

}  // namespace mfd
