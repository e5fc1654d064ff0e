// Several teachers: what of their mixture p = sum_k w_k*p_k does not depend on how rows are walked.
#pragma once

#include "common/annotations.h"
#include "common/rows/target_math.h"

namespace mfd {

// The label's odds at temperature 1, for NKD. `teachers` are TeacherRow or derived from it.
template <class Row>
MFD_INLINE Odds mixed_odds(int64_t count, const Row* teachers) {
  double label = 0, rest = 0;
  for (int64_t k = 0; k < count; ++k) {
    label += teachers[k].weight * teachers[k].unit_label;
    rest += teachers[k].weight * teachers[k].unit_rest;
  }
  return {log(label) - log(rest), label, rest, log(label), log(rest)};
}

// log(p_k/p) is cut here, far above 1/w_k of a teacher that has a say.
constexpr double kLogRatio = 80.0;

// (p_k/p)*b of one vector.
template <class S>
MFD_INLINE typename S::V share_of(typename S::V log_pk, typename S::V log_p, typename S::V b) {
  typedef typename S::T T;
  typedef typename S::V V;
  const V ratio = S::exp_of(S::min(S::splat(T(kLogRatio)), log_pk - log_p));
  return S::select((b == V{}) | (log_p == S::splat(static_cast<T>(-kInf))), V{}, ratio * b);
}

}  // namespace mfd
