// The pointwise divergences, sum f(q, p), each as a functor of one vector of classes:
//   value = f,  g = q*df/dq,  h = p*df/dp,
// where a multiple of q - p may be added to f, a constant to df/dq and one to df/dp: sum f and the gradients
// do not notice. The constants make both derivatives 0 at p = q, so that nothing cancels near it, and the
// logarithms come from r = log p - log q, which the caller takes from the logits.
// At p = q the slopes of the skew divergences that go with p/m (or q/m) come from two that cancel; where p is
// `far` from q they must not: 1 - p/m would round a small p/m away, and they are taken without the constant.
// Where q and p are 0 nothing (or 1e-34) comes of them, whatever r is. The gradients follow: dL/du = g -
// q*sum g, dL/dv = h - p*sum h.
#pragma once

#include "common/annotations.h"
#include "common/rows/row_math.h"

namespace mfd {

template <class S>
struct Point {
  typename S::V value, g, h;
};

// 0 where the probability is, whatever the factor.
template <class S>
MFD_INLINE typename S::V weighed(typename S::V probability, typename S::V factor) {
  return S::select(probability == typename S::V{}, typename S::V{}, probability * factor);
}

// f = p*r + q - p
template <class S>
struct ForwardKL {
  typedef typename S::V V;
  static constexpr bool kTakesLogs = false;
  MFD_MEMBER ForwardKL(double, double) {}
  MFD_MEMBER Point<S> operator()(V q, V p, V r, V, V) const {
    const V h = weighed<S>(p, r);
    return {h, q - p, h};
  }
};

// f = -q*r, df/dp = 1 - q/p
template <class S>
struct ReverseKL {
  typedef typename S::V V;
  static constexpr bool kTakesLogs = false;
  MFD_MEMBER ReverseKL(double, double) {}
  MFD_MEMBER Point<S> operator()(V q, V p, V r, V, V) const {
    const V g = -weighed<S>(q, r);
    return {g, g, p - q};
  }
};

// Divergences from the mean m = wp*p + wq*q, wp + wq = 1: log(side/m) = log(1 + of_side*(p - q)/m) of one
// side, whose logarithm differs by +-r from the other's.
template <class S>
struct OfMean {
  typedef typename S::V V;
  typedef typename S::T T;
  static constexpr bool kTakesLogs = false;
  V wq, wp, of_side, of_other;
  MFD_MEMBER OfMean(double share, bool of_p)
      : wq(S::splat(static_cast<T>(1 - share))),
        wp(S::splat(static_cast<T>(share))),
        of_side(S::splat(static_cast<T>(of_p ? 1 - share : -share))),
        of_other(S::splat(static_cast<T>(of_p ? -share : 1 - share))) {}

  // 1/m. The least normal number spares every case of 0.
  MFD_MEMBER V inverse_of(V q, V p) const {
    return S::splat(T(1)) / S::fma(q, wq, S::fma(p, wp, S::splat(S::kLeast)));
  }

  struct LogPair {
    V of_side, of_other;
  };

  // log(side/m) and log(other/m) for x = (p - q)/m and r = log(side/other), of which 1e4 is as good as more.
  // A side that is small beside m would lose its digits in 1 + of_side*x: there the other comes first.
  MFD_MEMBER LogPair logs_over_mean(V x, V r) const {
    const V first = of_side * x, half = S::splat(T(-0.5)), bound = S::splat(T(1e4));
    const V log_first = S::log1p_above(S::select(half < first, first, of_other * x));
    r = S::min(S::max(r, -bound), bound);
    const V step = S::select(half < first, V{}, r);
    return {log_first + step, log_first + (step - r)};
  }
};

// m = (1 - beta)*q + beta*p, f = beta*p*log(p/m) + (1 - beta)*q*log(q/m), from the heavier side
template <class S>
struct JSD : OfMean<S> {
  typedef typename S::V V;
  typedef typename S::T T;
  static constexpr T kNear = static_cast<T>(sizeof(T) == 4 ? 0.125 : 0.001);
  bool of_p;
  MFD_MEMBER JSD(double beta, double) : OfMean<S>(beta, beta > 0.5), of_p(beta > 0.5) {}
  MFD_MEMBER Point<S> operator()(V q, V p, V r, V, V) const {
    // Near p = q, p - q = q*(exp(r) - 1): the rounding of p and q must not come between it and r.
    const V difference = S::select(S::max(r, -r) < S::splat(kNear), q * rise(r), p - q);
    const auto logs = this->logs_over_mean(difference * this->inverse_of(q, p), of_p ? r : -r);
    const V log_pm = of_p ? logs.of_side : logs.of_other, log_qm = of_p ? logs.of_other : logs.of_side;
    const V g = this->wq * q * log_qm, h = this->wp * p * log_pm;
    return {g + h, g, h};
  }

  // exp(r) - 1 of a small r.
  MFD_MEMBER static V rise(V r) {
    const V fifth = S::splat(T(1.0 / 120)), fourth = S::splat(T(1.0 / 24)), third = S::splat(T(1.0 / 6));
    const V series = S::fma(S::fma(S::fma(fifth, r, fourth), r, third), r, S::splat(T(0.5)));
    return S::fma(r * r, series, r);
  }
};

// m = lam*p + (1 - lam)*q, f = p*log(p/m) - p + m, df/dq = (1 - lam) - (1 - lam)*p/m, the constant not if
// far, df/dp = log(p/m) - lam*p/m + lam
template <class S>
struct SkewKL : OfMean<S> {
  typedef typename S::V V;
  bool far;
  MFD_MEMBER SkewKL(double lam, bool is_far) : OfMean<S>(lam, true), far(is_far) {}
  MFD_MEMBER Point<S> operator()(V q, V p, V r, V, V) const {
    const V inverse = this->inverse_of(q, p), difference = q - p, x = difference * inverse;
    const V log_pm = this->logs_over_mean(-x, r).of_side, tilt = this->wq * x;
    return {S::fma(p, log_pm, this->wq * difference), this->wq * q * (far ? -(p * inverse) : tilt),
            p * S::fma(this->wp, tilt, log_pm)};
  }
};

// The same with p and q exchanged: m = (1 - lam)*p + lam*q, f = q*log(q/m) - q + m
template <class S>
struct SkewReverseKL : OfMean<S> {
  typedef typename S::V V;
  bool far;
  MFD_MEMBER SkewReverseKL(double lam, bool is_far) : OfMean<S>(1 - lam, false), far(is_far) {}
  MFD_MEMBER Point<S> operator()(V q, V p, V r, V, V) const {
    const V inverse = this->inverse_of(q, p), difference = p - q, x = difference * inverse;
    const V log_qm = this->logs_over_mean(x, -r).of_side, tilt = this->wp * x;
    return {S::fma(q, log_qm, this->wp * difference), q * S::fma(this->wq, tilt, log_qm),
            this->wp * p * (far ? -(q * inverse) : tilt)};
  }
};

// f = |p - q|/2; the sign is that of r, which has no rounding of its own where p = q; 0 at a tie
template <class S>
struct TVD {
  typedef typename S::V V;
  static constexpr bool kTakesLogs = false;
  MFD_MEMBER TVD(double, double) {}
  MFD_MEMBER Point<S> operator()(V q, V p, V r, V, V) const {
    const V half = S::splat(typename S::T(0.5)), difference = p - q;
    const V sign = S::select(r > V{}, half, S::select(r < V{}, -half, V{}));
    return {half * S::select(difference < V{}, -difference, difference), -sign * q, sign * p};
  }
};

// f = -(p^a q^b - a/s p^s - b/s q^s)/(a*b), s = a + b: homogeneous of degree s, so that s*f = g + h, with
//   g = (q^s - p^a q^b)/a,  h = (p^s - p^a q^b)/b.
// With n_x = expm1(-|x*r|)/|x| (its limit -|r| for x = 0) and the greater power of each difference:
//   p above: h = -max(p^s, p^a q^b)*n_b, g = max(p^a q^b, q^s)*n_a;  q above: the same with p and q
//   exchanged.
// s = 0: f = (expm1(a*r) - a*r)/a^2, and r^2/2 for a = b = 0. Cichocki, Cruces, Amari: Generalized Alpha-Beta
// Divergences, Entropy 13 (2011) 134.
// Degree 1 needs no powers. Without an exponent below 0 p above makes p^s the greatest power, and p^a q^b =
// p^s*e^(-b*r); with positive ones no infinities come of finite logits.
enum class Signs { kPositive, kNotNegative, kAny };  // of the exponents; a positive degree but of kAny

template <class S, bool kDegreeOne, Signs kSigns>
struct AlphaBeta {
  typedef typename S::V V;
  typedef typename S::T T;
  static constexpr bool kTakesLogs = !kDegreeOne, kPositive = kSigns == Signs::kPositive;
  double alpha, beta;
  MFD_MEMBER AlphaBeta(double a, double b) : alpha(a), beta(b) {}

  static MFD_MEMBER double size(double x) { return x < 0 ? -x : x; }
  // expm1(-|x*r|)
  static MFD_MEMBER V fall(double x, V magnitude) {
    return S::expm1_below(magnitude * S::splat(static_cast<T>(-size(x))));
  }
  // n_x
  static MFD_MEMBER V quotient(double x, V magnitude, V fallen) {
    return !kPositive && x == 0 ? -magnitude : fallen * S::splat(static_cast<T>(1 / size(x)));
  }

  // What n_a and n_b are multiplied with: on the side that is above, and on the other.
  struct Powers {
    V above, below;
  };

  // With an exponent below 0 another power may be the greatest, and e^(-b*r) may overflow where p^a q^b does
  // not: each is the exponential of its whole exponent. Close ones share a rounding: g + h would show two.
  template <class Mask>
  MFD_MEMBER Powers powers(Mask teacher_above, V magnitude, V log_q, V log_p) const {
    const double degree = alpha + beta;
    const V a = S::splat(static_cast<T>(alpha)), b = S::splat(static_cast<T>(beta));
    const V one = S::splat(T(1)), s = S::splat(static_cast<T>(degree));
    const bool both = alpha < 0 && beta < 0;
    const V exponent = both ? S::fma(a, log_p, b * log_q) : S::max(log_p, log_q) * s;
    const V power = degree == 0 ? one : S::exp_of(exponent);
    const V change = magnitude * (both ? S::select(teacher_above, -a, -b)
                                       : S::select(teacher_above, alpha < 0 ? -s : -b, beta < 0 ? -s : -a));
    const auto close = S::max(change, -change) < one;
    const V e = alpha == 0 && beta == 0 ? one : S::exp_of(S::select(close, change, exponent + change));
    const V below = S::select(close, power * e, e);
    const V teachers = both || beta >= 0 ? power : below, students = both || alpha >= 0 ? power : below;
    return {S::select(teacher_above, teachers, students), below};
  }

  MFD_MEMBER Point<S> operator()(V q, V p, V r, V log_q, V log_p) const {
    const double degree = alpha + beta;
    const auto teacher_above = r > V{};
    const V magnitude = S::select(teacher_above, r, -r), infinity = S::splat(static_cast<T>(kInf));
    const V fall_a = !kPositive && alpha == 0 ? V{} : fall(alpha, magnitude);
    const V fall_b = !kPositive && beta == 0     ? V{}
                     : size(beta) == size(alpha) ? fall_a
                                                 : fall(beta, magnitude);
    const V n_a = quotient(alpha, magnitude, fall_a), n_b = quotient(beta, magnitude, fall_b);
    Powers power;
    if (kSigns != Signs::kAny) {
      const V greatest = S::max(p, q), log = S::max(log_p, log_q);
      power.above = kDegreeOne ? greatest : S::exp_of(log * S::splat(static_cast<T>(degree)));
      power.below = power.above * (S::splat(T(1)) + S::select(teacher_above, fall_b, fall_a));
    } else {
      power = powers(teacher_above, magnitude, log_q, log_p);
    }
    const V greater = -power.above * S::select(teacher_above, n_b, n_a);
    const V lesser = weighed<S>(power.below, S::select(teacher_above, n_a, n_b));
    const V g = S::select(teacher_above, lesser, greater), h = S::select(teacher_above, greater, lesser);
    V value;
    if (kSigns != Signs::kAny || degree != 0) {
      value = (g + h) * S::splat(static_cast<T>(1 / degree));
    } else if (alpha != 0) {
      value = (h - r) * S::splat(static_cast<T>(1 / alpha));
    } else {
      value = r * r * S::splat(T(0.5));
    }
    if (kSigns == Signs::kAny) value = S::select(power.below == infinity, infinity, value);
    if (!kPositive) {  // one logit -inf
      value = S::select(r == -infinity, alpha > 0 && degree > 0 ? value : infinity, value);
      value = S::select(r == infinity, beta > 0 && degree > 0 ? value : infinity, value);
    }
    // Both logits -inf, or past the end of the row.
    const auto absent = ((q == V{}) & (p == V{})) & (r != r);
    return {S::select(absent, V{}, value), S::select(absent, V{}, g), S::select(absent, V{}, h)};
  }
};

template <class S, class Act>
MFD_INLINE void with_alpha_beta(double alpha, double beta, const Act& act) {
  const double degree = alpha + beta;
  if (!(alpha >= 0 && beta >= 0 && degree > 0)) return act(AlphaBeta<S, false, Signs::kAny>(alpha, beta));
  if (alpha == 0 || beta == 0) return act(AlphaBeta<S, false, Signs::kNotNegative>(alpha, beta));
  if (degree == 1.0) return act(AlphaBeta<S, true, Signs::kPositive>(alpha, beta));
  return act(AlphaBeta<S, false, Signs::kPositive>(alpha, beta));
}

// Calls act with the functor of a pointwise divergence; `far`: see above.
template <class S, class Act>
MFD_INLINE void with_divergence(const RowProblem& p, bool far, const Act& act) {
  switch (p.divergence) {
    case Divergence::kReverseKL:
      return act(ReverseKL<S>(p.first, p.second));
    case Divergence::kJSD:
      return act(JSD<S>(p.first, p.second));
    case Divergence::kSkewKL:
      return act(SkewKL<S>(p.first, far));
    case Divergence::kSkewReverseKL:
      return act(SkewReverseKL<S>(p.first, far));
    case Divergence::kTVD:
      return act(TVD<S>(p.first, p.second));
    case Divergence::kAlphaBeta:
      return with_alpha_beta<S>(p.first, p.second, act);
    default:  // one-pass without a mixture of teachers
      return act(ForwardKL<S>(p.first, p.second));
  }
}

}  // namespace mfd
