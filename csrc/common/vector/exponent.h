// The polynomial of the exponential.
#pragma once

#include "common/annotations.h"

namespace mfd {

// 2^f for f in [-1/2, 1/2]: a minimax polynomial with relative error 3.0e-9 and p(0) = 1, so that rounding is
// all that is left of the error.
template <class S>
MFD_INLINE typename S::V exp2_polynomial(typename S::V f) {
  typename S::V p = S::splat(1.532647148e-4f);
  p = S::fma(p, f, S::splat(1.339080627e-3f));
  p = S::fma(p, f, S::splat(9.618505836e-3f));
  p = S::fma(p, f, S::splat(5.550359935e-2f));
  p = S::fma(p, f, S::splat(2.402264774e-1f));
  p = S::fma(p, f, S::splat(6.931471825e-1f));
  return S::fma(p, f, S::splat(1.0f));
}

}  // namespace mfd
