// Distance of one row of features to another, and its gradients, by a group of threads. S: F32 or F64;
// kPadded: the rows lie in shared memory with zeros after them.
#pragma once

#include "common/vector/features.h"
#include "matrix_rows.cuh"

namespace mfd {
namespace device {

// act(KindConstant<kind>()).
template <int kKind>
struct KindConstant {
  static constexpr int value = kKind;
};
template <class Act>
MFD_INLINE void with_kind(FeatureKind kind, const Act& act) {
  switch (kind) {
    case kMse:
      return act(KindConstant<kMse>());
    case kSmoothL1:
      return act(KindConstant<kSmoothL1>());
    default:
      return act(KindConstant<kCosine>());
  }
}

// What one thread's columns add to the sums of feature_row_of_sums.
template <class S, int kKind>
MFD_INLINE void add_features(const typename S::T (&s)[VectorOf<S>::kColumns],
                             const typename S::T (&t)[VectorOf<S>::kColumns], typename S::T (&sums)[3]) {
  constexpr int N = VectorOf<S>::kColumns;
  if constexpr (kKind == kCosine) {
    sums[0] = sums[0] + dot_of<S>(s, t);
    sums[1] = sums[1] + dot_of<S>(s, s);
    sums[2] = sums[2] + dot_of<S>(t, t);
  } else {
    typename S::T error[N];
#pragma unroll
    for (int k = 0; k < N; ++k) error[k] = error_of<S, kKind>(s[k] - t[k]);
    sums[0] = sums[0] + total_of<S>(error);
  }
}

// The distance of s and t, and the factors of its gradients; the same in every thread.
template <class S, bool kPadded, class Group>
MFD_INLINE FeatureRow feature_distance(const Group& group, FeatureKind kind, const Source& s, const Source& t,
                                       int64_t width) {
  typedef typename S::T T;
  constexpr int N = VectorOf<S>::kColumns;
  T own[3] = {};
  with_kind(kind, [&](auto constant) {
    over_columns<S>(group, width, [&](int64_t start) {
      Columns<S> a, b;
      a.template load<kPadded>(s, start, width);
      b.template load<kPadded>(t, start, width);
      T x[N], y[N];
      a.get(s.dtype, x);
      b.get(t.dtype, y);
      add_features<S, decltype(constant)::value>(x, y, own);
    });
  });
  double sums[3] = {static_cast<double>(own[0]), static_cast<double>(own[1]), static_cast<double>(own[2])};
  if (kind == kCosine) {
    group.template reduce<Sum>(sums);
  } else {
    double first[1] = {sums[0]};
    group.template reduce<Sum>(first);
    sums[0] = first[0];
  }
  return feature_row_of_sums(kind, sums[0], sums[1], sums[2], width);
}

// g[k] = d distance/ds of one thread's columns, times the factor that is in `of_t` (FeatureRow's a) and
// `of_s` (b). For the gradient to t, swap s and t and pass c as `of_s`.
template <class S>
MFD_INLINE void feature_gradient(FeatureKind kind, const typename S::T (&s)[VectorOf<S>::kColumns],
                                 const typename S::T (&t)[VectorOf<S>::kColumns], typename S::T of_t,
                                 typename S::T of_s, typename S::T (&g)[VectorOf<S>::kColumns]) {
  with_kind(kind, [&](auto constant) {
#pragma unroll
    for (int k = 0; k < VectorOf<S>::kColumns; ++k)
      g[k] = feature_slope<S, decltype(constant)::value>(s[k], t[k], of_t, of_s);
  });
}

}  // namespace device
}  // namespace mfd
