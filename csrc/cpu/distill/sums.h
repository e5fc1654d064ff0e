// Sums over a block of logits: exponentials relative to the block's maxima, kept in scratch.
#pragma once

#include "common/rows/row_math.h"
#include "cpu/simd/exp.h"

namespace mfd::MFD_ISA {
namespace {

// How the exponentials of the hard term (temperature 1) come about: none; the N-th power of those at
// temperature N = 1..4; computed.
enum HardMode : int { kNoHard = 0, kComputed = 5 };

MFD_INLINE int hard_mode(double temperature) {
  return temperature == 1.0   ? 1
         : temperature == 2.0 ? 2
         : temperature == 3.0 ? 3
         : temperature == 4.0 ? 4
                              : kComputed;
}

template <class S>
struct Scales {
  Exponent<S> student, teacher, hard;
  typename S::V ratio;  // Ts/Tt; 0 where the cross-entropy is wanted instead of the divergence
  Scales(double ts, double tt, bool cross_entropy)
      : student(ts),
        teacher(tt),
        hard(1.0),
        ratio(S::splat(static_cast<typename S::T>(cross_entropy ? 0.0 : ts / tt))) {}
};

// What the first pass keeps of both sides together: nothing (hard term only); the sum of p*(v - u); with it
// the differences y - x themselves, for the second pass, from logits near each other or not.
enum SoftMode : int { kNoSoft = 0, kCross = 1, kSubtracted = 2, kFused = 3 };

// Block maxima this close leave y - x with no larger error than the differences from the maxima have.
constexpr double kNearMaxima = 8.0;
MFD_INLINE bool are_near(double max_s, double max_t, double ratio) {
  return ratio == 1.0 && max_t - max_s <= kNearMaxima && max_s - max_t <= kNearMaxima;
}

// Rows of scratch that the first pass fills, at the block's start.
template <class T>
struct Kept {
  T *es, *et, *eh, *difference;
  Kept after(int64_t i) const { return {es + i, et + i, eh + i, difference + i}; }
};

// Bytes ahead of the pass that should already be on their way from memory, per vector.
struct Ahead {
  const char *x, *y;
  int64_t x_step, y_step;
};

template <class S>
MFD_INLINE typename S::T block_max(const typename S::T* x, int64_t n) {
  typedef typename S::V V;
  constexpr int64_t W = S::kWidth;
  V m[4];
  for (V& lane : m) lane = S::splat(S::kLowest);
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int k = 0; k < 4; ++k) m[k] = S::max(S::load(x + i + k * W), m[k]);
  for (; i + W <= n; i += W) m[0] = S::max(S::load(x + i), m[0]);
  if (i < n) m[1] = S::max(S::load_first(x + i, n - i, S::kLowest), m[1]);
  return S::largest(S::max(S::max(m[0], m[1]), S::max(m[2], m[3])));
}

template <class S>
struct Accumulators {
  typename S::V s{}, t{}, h{}, cross{};
};

template <class S, int kSoft, int kHard>
MFD_INLINE void sums_step(typename S::V x, typename S::V y, typename S::V mx, typename S::V my,
                          const Scales<S>& scales, const Kept<typename S::T>& kept, Accumulators<S>& acc) {
  typedef typename S::V V;
  const V tx = x - mx;
  const V e = scales.student(tx);
  S::store(kept.es, e);
  acc.s = acc.s + e;
  if (kHard == kComputed) {
    const V h = scales.hard(tx);
    S::store(kept.eh, h);
    acc.h = acc.h + h;
  } else if (kHard > 1) {
    acc.h = acc.h + power<S, kHard>(e);
  }
  if (kSoft == kNoSoft) return;
  const V ty = y - my;
  const V p = scales.teacher(ty);
  S::store(kept.et, p);
  acc.t = acc.t + p;
  // The one rounding is exact where x is close to y and Ts = Tt.
  const V d = kSoft == kSubtracted ? y - x - (my - mx) : S::fused(ty, scales.ratio, -tx);
  if (kSoft != kCross) S::store(kept.difference, d);
  // 0*log 0 = 0
  acc.cross = acc.cross + S::select(scales.teacher.vanishes(ty), V{}, p * d);
}

template <class S, int kSoft, int kHard>
static void block_sums(const typename S::T* x, const typename S::T* y, int64_t n, const Scales<S>& scales,
                       const Ahead& ahead, const Kept<typename S::T>& kept, BlockSums* out) {
  typedef typename S::T T;
  typedef typename S::V V;
  constexpr int64_t W = S::kWidth;
  const V mx = S::splat(static_cast<T>(out->max_s)), my = S::splat(static_cast<T>(out->max_t));
  Accumulators<S> a, b;
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    __builtin_prefetch(ahead.x + i * ahead.x_step);
    if (!kSoft) __builtin_prefetch(ahead.x + (i + W) * ahead.x_step);
    if (kSoft) __builtin_prefetch(ahead.y + i * ahead.y_step);
    sums_step<S, kSoft, kHard>(S::load(x + i), kSoft ? S::load(y + i) : V{}, mx, my, scales, kept.after(i),
                               a);
    sums_step<S, kSoft, kHard>(S::load(x + i + W), kSoft ? S::load(y + i + W) : V{}, mx, my, scales,
                               kept.after(i + W), b);
  }
  // Lanes past the end are -inf: they add exactly 0.
  const T pad = static_cast<T>(-kInf);
  for (; i < n; i += W) {
    const int64_t left = n - i < W ? n - i : W;
    sums_step<S, kSoft, kHard>(S::load_first(x + i, left, pad), kSoft ? S::load_first(y + i, left, pad) : V{},
                               mx, my, scales, kept.after(i), a);
  }
  out->sum_s = S::sum(a.s) + S::sum(b.s);
  out->sum_h = kHard == 1 ? out->sum_s : kHard ? S::sum(a.h) + S::sum(b.h) : 0.0;
  out->sum_t = kSoft ? S::sum(a.t) + S::sum(b.t) : 0.0;
  out->cross = kSoft ? S::sum(a.cross + b.cross) : 0.0;
}

// sum (x - max): for label smoothing.
template <class S>
static double block_shifted_sum(const typename S::T* x, int64_t n, double block_max) {
  typedef typename S::T T;
  typedef typename S::V V;
  const V m = S::splat(static_cast<T>(block_max));
  V acc{};
  for (int64_t i = 0; i < n; i += S::kWidth) {
    const int64_t left = n - i < S::kWidth ? n - i : S::kWidth;
    acc = acc + (S::load_first(x + i, left, static_cast<T>(block_max)) - m);
  }
  return S::sum(acc);
}

// sum exp((x - max)/T)
template <class S>
static double exponential_sum(const typename S::T* x, int64_t n, double max, const Exponent<S>& exponent,
                              typename S::T* store = nullptr) {
  typedef typename S::T T;
  typedef typename S::V V;
  const V m = S::splat(static_cast<T>(max));
  V acc{};
  for (int64_t i = 0; i < n; i += S::kWidth) {
    const V e = exponent(load_or_pad<S>(x + i, n - i, static_cast<T>(-kInf)) - m);
    if (store) S::store(store + i, e);
    acc = acc + e;
  }
  return S::sum(acc);
}

// sum exp(x - max), the N-th powers of the exponentials e at temperature N or computed.
template <class S, int kHard>
static double block_unit_sum(const typename S::T* e, const typename S::T* x, int64_t n, double block_max) {
  typedef typename S::T T;
  typedef typename S::V V;
  const V m = S::splat(static_cast<T>(block_max));
  const Exponent<S> exponent(1.0);
  V acc{};
  for (int64_t i = 0; i < n; i += S::kWidth) {
    if (kHard == kComputed) {
      const int64_t left = n - i < S::kWidth ? n - i : S::kWidth;
      acc = acc + exponent(S::load_first(x + i, left, static_cast<T>(-kInf)) - m);
    } else {
      acc = acc + power<S, kHard>(S::load(e + i));
    }
  }
  return S::sum(acc);
}

template <class S>
static double block_unit_sum_of(int hard, const typename S::T* e, const typename S::T* x, int64_t n,
                                double block_max) {
  switch (hard) {
    case 2:
      return block_unit_sum<S, 2>(e, x, n, block_max);
    case 3:
      return block_unit_sum<S, 3>(e, x, n, block_max);
    case 4:
      return block_unit_sum<S, 4>(e, x, n, block_max);
    default:
      return block_unit_sum<S, kComputed>(e, x, n, block_max);
  }
}

// sum w*(x - max) where w is not 0.
template <class S>
static double weighted_sum(const typename S::T* weights, const typename S::T* x, int64_t n, double max) {
  typedef typename S::T T;
  typedef typename S::V V;
  const V m = S::splat(static_cast<T>(max));
  V acc{};
  for (int64_t i = 0; i < n; i += S::kWidth) {
    const V w = load_or_pad<S>(weights + i, n - i, T(0));
    acc = acc + S::select(w == V{}, V{}, w * (load_or_pad<S>(x + i, n - i, T(0)) - m));
  }
  return S::sum(acc);
}

template <class S, int kSoft>
static void block_sums_of(int hard, const typename S::T* x, const typename S::T* y, int64_t n,
                          const Scales<S>& scales, const Ahead& ahead, const Kept<typename S::T>& kept,
                          BlockSums* out) {
  switch (hard) {
    case 0:
      return block_sums<S, kSoft, 0>(x, y, n, scales, ahead, kept, out);
    case 1:
      return block_sums<S, kSoft, 1>(x, y, n, scales, ahead, kept, out);
    case 2:
      return block_sums<S, kSoft, 2>(x, y, n, scales, ahead, kept, out);
    case 3:
      return block_sums<S, kSoft, 3>(x, y, n, scales, ahead, kept, out);
    case 4:
      return block_sums<S, kSoft, 4>(x, y, n, scales, ahead, kept, out);
    default:
      return block_sums<S, kSoft, kComputed>(x, y, n, scales, ahead, kept, out);
  }
}

template <class S>
static double plain_sum(const typename S::T* w, int64_t n) {
  typename S::V acc{};
  for (int64_t i = 0; i < n; i += S::kWidth) acc = acc + S::load(w + i);
  return S::sum(acc);
}

}  // namespace
}  // namespace mfd::MFD_ISA
