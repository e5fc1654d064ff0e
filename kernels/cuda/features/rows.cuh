// Distance of one row of features to another, and its gradients, by a group of threads. S: F32 or F64;
// kPadded: the rows lie in shared memory with zeros after them.
#pragma once

#include "common/vector/features.h"
#include "cuda/rows/matrix_rows.cuh"

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

// The sums of feature_row_of_sums, the same in every thread. kScaled: of the rows times `of_s` and `of_t`.
template <class S, bool kPadded, bool kScaled, class Group>
MFD_INLINE void feature_sums(const Group& group, FeatureKind kind, const Source& s, const Source& t,
                             int64_t width, typename S::T of_s, typename S::T of_t, double (&sums)[3]) {
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
      if (kScaled) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
          x[k] = x[k] * of_s;
          y[k] = y[k] * of_t;
        }
      }
      add_features<S, decltype(constant)::value>(x, y, own);
    });
  });
  for (int k = 0; k < 3; ++k) sums[k] = static_cast<double>(own[k]);
  if (kind == kCosine) {
    group.template reduce<Sum>(sums);
  } else {
    double first[1] = {sums[0]};
    group.template reduce<Sum>(first);
    sums[0] = first[0];
  }
}

// 2^exponent.
template <class T>
MFD_INLINE T power_of_two(int exponent) {
  return static_cast<T>(ldexp(1.0, exponent));
}

// The distance of s and t, and the factors of its gradients; the same in every thread.
template <class S, bool kPadded, class Group>
MFD_INLINE FeatureRow feature_distance(const Group& group, FeatureKind kind, const Source& s, const Source& t,
                                       int64_t width) {
  typedef typename S::T T;
  double sums[3];
  feature_sums<S, kPadded, false>(group, kind, s, t, width, T(1), T(1), sums);
  if (kind != kCosine) return feature_row_of_sums(kind, sums[0], 0, 0, width);
  constexpr bool kDouble = sizeof(T) == 8;
  const int of_s = norm_exponent(sums[1], kDouble), of_t = norm_exponent(sums[2], kDouble);
  if (of_s || of_t)
    feature_sums<S, kPadded, true>(group, kCosine, s, t, width, power_of_two<T>(of_s), power_of_two<T>(of_t),
                                   sums);
  return feature_row_of_sums(kCosine, sums[0], sums[1], sums[2], width, of_s, of_t);
}

// g[k] = d distance/ds of one thread's columns, times the factor that is in `of_t` (FeatureRow's a) and
// `of_s` (b), and the powers of two that s and t are scaled with. For the gradient to t, swap s and t and
// pass c as `of_s`.
template <class S>
MFD_INLINE void feature_gradient(FeatureKind kind, const typename S::T (&s)[VectorOf<S>::kColumns],
                                 const typename S::T (&t)[VectorOf<S>::kColumns], typename S::T of_t,
                                 typename S::T of_s, int s_exponent, int t_exponent,
                                 typename S::T (&g)[VectorOf<S>::kColumns]) {
  if (s_exponent || t_exponent) {
    const typename S::T by_s = power_of_two<typename S::T>(s_exponent),
                        by_t = power_of_two<typename S::T>(t_exponent);
#pragma unroll
    for (int k = 0; k < VectorOf<S>::kColumns; ++k)
      g[k] = by_s * feature_slope<S, kCosine>(by_s * s[k], by_t * t[k], of_t, of_s);
    return;
  }
  with_kind(kind, [&](auto constant) {
#pragma unroll
    for (int k = 0; k < VectorOf<S>::kColumns; ++k)
      g[k] = feature_slope<S, decltype(constant)::value>(s[k], t[k], of_t, of_s);
  });
}

}  // namespace device
}  // namespace mfd
