// Gradients of one row to several teachers. With b = dD/d(log p), which sums to 0:
//   dD/dv_k = w_k*((p_k/p)*b - p_k*S_k),  S_k = sum (p_k/p)*b = dD/dw_k up to a constant, which weights that
//   sum to 1 do not notice.

// Calls act(log p_k, share, i) for every vector of a block; lanes past the end are 0.
template <class S, class Act>
MFD_INLINE void over_shares(const TeacherRow& t, double temperature, const typename S::T* y,
                            const typename S::T* log_p, const typename S::T* b, int64_t n, const Act& act) {
  typedef typename S::T T;
  const LogOf<S> log_of_y = log_of_teacher<S>(t, temperature);
  for (int64_t i = 0; i < n; i += S::kWidth) {
    const int64_t left = n - i < S::kWidth ? n - i : S::kWidth;
    const typename S::V log_pk = log_of_y(S::load_first(y + i, left, static_cast<T>(-kInf)));
    act(log_pk, share_of<S>(log_pk, S::load_first(log_p + i, left, T(0)), S::load(b + i)), i);
  }
}

// dD/dp of a pointwise divergence at r = log p - log q, of which neither need be representable.
static double slope_of_p(const Problem& problem, bool far, double r, double log_p) {
  const double first = problem.first, second = problem.second;
  // log(p/m), m = share*p + (1 - share)*q
  const auto over_mean = [r](double share) {
    return r < 0 ? r - log1p(share * expm1(r)) : -log1p((1 - share) * expm1(-r));
  };
  switch (problem.divergence) {
    case Divergence::kReverseKL:
      return -expm1(-r);
    case Divergence::kJSD:
      return first * over_mean(first);
    case Divergence::kSkewKL:
      return over_mean(first) - first * expm1(over_mean(first));
    case Divergence::kSkewReverseKL: {
      const double log_qm = over_mean(1 - first) - r;
      return (first - 1) * (far ? exp(log_qm) : expm1(log_qm));
    }
    case Divergence::kTVD:
      return r > 0 ? 0.5 : r < 0 ? -0.5 : r;
    case Divergence::kAlphaBeta:
      return exp((first + second - 1) * log_p) * (second == 0 ? r : -expm1(-second * r) / second);
    default:
      return r;
  }
}

// S_k of a block for a teacher of weight 0, whose p_k/p has no bound: sum p_k*dD/dp in double precision. `x`:
// the student's logits, `log_p` the mixture's, `label`: of the class set apart, if the block holds it.
template <class S>
static double unheard_sum(const BackwardRow<S>& row, const TeacherRow& t, const typename S::T* x,
                          const typename S::T* y, const typename S::T* log_p, int64_t n, int64_t label) {
  const Problem& problem = row.g.problem;
  const LinearSlopes linear = row_linear_slopes(row, problem);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double log_pk = (static_cast<double>(y[i]) - t.max) / row.mix_t - t.lse, whole = log_p[i];
    if (log_pk == -kInf || whole == -kInf) continue;
    const Target& target = row.target;
    if (row.apart && i == label) {
      const double alpha = problem.divergence == Divergence::kDKD ? problem.first : 0.0;
      sum +=
          alpha * times(exp(log_pk) * target.teacher.rest, target.teacher.log_odds - target.student.log_odds);
      continue;
    }
    const double of_rest = row.max_t + row.lse_t;  // log of what the classes compared hold of p
    const double log_q = (static_cast<double>(x[i]) - row.max_s) / row.ts - row.lse_s;
    const double r = whole - of_rest - log_q;
    double slope;
    if (is_pointwise(problem.divergence)) {
      slope = slope_of_p(problem, row.far, r, whole - of_rest) - row.mean_h;
    } else {
      slope = times(linear.relation, (linear.of_student ? -log_q : r) - linear.mean) + linear.pull;
    }
    sum += times(exp(log_pk - of_rest), slope);
  }
  return sum;
}

template <class S>
static double share_sum(const TeacherRow& t, double temperature, const typename S::T* y,
                        const typename S::T* log_p, const typename S::T* b, int64_t n) {
  typename S::V sum{};
  over_shares<S>(t, temperature, y, log_p, b, n,
                 [&](typename S::V, typename S::V share, int64_t) { sum = sum + share; });
  return S::sum(sum);
}

// dD/dv_k of a block.
template <class S>
static void teacher_slopes(const TeacherRow& t, double temperature, const typename S::T* y,
                           const typename S::T* log_p, const typename S::T* b, int64_t n,
                           typename S::T* out) {
  typedef typename S::T T;
  typedef typename S::V V;
  if (t.weight == 0) {
    for (int64_t i = 0; i < n; i += S::kWidth) S::store(out + i, V{});
    return;
  }
  const V weight = S::splat(static_cast<T>(t.weight)), total = S::splat(static_cast<T>(t.share));
  over_shares<S>(t, temperature, y, log_p, b, n, [&](V log_pk, V share, int64_t i) {
    S::store(out + i, weight * (share - exp_of(log_pk) * total));
  });
}
