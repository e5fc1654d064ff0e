// Slopes of the soft term to u = x/Ts and v = y/Tt at a vector of classes.

template <class S>
struct SlopePair {
  typename S::V to_u, to_v;
};

// Of forward KL, DKD and NKD; see LinearSlopes.
template <class S>
struct LinearSlope {
  typedef typename S::V V;
  typedef typename S::T T;
  V teacher, extra, relation, mean, pull, zero;
  bool exact;  // DKD

  MFD_MEMBER explicit LinearSlope(const LinearSlopes& s)
      : teacher(S::splat(static_cast<T>(s.teacher))),
        extra(S::splat(static_cast<T>(s.student - s.teacher))),
        relation(S::splat(static_cast<T>(s.relation))),
        mean(S::splat(static_cast<T>(s.mean))),
        pull(S::splat(static_cast<T>(s.pull))),
        zero(S::splat(static_cast<T>(s.mean != s.mean || s.pull != s.pull ? kNan : 0.0))),
        exact(s.student != s.teacher) {}

  // DKD as teacher*(q - p) + (student - teacher)*q, q - p = -q*expm1(r) where the teacher is near: beta
  // magnifies what the two exponentials round away.
  MFD_MEMBER SlopePair<S> operator()(V q, V p, V r, V t) const {
    V difference = q - p;
    if (exact) {
      const V half = S::splat(T(0.5));
      const auto near = (r < half) & (r > -half);
      difference = S::select(near, -(q * expm1_of(S::select(near, r, V{}))), difference);
    }
    return {S::fma(extra, q, teacher * difference),
            S::select(p == V{}, zero, p * (weighed<S>(relation, t - mean) + pull))};
  }
};
