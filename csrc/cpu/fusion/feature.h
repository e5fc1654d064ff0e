// Distances between rows of features, and their gradients.
#pragma once

#include "common/vector/features.h"
#include "cpu/rows/matrix_rows.h"
#include "cpu/runtime/kernels.h"
#include "cpu/simd/row_ends.h"

namespace mfd::MFD_ISA {
namespace {

// Sums of feature_row_of_sums. kScaled: of the rows times `of_s` and `of_t`.
template <class S, int kKind, bool kScaled, class A, class B>
static void feature_sums(const A* s, const B* t, int64_t n, double of_s, double of_t, double (&out)[3]) {
  typedef typename S::T T;
  typedef typename S::V V;
  constexpr int64_t W = S::kWidth;
  constexpr int kSums = kKind == kCosine ? 3 : 1;
  const V by_s = S::splat(static_cast<T>(of_s)), by_t = S::splat(static_cast<T>(of_t));
  V acc[2][kSums] = {};
  const auto step = [&](V* sums, int64_t i, int64_t left) __attribute__((always_inline)) {
    V a = load_upto<S>(s + i, left), b = load_upto<S>(t + i, left);
    if (kScaled) {
      a = a * by_s;
      b = b * by_t;
    }
    if (kKind == kCosine) {
      sums[0] = S::fma(a, b, sums[0]);
      sums[kSums - 2] = S::fma(a, a, sums[kSums - 2]);
      sums[kSums - 1] = S::fma(b, b, sums[kSums - 1]);
    } else {
      sums[0] = sums[0] + error_of<S, kKind>(a - b);
    }
  };
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    step(acc[0], i, W);
    step(acc[1], i + W, W);
  }
  if (i < n) step(acc[0], i, n - i < W ? n - i : W);
  if (i + W < n) step(acc[1], i + W, n - i - W);
  for (int k = 0; k < kSums; ++k) out[k] = S::sum(acc[0][k] + acc[1][k]);
}

template <class S, int kKind, class A, class B>
static FeatureRow feature_row(const A* s, const B* t, int64_t n) {
  constexpr bool kDouble = sizeof(typename S::T) == 8;
  double sums[3] = {};
  feature_sums<S, kKind, false>(s, t, n, 1.0, 1.0, sums);
  if (kKind != kCosine) return feature_row_of_sums(static_cast<FeatureKind>(kKind), sums[0], 0, 0, n);
  const int of_s = norm_exponent(sums[1], kDouble), of_t = norm_exponent(sums[2], kDouble);
  if (of_s || of_t) feature_sums<S, kCosine, true>(s, t, n, ldexp(1.0, of_s), ldexp(1.0, of_t), sums);
  return feature_row_of_sums(kCosine, sums[0], sums[1], sums[2], n, of_s, of_t);
}

template <class S, class A, class B>
static FeatureRow feature_row_of(FeatureKind kind, const A* s, const B* t, int64_t n) {
  switch (kind) {
    case kMse:
      return feature_row<S, kMse>(s, t, n);
    case kSmoothL1:
      return feature_row<S, kSmoothL1>(s, t, n);
    default:
      return feature_row<S, kCosine>(s, t, n);
  }
}

// Factors of the gradient to one side, `own`, of a FeatureRow: of the other side and of its own, and what
// both are scaled with.
struct FeatureFactors {
  double other, own;
  int of_own, of_other;
};

MFD_INLINE FeatureFactors factors_of_student(const FeatureRow& f, double upstream) {
  return {upstream * f.a, upstream * f.b, f.of_student, f.of_teacher};
}

MFD_INLINE FeatureFactors factors_of_teacher(const FeatureRow& f, double upstream) {
  return {upstream * f.a, upstream * f.c, f.of_teacher, f.of_student};
}

// out = base + d distance/ds, base null: 0. kScaled: of scaled rows.
template <class S, int kKind, bool kScaled, class A, class B, class Out>
static void feature_gradient(const A* s, const B* t, int64_t n, const FeatureFactors& f,
                             const typename S::T* base, Out* out) {
  typedef typename S::T T;
  typedef typename S::V V;
  const V a = S::splat(static_cast<T>(f.other)), b = S::splat(static_cast<T>(f.own));
  const V by_s = S::splat(static_cast<T>(kScaled ? ldexp(1.0, f.of_own) : 1.0));
  const V by_t = S::splat(static_cast<T>(kScaled ? ldexp(1.0, f.of_other) : 1.0));
  over_vectors<S>(
      n, MFD_STEP {
        V x = load_upto<S>(s + i, left), y = load_upto<S>(t + i, left);
        V g = kScaled ? by_s * feature_slope<S, kKind>(by_s * x, by_t * y, a, b)
                      : feature_slope<S, kKind>(x, y, a, b);
        if (base) g = g + load_upto<S>(base + i, left);
        store_upto<S>(out + i, g, left);
      });
}

template <class S, class A, class B, class Out>
static void feature_gradient_of(FeatureKind kind, const A* s, const B* t, int64_t n, const FeatureFactors& f,
                                const typename S::T* base, Out* out) {
  switch (kind) {
    case kMse:
      return feature_gradient<S, kMse, false>(s, t, n, f, base, out);
    case kSmoothL1:
      return feature_gradient<S, kSmoothL1, false>(s, t, n, f, base, out);
    default:
      return f.of_own || f.of_other ? feature_gradient<S, kCosine, true>(s, t, n, f, base, out)
                                    : feature_gradient<S, kCosine, false>(s, t, n, f, base, out);
  }
}

// E: the elements of both sides, or what they are converted to.
template <class S, class E>
static void tap_rows_of(const Tap& tap, FeatureKind kind, int64_t begin, int64_t end,
                        const FusionScratch& scratch, double* values) {
  typedef typename S::T T;
  const int64_t n = tap.width;
  const int64_t s_bytes = n * dtype_size(tap.student.dtype), t_bytes = n * dtype_size(tap.teacher.dtype);
  E* const buffer = static_cast<E*>(scratch.out[0]);
  for (int64_t row = begin; row < end; ++row) {
    char* d_student = tap.d_student ? static_cast<char*>(tap.d_student) + row * s_bytes : nullptr;
    char* d_teacher = tap.d_teacher ? static_cast<char*>(tap.d_teacher) + row * t_bytes : nullptr;
    if (tap.mask && !tap.mask[row]) {
      if (values) values[row] = 0;
      put<T>(tap.distances, row, 0);
      if (d_student) write_zeros(d_student, s_bytes, tap.stream);
      if (d_teacher) write_zeros(d_teacher, t_bytes, tap.stream);
      continue;
    }
    prefetch(tap.student, row + 1, end, n);
    prefetch(tap.teacher, row + 1, end, n);
    const E* s = row_in(tap.student, row, n, static_cast<E*>(scratch.in[0]));
    const E* t = row_in(tap.teacher, row, n, static_cast<E*>(scratch.target));
    const FeatureRow f = feature_row_of<S>(kind, s, t, n);
    if (values) values[row] = f.value;
    put<T>(tap.distances, row, f.value);
    if (!d_student && !d_teacher) continue;
    const double g = at<T>(tap.grad_rows, row);
    if (d_student) {
      E* out = row_target(tap.student.dtype, tap.stream, d_student, buffer);
      feature_gradient_of<S>(kind, s, t, n, factors_of_student(f, g), nullptr, out);
      row_out(out, n, tap.student.dtype, tap.stream, d_student);
    }
    if (d_teacher) {
      E* out = row_target(tap.teacher.dtype, tap.stream, d_teacher, buffer);
      feature_gradient_of<S>(kind, t, s, n, factors_of_teacher(f, g), nullptr, out);
      row_out(out, n, tap.teacher.dtype, tap.stream, d_teacher);
    }
  }
}

}  // namespace
}  // namespace mfd::MFD_ISA
