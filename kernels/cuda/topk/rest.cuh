// The classes that a sparse teacher does not list: a bitmap, one bit per column of a block, tells them
// decoupled while the student's logits stream past. No sum is the difference of two others, so that a tiny
// rest keeps its digits.
#pragma once

#include "common/rows/topk_math.h"
#include "cuda/distill/sums.cuh"
#include "cuda/rows/packed.cuh"

namespace mfd {
namespace device {

// Bits of the columns of a vector, the first one lowest; `column` counts from the block's first one.
template <class S>
MFD_INLINE uint32_t listed_bits(const uint32_t* bits, int64_t column) {
  constexpr int N = VectorOf<S>::kColumns;
  return bits[column >> 5] >> (column & 31) & ((1u << N) - 1u);
}

// Sums of one thread over its unlisted columns, relative to the largest of them so far.
template <class S>
struct RestThread {
  typedef typename S::T T;
  static constexpr int N = VectorOf<S>::kColumns;
  T max = S::kLowest;
  T s = 0, h = 0, dot = 0, powers = 0, power_dot = 0, x = 0;
  T columns = 0;  // that `x` counts

  MFD_DEVICE void raise(const Exponent<S>& by_ts, const HardExponent<S>& hard, const Exponent<S>& by_power,
                        T to) {
    const T d = max - to, w = by_ts(d), wp = by_power(d);
    dot = s == T(0) ? T(0) : w * S::fma(s, d, dot);
    h = h * hard(w, d);
    s = s * w;
    power_dot = powers == T(0) ? T(0) : wp * S::fma(powers, d, power_dot);
    powers = powers * wp;
    x = columns == T(0) ? T(0) : S::fma(columns, d, x);
    max = to;
  }
};

// What the pass over the rest is to add up beside sum_s.
struct RestWanted {
  bool hard, dots, powers, spread;
};

// Adds the columns from `start` on.
template <class S>
MFD_INLINE void add_rest(RestThread<S>& own, const View& view, int64_t start, uint32_t listed,
                         int64_t classes, const RestWanted& wanted, const Exponent<S>& by_ts,
                         const HardExponent<S>& hard, const Exponent<S>& by_power) {
  typedef typename S::T T;
  constexpr int N = VectorOf<S>::kColumns;
  T x[N], e[N], term[N];
  load_logits<S, false>(view, start, classes, x);
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (listed >> k & 1u) x[k] = static_cast<T>(-kInf);
  const T top = largest_of<S>(x, own.max);
  if (top > own.max) own.raise(by_ts, hard, by_power, top);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    x[k] = x[k] - own.max;
    e[k] = by_ts(x[k]);
  }
  own.s = own.s + sum_of(e);
  if (wanted.hard) {
#pragma unroll
    for (int k = 0; k < N; ++k) term[k] = hard(e[k], x[k]);
    own.h = own.h + sum_of(term);
  }
  if (wanted.dots) {
#pragma unroll
    for (int k = 0; k < N; ++k) term[k] = e[k] == T(0) ? T(0) : e[k] * x[k];
    own.dot = own.dot + sum_of(term);
  }
  if (wanted.powers) {
#pragma unroll
    for (int k = 0; k < N; ++k) e[k] = by_power(x[k]);
    own.powers = own.powers + sum_of(e);
#pragma unroll
    for (int k = 0; k < N; ++k) term[k] = e[k] == T(0) ? T(0) : e[k] * x[k];
    own.power_dot = own.power_dot + sum_of(term);
  }
  if (wanted.spread) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const bool counts = start + k < classes && !(listed >> k & 1u);
      own.x = own.x + (counts ? x[k] : T(0));
      own.columns = own.columns + (counts ? T(1) : T(0));
    }
  }
}

// The exponentials of eight columns, relative to the maximum, of logits that nothing transforms.
template <Dtype kDtype>
struct PlainEight {
  static constexpr bool kFast = kDtype != Dtype::kFloat32;
  float d[8], e[8], h[8];

  MFD_DEVICE void take(const Packed<kDtype>& pack, float max, const Exponent<F32>& by_ts) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      d[k] = pack.value(k) - max;
      // The hardware's 2^z is 0 where Exponent's is.
      e[k] = kFast ? exp2_fast(d[k] * by_ts.c_hi) : by_ts.template of<false>(d[k]);
    }
  }
  // At temperature 1.
  MFD_DEVICE void take_hard(const HardExponent<F32>& hard) {
    if (hard.power == 2) {
#pragma unroll
      for (int k = 0; k < 8; ++k) h[k] = e[k] * e[k];
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k) h[k] = hard(e[k], d[k]);
    }
  }
};

// One pass over this thread's columns. kPlain: whole vectors of logits of kDtype that nothing transforms take
// the short road.
template <class S, bool kPlain, Dtype kDtype, class Group>
MFD_INLINE RestThread<S> rest_of_thread(const Group& group, const View& view, const Span& span,
                                        const uint32_t* bits, int64_t classes, const RestWanted& wanted,
                                        const Exponent<S>& by_ts, const HardExponent<S>& hard,
                                        const Exponent<S>& by_power) {
  constexpr int N = VectorOf<S>::kColumns;
  RestThread<S> own;
  const int64_t first = span.begin * N;
  over_vectors<S>(group, span, [&](int64_t start) {
    const uint32_t listed = listed_bits<S>(bits, start - first);
    if constexpr (kPlain) {
      if (start + N <= classes) {
        Packed<kDtype> pack = Packed<kDtype>::load(view.data + start * Packed<kDtype>::kBytes);
        if (listed) {
#pragma unroll
          for (int k = 0; k < N; ++k)
            if (listed >> k & 1u) pack.set_lowest(k);
        }
        Largest<kDtype> largest;
        largest.take(pack);
        const float top = largest.value();
        if (top > own.max) own.raise(by_ts, hard, by_power, top);
        PlainEight<kDtype> eight;
        eight.take(pack, own.max, by_ts);
        own.s = own.s + sum_of(eight.e);
        if (wanted.hard) {
          eight.take_hard(hard);
          own.h = own.h + sum_of(eight.h);
        }
        return;
      }
    }
    add_rest<S>(own, view, start, listed, classes, wanted, by_ts, hard, by_power);
  });
  return own;
}

// A thread's part of the rest's sums relative to `max`; sum_x relative to `over_all`.
template <class S>
MFD_INLINE RestSums rest_part(const RestThread<S>& own, double max, double over_all, const Exponent<S>& by_ts,
                              const HardExponent<S>& hard, const Exponent<S>& by_power) {
  typedef typename S::T T;
  const double d = static_cast<double>(own.max) - max;
  const T fd = static_cast<T>(d), e = by_ts(fd);
  const double w = static_cast<double>(e), wp = static_cast<double>(by_power(fd));
  const double s = static_cast<double>(own.s), powers = static_cast<double>(own.powers);
  RestSums part{};
  part.sum_s = w * s;
  part.sum_h = static_cast<double>(hard(e, fd)) * static_cast<double>(own.h);
  part.powers = wp * powers;
  part.dot_s = s == 0 ? 0.0 : w * (static_cast<double>(own.dot) + s * d);
  part.dot_powers = powers == 0 ? 0.0 : wp * (static_cast<double>(own.power_dot) + powers * d);
  if (own.columns != T(0))
    part.sum_x = static_cast<double>(own.x) +
                 static_cast<double>(own.columns) * (static_cast<double>(own.max) - over_all);
  return part;
}

// Computed here, once: the compiler would convert a double in each round of a loop.
template <class T>
MFD_DEVICE T narrowed(double x) {
  T y = static_cast<T>(x);
#if !defined(MFD_CUDA_EMULATOR)
  if constexpr (sizeof(T) == 4) asm volatile("" : "+f"(y));
#endif
  return y;
}

// Factors of the gradient of the classes that are not listed.
template <class S>
struct UnlistedSlopes {
  typedef typename S::T T;
  bool at_one, powers;
  T max, soft, power, h, shift, share;

  template <class Row>
  MFD_DEVICE explicit UnlistedSlopes(const Row& row)
      : at_one(row.has_exponentials_at_one()), powers(row.has_powers()) {
    const AllClasses& all = row.state->all;
    const TopKSlopes& slopes = row.state->slopes;
    const double below = all.rest.max - all.max;
    max = narrowed<T>(all.rest.max);
    soft = narrowed<T>(slopes.rest);
    power = narrowed<T>(powers ? -slopes.powers * exp(below * row.degree / row.ts) : 0.0);
    h = narrowed<T>(at_one ? slopes.at_one * row.state->h_scale * exp(below) : 0.0);
    shift = narrowed<T>(slopes.shift);
    share = narrowed<T>(row.state->share);
  }
};

// The gradient of the classes that are not listed: this thread's part of its sum with standardised logits, or
// into memory. kPlain: whole vectors, as rest_of_thread has them, into aligned memory; there the listed
// classes get something too, and write_listed writes over it.
template <class S, bool kPlain, Dtype kDtype, class Row>
MFD_INLINE double unlisted_gradient(const Row& row, bool writes, double dot) {
  typedef typename S::T T;
  constexpr int N = VectorOf<S>::kColumns;
  const RowProblem& p = row.p;
  const UnlistedSlopes<S> slopes(row);
  const int64_t own = row.use_hard && !row.is_decoupling() ? row.label : -1, width = p.student.width;
  unsigned char* out = row.student_gradient();
  const bool wide = sizeof(T) == 4 && is_aligned(out), reads = row.reads_row(),
             renormalized = row.is_renormalized();
  double sum = 0;
  over_vectors<S>(row.group, row.span, [&](int64_t start) {
    if constexpr (kPlain) {
      if (start + N <= p.classes) {
        typedef Packed<kDtype> Pack;
        PlainEight<kDtype> eight;
        eight.take(Pack::load(row.x.data + start * Pack::kBytes), slopes.max, row.by_ts);
        float gradient[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) gradient[k] = eight.e[k] * slopes.soft;
        if (slopes.at_one) {
          eight.take_hard(row.hard);
#pragma unroll
          for (int k = 0; k < 8; ++k) gradient[k] = fmaf(eight.h[k], slopes.h, gradient[k]) - slopes.shift;
          if (static_cast<uint64_t>(own - start) < N) {
#pragma unroll
            for (int k = 0; k < 8; ++k)
              if (start + k == own)
                gradient[k] = fmaf(eight.h[k], slopes.h, eight.e[k] * slopes.soft) - slopes.share;
          }
        }
        Pack::of(gradient).store_once(out + start * Pack::kBytes);
        return;
      }
    }
    T a[N], gradient[N] = {};
    if (reads) {
      const uint32_t marked = listed_bits<S>(row.bits, start - row.first);
      load_logits<S, false>(row.x, start, p.classes, a);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const bool counts = start + k < p.classes && !(marked >> k & 1u);
        const T t = counts ? a[k] - slopes.max : static_cast<T>(-kInf), e = row.by_ts(t);
        if (!renormalized) gradient[k] = e * slopes.soft;
        if (slopes.powers) gradient[k] = gradient[k] + row.by_power(t) * slopes.power;
        if (slopes.at_one) gradient[k] = S::fma(row.hard(e, t), slopes.h, gradient[k]);
        gradient[k] = gradient[k] - (start + k == own ? slopes.share : slopes.shift);
        if (!counts) gradient[k] = T(0);
        if (!writes && gradient[k] != T(0)) sum += static_cast<double>(gradient[k] * a[k]);
        if (counts && changes_gradient(p.student))
          gradient[k] = raw_gradient<S>(row.x, gradient[k], a[k], dot);
      }
    }
    if (writes) store_gradient<S>(out, p.student.dtype, start, width, wide, gradient);
  });
  return sum;
}

}  // namespace device
}  // namespace mfd
