// Distances between rows of features, and their gradients.
#pragma once

#include "common/vector/features.h"
#include "cpu/rows/matrix_rows.h"
#include "cpu/runtime/kernels.h"
#include "cpu/simd/row_ends.h"

namespace mfd::MFD_ISA {
namespace {

template <class S, int kKind, class A, class B>
static FeatureRow feature_row(const A* s, const B* t, int64_t n) {
  typedef typename S::V V;
  constexpr int64_t W = S::kWidth;
  constexpr int kSums = kKind == kCosine ? 3 : 1;
  V acc[2][kSums] = {};
  const auto step = [&](V* sums, int64_t i, int64_t left) __attribute__((always_inline)) {
    const V a = load_upto<S>(s + i, left), b = load_upto<S>(t + i, left);
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
  const double first = S::sum(acc[0][0] + acc[1][0]);
  if (kKind != kCosine) return feature_row_of_sums(static_cast<FeatureKind>(kKind), first, 0, 0, n);
  const double ss = S::sum(acc[0][kSums - 2] + acc[1][kSums - 2]);
  const double tt = S::sum(acc[0][kSums - 1] + acc[1][kSums - 1]);
  return feature_row_of_sums(kCosine, first, ss, tt, n);
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

// out = base + factor*(d distance/ds), base null: 0.
template <class S, int kKind, class A, class B, class Out>
static void feature_gradient(const A* s, const B* t, int64_t n, double of_t, double of_s,
                             const typename S::T* base, Out* out) {
  typedef typename S::T T;
  typedef typename S::V V;
  const V a = S::splat(static_cast<T>(of_t)), b = S::splat(static_cast<T>(of_s));
  over_vectors<S>(
      n, MFD_STEP {
        V g = feature_slope<S, kKind>(load_upto<S>(s + i, left), load_upto<S>(t + i, left), a, b);
        if (base) g = g + load_upto<S>(base + i, left);
        store_upto<S>(out + i, g, left);
      });
}

template <class S, class A, class B, class Out>
static void feature_gradient_of(FeatureKind kind, const A* s, const B* t, int64_t n, double of_t, double of_s,
                                const typename S::T* base, Out* out) {
  switch (kind) {
    case kMse:
      return feature_gradient<S, kMse>(s, t, n, of_t, of_s, base, out);
    case kSmoothL1:
      return feature_gradient<S, kSmoothL1>(s, t, n, of_t, of_s, base, out);
    default:
      return feature_gradient<S, kCosine>(s, t, n, of_t, of_s, base, out);
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
      feature_gradient_of<S>(kind, s, t, n, g * f.a, g * f.b, nullptr, out);
      row_out(out, n, tap.student.dtype, tap.stream, d_student);
    }
    if (d_teacher) {
      E* out = row_target(tap.teacher.dtype, tap.stream, d_teacher, buffer);
      feature_gradient_of<S>(kind, t, s, n, g * f.a, g * f.c, nullptr, out);
      row_out(out, n, tap.teacher.dtype, tap.stream, d_teacher);
    }
  }
}

}  // namespace
}  // namespace mfd::MFD_ISA
