// First pass over a row: each thread's sums over its columns, relative to the maxima it has met so far
// (online softmax, Milakov and Gimelshein, arXiv:1805.02867), then merged over the group.
#pragma once

#include "cuda/rows/rows.cuh"

namespace mfd {
namespace device {

// The exponentials of the hard term (temperature 1): the N-th power of those at temperature N = 1..4, or
// computed.
template <class S>
struct HardExponent {
  typedef typename S::T T;
  int power;  // 0: computed
  Exponent<S> exponent;

  MFD_DEVICE HardExponent(double temperature, bool fast)
      : power(temperature == 1.0   ? 1
              : temperature == 2.0 ? 2
              : temperature == 3.0 ? 3
              : temperature == 4.0 ? 4
                                   : 0),
        exponent(1.0, fast) {}
  // e = exp(t/T)
  MFD_DEVICE T operator()(T e, T t) const {
    if (power == 0) return exponent(t);
    T result = e;
    if (power >= 2) result = result * e;
    if (power >= 3) result = result * e;
    if (power >= 4) result = result * e;
    return result;
  }
};

template <class S>
struct Exponents {
  typedef typename S::T T;
  Exponent<S> student, teacher;
  HardExponent<S> hard, unit;  // of the student, of the teacher
  T ratio;                     // Ts/Tt; 0 where the cross-entropy is wanted instead of the divergence

  MFD_DEVICE Exponents(double ts, double tt, bool cross_entropy, bool fast)
      : student(ts, fast),
        teacher(tt, fast),
        hard(ts, fast),
        unit(tt, fast),
        ratio(static_cast<T>(cross_entropy ? 0.0 : ts / tt)) {}
};

// As BlockSums, of one thread.
template <class S>
struct ThreadSums {
  typedef typename S::T T;
  static constexpr int N = VectorOf<S>::kColumns;
  T max_s = S::kLowest, max_t = S::kLowest;
  T s = 0, t = 0, h = 0, u = 0, cross = 0, dot_s = 0, dot_t = 0, x = 0;
  T columns = 0;  // that `x` counts

  // Moves the references to larger maxima.
  MFD_DEVICE void raise(const Exponents<S>& e, T new_s, T new_t) {
    const T ds = max_s - new_s, dt = max_t - new_t;
    const T shift = S::fma(dt, e.ratio, -ds);
    if (ds < T(0)) {
      const T w = e.student(ds);
      dot_s = s == T(0) ? T(0) : w * S::fma(s, ds, dot_s);
      h = h * e.hard(w, ds);
      s = s * w;
      x = columns == T(0) ? T(0) : S::fma(columns, ds, x);
    }
    const T wt = dt < T(0) ? e.teacher(dt) : T(1);
    // Mass that has vanished contributes 0, whatever its student logits are.
    cross = t * wt == T(0) ? T(0) : wt * S::fma(t, shift, cross);
    if (dt < T(0)) {
      dot_t = t == T(0) ? T(0) : wt * S::fma(t, dt, dot_t);
      u = u * e.unit(wt, dt);
      t = t * wt;
    }
    max_s = new_s;
    max_t = new_t;
  }

  MFD_DEVICE void add_student(const Exponents<S>& e, const Wanted& wanted, const T (&logits)[N], T (&tx)[N]) {
    T es[N], own[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      tx[k] = logits[k] - max_s;
      es[k] = e.student(tx[k]);
    }
    s = s + sum_of(es);
    if (wanted.hard) {
#pragma unroll
      for (int k = 0; k < N; ++k) own[k] = e.hard(es[k], tx[k]);
      h = h + sum_of(own);
    }
    if (wanted.dot_s) {
#pragma unroll
      for (int k = 0; k < N; ++k) own[k] = es[k] == T(0) ? T(0) : es[k] * tx[k];
      dot_s = dot_s + sum_of(own);
    }
  }

  MFD_DEVICE void add_teacher(const Exponents<S>& e, const Wanted& wanted, const T (&logits)[N],
                              const T (&tx)[N]) {
    T et[N], own[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const T ty = logits[k] - max_t;
      et[k] = e.teacher(ty);
      // 0*log 0 = 0; the one rounding is exact where x is close to y and Ts = Tt.
      own[k] = e.teacher.vanishes(ty) ? T(0) : et[k] * S::fma(ty, e.ratio, -tx[k]);
    }
    t = t + sum_of(et);
    cross = cross + sum_of(own);
    if (wanted.unit) {
#pragma unroll
      for (int k = 0; k < N; ++k) own[k] = e.unit(et[k], logits[k] - max_t);
      u = u + sum_of(own);
    }
    if (wanted.dot_t) {
#pragma unroll
      for (int k = 0; k < N; ++k) own[k] = et[k] == T(0) ? T(0) : et[k] * (logits[k] - max_t);
      dot_t = dot_t + sum_of(own);
    }
  }

  // sum (x - max) of the columns from `start`, but for the excluded class.
  MFD_DEVICE void add_shifted(const T (&tx)[N], int64_t start, int64_t classes, int64_t decoupled) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const bool counts = start + k < classes && start + k != decoupled;
      x = x + (counts ? tx[k] : T(0));
      columns = columns + (counts ? T(1) : T(0));
    }
  }
};

// The row's sums from those of its threads, in double precision.
template <class S, bool kLean, class Group>
MFD_INLINE RowSums merge_threads(const Group& group, const ThreadSums<S>& own, const Exponents<S>& e,
                                 double ts, double tt, int64_t classes) {
  typedef typename S::T T;
  double maxima[2] = {static_cast<double>(own.max_s), static_cast<double>(own.max_t)};
  group.template reduce<Max>(maxima);
  const double ds = static_cast<double>(own.max_s) - maxima[0],
               dt = static_cast<double>(own.max_t) - maxima[1];
  const T fs = static_cast<T>(ds), ft = static_cast<T>(dt);
  const T es = e.student(fs), et = e.teacher(ft);
  const double ws = static_cast<double>(es), wt = static_cast<double>(et);
  const double s = static_cast<double>(own.s), t = static_cast<double>(own.t);
  const double shift = static_cast<double>(e.ratio) * dt - ds;
  double v[kLean ? 5 : 8];
  v[0] = ws * s;
  v[1] = wt * t;
  v[2] = own.t * et == T(0) ? 0.0 : wt * (static_cast<double>(own.cross) + t * shift);
  v[3] = static_cast<double>(e.hard(es, fs)) * static_cast<double>(own.h);
  v[4] = own.columns == T(0) ? 0.0 : static_cast<double>(own.x) + static_cast<double>(own.columns) * ds;
  if constexpr (!kLean) {
    v[5] = static_cast<double>(e.unit(et, ft)) * static_cast<double>(own.u);
    v[6] = s == 0 ? 0.0 : ws * (static_cast<double>(own.dot_s) + s * ds);
    v[7] = t == 0 ? 0.0 : wt * (static_cast<double>(own.dot_t) + t * dt);
  }
  group.template reduce<Sum>(v);
  RowSums row{};
  row.max_s = maxima[0];
  row.max_t = maxima[1];
  row.sum_s = v[0];
  row.sum_t = v[1];
  row.cross = v[2] / (ts * v[1]);
  row.sum_h = v[3];
  row.mean_x = v[4] / static_cast<double>(classes);
  if constexpr (!kLean) {
    row.sum_u = v[5];
    row.dot_s = v[6] / ts;
    row.dot_t = v[7] / tt;
  }
  return row;
}

}  // namespace device
}  // namespace mfd
