// Gradient of a block from its exponentials: a*e_s - b*e_t + h*e_h - shift.
#pragma once

#include <type_traits>

#include "cpu/distill/sums.h"
#include "cpu/simd/vec.h"

namespace mfd::MFD_ISA {
namespace {

// Factors of one block: gradient = a*e_s - b*e_t + h*e_h - shift.
template <class T>
struct GradientFactors {
  T a, b, h, shift;
};

template <class S, bool kSoft, int kHard>
MFD_INLINE typename S::V gradient_step(const typename S::T* es, const typename S::T* et,
                                       const typename S::T* eh, const GradientFactors<typename S::V>& f) {
  typedef typename S::V V;
  const V e = S::load(es);
  V g{};
  // Both products are rounded, so that equal distributions give exactly 0.
  if (kSoft) g = e * f.a - S::load(et) * f.b;
  if (kHard == kComputed) {
    g = S::fma(S::load(eh), f.h, g) - f.shift;
  } else if (kHard) {
    g = S::fma(power<S, kHard>(e), f.h, g) - f.shift;
  }
  return g;
}

// One value of the same formula: the label's column.
template <class T>
MFD_INLINE T gradient_at(int hard, bool soft, T e, T p, T own, const GradientFactors<T>& f) {
  T g = soft ? e * f.a - p * f.b : T(0);
  if (!hard) return g - f.shift;
  T power = hard == kComputed ? own : e;
  for (int k = 1; hard != kComputed && k < hard; ++k) power *= e;
  return g + (power * f.h - f.shift);
}

// The one class of a block that has a value of its own; -1 for none.
template <class T>
struct LabelGradient {
  int64_t at;
  T value;
};

// Streams only elements of the compute dtype.
template <class S, bool kSoft, int kHard, class E>
static void block_gradient(const typename S::T* es, const typename S::T* et, const typename S::T* eh,
                           int64_t n, const GradientFactors<typename S::T>& factors, bool stream,
                           const LabelGradient<typename S::T>& label, E* out) {
  typedef typename S::T T;
  typedef typename S::V V;
  constexpr int64_t W = S::kWidth;
  constexpr bool kConverts = !std::is_same<E, T>::value;
  const GradientFactors<V> f = {S::splat(factors.a), S::splat(factors.b), S::splat(factors.h),
                                S::splat(factors.shift)};
  const auto step = [&](int64_t i) { return gradient_step<S, kSoft, kHard>(es + i, et + i, eh + i, f); };
  // The label's value goes in before its vector is written: a line that has been streamed is far away.
  const auto with_label = [&](int64_t i) {
    const V g = step(i);
    const int64_t lane = label.at - i;
    if (lane < 0 || lane >= W) return g;
    T lanes[W];
    S::store(lanes, g);
    lanes[lane] = label.value;
    return S::load(lanes);
  };
  const auto write = [&](int64_t i, V g) {
    if constexpr (kConverts) {
      S::store(out + i, g);
    } else {
      stream ? S::stream(out + i, g) : S::store(out + i, g);
    }
  };
  int64_t i = 0;
  if (stream && !kConverts) {
    // Elements before the first aligned vector.
    const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) / sizeof(T)) & (W - 1);
    if (misaligned) {
      i = W - misaligned < n ? W - misaligned : n;
      S::store_first(out, with_label(0), i);
    }
  }
  if (label.at >= i) {
    const int64_t of_label = i + (label.at - i) / W * W;
    for (; i < of_label; i += W) write(i, step(i));
    if (i + W <= n) {
      write(i, with_label(i));
      i += W;
    }
  }
  for (; i + W <= n; i += W) write(i, step(i));
  if (i < n) S::store_first(out + i, with_label(i), n - i);
}

template <class S, bool kSoft>
static void block_gradient_of(int hard, const typename S::T* es, const typename S::T* et,
                              const typename S::T* eh, int64_t n, const GradientFactors<typename S::T>& f,
                              bool stream, const LabelGradient<typename S::T>& label, typename S::T* out) {
  switch (hard) {
    case 0:
      return block_gradient<S, kSoft, 0>(es, et, eh, n, f, stream, label, out);
    case 1:
      return block_gradient<S, kSoft, 1>(es, et, eh, n, f, stream, label, out);
    case 2:
      return block_gradient<S, kSoft, 2>(es, et, eh, n, f, stream, label, out);
    case 3:
      return block_gradient<S, kSoft, 3>(es, et, eh, n, f, stream, label, out);
    case 4:
      return block_gradient<S, kSoft, 4>(es, et, eh, n, f, stream, label, out);
    default:
      return block_gradient<S, kSoft, kComputed>(es, et, eh, n, f, stream, label, out);
  }
}

}  // namespace
}  // namespace mfd::MFD_ISA
