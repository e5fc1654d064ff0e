// The pointwise divergences, sum f(q, p), each as a functor of one vector of classes:
//   value = f,  g = q*df/dq,  h = p*df/dp,
// where a multiple of q - p may be added to f, a constant to df/dq and one to df/dp: sum f and the gradients
// do not notice. The constants make both derivatives 0 at p = q, so that nothing cancels near it, and the
// logarithms come from r = log p - log q, which the caller takes from the logits.
// Where q and p are 0 nothing (or 1e-34) comes of them, whatever r is. The gradients follow: dL/du = g -
// q*sum g, dL/dv = h - p*sum h.

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

// Where p, q and their mean m = wp*p + wq*q, wp + wq = 1, lie: with the greater side b, log(b/m) in [0, -log
// w] keeps its digits near p = q, and the lesser side's logarithm differs by |r|. The least normal number
// beside wp*p and wq*q spares every case of 0: it weighs nothing against the largest |r| let through.
template <class S>
struct MeanOf {
  typedef typename S::V V;
  typedef typename S::T T;
  V log_pm, log_qm;    // log(p/m), log(q/m)
  V student, teacher;  // wq*q, wp*p
  V inverse;           // 1/m

  MFD_MEMBER MeanOf(V q, V p, V r, V wq, V wp) {
    const V zero{}, bound = S::splat(T(1e4)), least = S::splat(S::kLeast);
    student = S::fma(q, wq, least);
    teacher = S::fma(p, wp, least);
    inverse = S::splat(T(1)) / (student + teacher);
    const V log_bm = log_of(S::max(q, p) * inverse);
    log_qm = log_bm - S::min(bound, S::max(r, zero));
    log_pm = log_bm + S::max(-bound, S::min(r, zero));
  }
};

// m = (1 - beta)*q + beta*p, f = beta*p*log(p/m) + (1 - beta)*q*log(q/m)
template <class S>
struct JSD {
  typedef typename S::V V;
  static constexpr bool kTakesLogs = false;
  V wq, wp;
  MFD_MEMBER JSD(double beta, double)
      : wq(S::splat(static_cast<typename S::T>(1 - beta))), wp(S::splat(static_cast<typename S::T>(beta))) {}
  MFD_MEMBER Point<S> operator()(V q, V p, V r, V, V) const {
    const MeanOf<S> m(q, p, r, wq, wp);
    const V g = weighed<S>(q, wq * m.log_qm), h = weighed<S>(p, wp * m.log_pm);
    return {g + h, g, h};
  }
};

// m = lam*p + (1 - lam)*q, f = p*log(p/m) - p + m, df/dq = (1 - lam) - (1 - lam)*p/m,
// df/dp = log(p/m) - lam*p/m + lam
template <class S>
struct SkewKL {
  typedef typename S::V V;
  static constexpr bool kTakesLogs = false;
  V wq, wp;
  MFD_MEMBER SkewKL(double lam, double)
      : wq(S::splat(static_cast<typename S::T>(1 - lam))), wp(S::splat(static_cast<typename S::T>(lam))) {}
  MFD_MEMBER Point<S> operator()(V q, V p, V r, V, V) const {
    const MeanOf<S> m(q, p, r, wq, wp);
    const V difference = wq * (q - p), tilt = difference * m.inverse;
    return {S::fma(p, m.log_pm, difference), m.student * tilt, p * S::fma(wp, tilt, m.log_pm)};
  }
};

// The same with p and q exchanged: m = (1 - lam)*p + lam*q, f = q*log(q/m) - q + m
template <class S>
struct SkewReverseKL {
  typedef typename S::V V;
  static constexpr bool kTakesLogs = false;
  V wq, wp;
  MFD_MEMBER SkewReverseKL(double lam, double)
      : wq(S::splat(static_cast<typename S::T>(lam))), wp(S::splat(static_cast<typename S::T>(1 - lam))) {}
  MFD_MEMBER Point<S> operator()(V q, V p, V r, V, V) const {
    const MeanOf<S> m(q, p, r, wq, wp);
    const V difference = wp * (p - q), tilt = difference * m.inverse;
    return {S::fma(q, m.log_qm, difference), q * S::fma(wq, tilt, m.log_qm), m.teacher * tilt};
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
//   g = (q^s - p^a q^b)/a = -q^s expm1(a*r)/a,  h = (p^s - p^a q^b)/b = -p^s expm1(-b*r)/b.
// From the greater of p and q, so that nothing overflows for a, b > 0. Limits: a = 0: g = -q^s r; b = 0: h =
// p^s r; s = 0: f = (expm1(a*r) - a*r)/a^2, and r^2/2 for a = b = 0. Cichocki, Cruces, Amari: Generalized
// Alpha-Beta Divergences, Entropy 13 (2011) 134.
// Degree 1 needs no powers.
template <class S, bool kDegreeOne>
struct AlphaBeta {
  typedef typename S::V V;
  typedef typename S::T T;
  static constexpr bool kTakesLogs = !kDegreeOne;
  double alpha, beta;
  MFD_MEMBER AlphaBeta(double a, double b) : alpha(a), beta(b) {}

  // p^s with its logarithm at hand.
  MFD_MEMBER V raised(V probability, V logarithm) const {
    const double degree = alpha + beta;
    if (kDegreeOne) return probability;
    if (degree == 0.0) return S::splat(T(1));
    return exp_of(logarithm * S::splat(static_cast<T>(degree)));
  }

  MFD_MEMBER Point<S> operator()(V q, V p, V r, V log_q, V log_p) const {
    const double degree = alpha + beta;
    const V a = S::splat(static_cast<T>(alpha)), b = S::splat(static_cast<T>(beta));
    const V qs = raised(q, log_q), ps = raised(p, log_p);
    const auto teacher_above = r > V{};
    const V to_student = -b * r, to_teacher = a * r;
    // From the greater side: p^a q^b = big^s*(1 + e); the lesser side's own expm1 only where nothing
    // overflows.
    const V e = expm1_of(S::select(teacher_above, to_student, to_teacher));
    const auto near = (r < S::splat(T(1))) & (r > S::splat(T(-1)));
    const V lesser = S::select(near, S::select(teacher_above, to_teacher, to_student), V{});
    const V greater_power = S::select(teacher_above, ps, qs), lesser_power = S::select(teacher_above, qs, ps);
    const V greater = -(greater_power * e);
    const V other = S::select(near, -(lesser_power * expm1_of(lesser)),
                              lesser_power - (greater_power + greater_power * e));
    V g = S::select(teacher_above, other, greater) * S::splat(static_cast<T>(1 / alpha));
    V h = S::select(teacher_above, greater, other) * S::splat(static_cast<T>(1 / beta));
    if (alpha == 0) g = -weighed<S>(qs, r);
    if (beta == 0) h = weighed<S>(ps, r);
    V value;
    if (degree != 0) {
      value = (g + h) * S::splat(static_cast<T>(1 / degree));
    } else if (alpha != 0) {
      value = (h - r) * S::splat(static_cast<T>(1 / alpha));
    } else {
      value = r * r * S::splat(T(0.5));
    }
    // p^a q^b overflows, of exponents of opposite signs; one logit -inf.
    const V infinity = S::splat(static_cast<T>(kInf));
    value = S::select(e == infinity, infinity, value);
    value = S::select(r == -infinity, alpha > 0 && degree > 0 ? value : infinity, value);
    value = S::select(r == infinity, beta > 0 && degree > 0 ? value : infinity, value);
    // Both logits -inf, or past the end of the row.
    const auto absent = ((q == V{}) & (p == V{})) & (r != r);
    return {S::select(absent, V{}, value), S::select(absent, V{}, g), S::select(absent, V{}, h)};
  }
};

// Calls act with the functor of a pointwise divergence.
template <class S, class Act>
MFD_INLINE void with_divergence(const Problem& p, const Act& act) {
  switch (p.divergence) {
    case Divergence::kReverseKL:
      return act(ReverseKL<S>(p.first, p.second));
    case Divergence::kJSD:
      return act(JSD<S>(p.first, p.second));
    case Divergence::kSkewKL:
      return act(SkewKL<S>(p.first, p.second));
    case Divergence::kSkewReverseKL:
      return act(SkewReverseKL<S>(p.first, p.second));
    case Divergence::kTVD:
      return act(TVD<S>(p.first, p.second));
    case Divergence::kAlphaBeta:
      if (p.first + p.second == 1.0) return act(AlphaBeta<S, true>(p.first, p.second));
      return act(AlphaBeta<S, false>(p.first, p.second));
    default:  // one-pass without a mixture of teachers
      return act(ForwardKL<S>(p.first, p.second));
  }
}
