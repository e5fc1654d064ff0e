// The soft term of a sparse teacher: its listed classes as vectors and the rest, one class, in double precision.
// What the rest contributes to a divergence that sums over its classes is that of one class of their mass wherever
// f(q, 0) is proportional to q.

// Values and slopes of the soft term, of the K listed classes in Listed's arrays. Maxima and sums are over the
// classes the tail leaves, without the label where the divergence sets it apart.
struct SoftTerm {
  double value;                        // what T^2 multiplies
  double max_s, sum_s, max_t, sum_t;   // with the rest
  double lse_s, lse_t;                 // 0 where the sum is
  double rest;                         // y of the rest: log(1 - sum of the listed); -inf for none
  double q, p, log_q, log_p;           // of the rest
  double mean_g, mean_h;               // E_q[df/dq], E_p[df/dp]
  double rest_u, rest_v;               // dD/du and dD/dv of the rest
  double label_x, label_y;             // minus the maxima, where the label is apart
  double sum_h, sum_u;                 // at temperature 1, of NKD
  Target target;
  TargetSlopes slopes;
};

// log(1 - sum exp(y)) of log-probabilities; -inf where nothing is left.
template <class S>
static double log_of_rest(const typename S::T* y, int64_t n) {
  double left = 1;
  for (int64_t k = 0; k < n; ++k) left -= ::exp(static_cast<double>(y[k]));
  return left <= 0 ? -kInf : log(left);
}

// Copies the teacher's values; returns the value of the rest.
template <class S>
static double load_values(const TopKRow<S>& c) {
  typedef typename S::T T;
  const View view = {&c.p.teacher, row_offset(c.p.teacher, c.row), -1, {}};
  const T* y = load_block<S>(view, 0, c.listed.count, c.listed.y).x;
  if (y != c.listed.y) __builtin_memcpy(c.listed.y, y, static_cast<size_t>(c.listed.count) * sizeof(T));
  return c.pass.teacher.logprobs && !c.renormalized ? log_of_rest<S>(c.listed.y, c.listed.count) : -kInf;
}

// The largest of n values and, in the compute dtype, one more.
template <class S>
static double max_with(const typename S::T* x, int64_t n, double other) {
  const double largest = static_cast<double>(block_max<S>(x, n)), last = static_cast<typename S::T>(other);
  return last > largest ? last : largest;
}

// sum exp((y - max)/T) over the listed values and the rest.
template <class S>
static double teacher_sum(const TopKRow<S>& c, double max, double rest, double temperature) {
  const double listed = exponential_sum<S>(c.listed.y, c.listed.count, max, Exponent<S>(temperature));
  return rest == -kInf ? listed : listed + exp((rest - max) / temperature);
}

// How much of q - p the functors add to f beyond the sum's needs where p is no whole distribution, and minus the
// constant they add to df/dp.
MFD_INLINE double whole_shift(const Problem& p) {
  switch (p.divergence) {
    case Divergence::kForwardKL:
      return 1.0;
    case Divergence::kSkewKL:
      return 1.0 - p.first;
    case Divergence::kSkewReverseKL:
      return p.first - 1.0;
    default:
      return 0.0;
  }
}

// sum f and the two means of a sum over the classes; `rest_powers` is sum q^degree over the rest.
template <class S>
static void pointwise_value(const TopKRow<S>& c, double rest_powers, SoftTerm& s) {
  const Listed<S>& l = c.listed;
  const Problem& p = c.p;
  const bool whole = c.pass.teacher.tail != Tail::kZero, kl = !is_pointwise(p.divergence);
  BlockSums sums{};
  with_divergence<S>(p, [&](const auto& divergence) {
    if (divergence.kTakesLogs) {
      log_probabilities<S>(l.x, l.count, LogScale(s.max_s, s.max_s, c.ts, s.lse_s), l.to_u);
      log_probabilities<S>(l.y, l.count, LogScale(s.max_t, s.max_t, c.tt, s.lse_t), l.to_v);
    }
    block_points<S, false>(divergence, l.q, l.p, l.r, l.to_u, l.to_v, l.count, 1.0, 1.0, &sums);
  });
  Point<F64> rest{0.0, 0.0, 0.0};
  if (c.powers) {
    rest = {rest_powers / (p.first * c.degree()), rest_powers / p.first, 0.0};
  } else if (!c.renormalized) {
    const double seen = whole ? s.p : 0.0, log_seen = whole ? s.log_p : -kInf;
    with_divergence<F64>(p, [&](const auto& divergence) {
      rest = divergence(s.q, seen, log_seen - s.log_q, s.log_q, log_seen);
    });
  }
  if (!whole) {
    const double shift = whole_shift(p) * s.p;
    rest.h = -shift;
    rest.value -= shift;
  }
  s.mean_g = sums.g + rest.g;
  s.mean_h = sums.h + rest.h;
  s.value = sums.value + rest.value;
  // With q - p, which g is, rounding of the logarithms of the sums has no part in the value near p = q.
  if (kl) s.value += s.mean_g;
  if (s.value < 0 && (whole || p.divergence == Divergence::kAlphaBeta)) s.value = 0;
  if (s.value != s.value) s.mean_g = s.mean_h = kNan;
  s.rest_u = rest.g - s.q * s.mean_g;
  s.rest_v = rest.h - s.p * s.mean_h;
}

// Kullback-Leibler divergence or cross-entropy over the classes besides the label, and the pair's part.
template <class S>
static void target_value(const TopKRow<S>& c, SoftTerm& s) {
  const Listed<S>& l = c.listed;
  const double rest_term = c.unit ? -s.log_q : s.log_p - s.log_q;
  double value = 0;
  if (c.unit) {
    log_probabilities<S>(l.x, l.count, LogScale(s.max_s, s.max_s, c.ts, s.lse_s), l.r);
    value = -weighted_sum<S>(l.p, l.r, l.count, 0.0) + times(s.p, rest_term);
    s.mean_h = value;
  } else {
    value = weighted_sum<S>(l.p, l.r, l.count, 0.0) + times(s.p, rest_term);
    s.mean_h = value;
    value += plain_sum<S>(l.q, l.count) + s.q - (plain_sum<S>(l.p, l.count) + s.p);
    if (value < 0) value = 0;
  }
  if (s.sum_t == 0) {
    value = s.mean_h = 0;
  } else if (s.sum_s == 0) {
    value = s.mean_h = kInf;
  }
  s.target.student = log_odds(s.label_x, c.ts, log(s.sum_s));
  s.target.teacher = log_odds(s.label_y, c.tt, log(s.sum_t));
  if (c.unit) {
    s.target.hard_student = log_odds(s.label_x, 1.0, log(s.sum_h));
    s.target.hard_teacher = log_odds(s.label_y, 1.0, log(s.sum_u));
  }
  s.value = target_divergence(c.p, s.target, value);
  s.slopes = target_slopes(c.p, s.target);
  s.rest_u = s.slopes.student * s.q - s.slopes.teacher * s.p;
  s.rest_v = s.p == 0 ? 0.0 : s.p * (s.slopes.relation * (rest_term - s.mean_h) + s.slopes.pull);
}

// The whole soft term; `max` and `rest` are of the student's classes, and `label` is the logit of the one set apart.
template <class S>
static SoftTerm soft_term(const TopKRow<S>& c, double max, const RestSums& rest, double label) {
  typedef typename S::T T;
  const Listed<S>& l = c.listed;
  SoftTerm s{};
  s.rest = load_values<S>(c);
  s.max_s = c.renormalized ? static_cast<double>(block_max<S>(l.x, l.count)) : max;
  if (c.apart) {
    s.label_y = l.y[l.label];
    l.y[l.label] = static_cast<T>(-kInf);
  }
  s.max_t = max_with<S>(l.y, l.count, s.rest);
  const double beside = c.renormalized ? 0.0 : rest.sum_s;
  const Exponent<S> by_ts(c.ts), by_tt(c.tt);
  s.sum_s = beside + exponential_sum<S>(l.x, l.count, s.max_s, by_ts);
  s.sum_t = teacher_sum<S>(c, s.max_t, s.rest, c.tt);
  if (!c.apart) {
    if (s.sum_s == 0) s.sum_s = kNan;
    if (s.sum_t == 0) s.sum_t = kNan;
  }
  s.label_y -= s.max_t;
  s.lse_s = s.sum_s == 0 ? 0.0 : log(s.sum_s);
  s.lse_t = s.sum_t == 0 ? 0.0 : log(s.sum_t);
  probabilities<S>(l.x, l.count, s.max_s, s.lse_s, by_ts, l.q);
  probabilities<S>(l.y, l.count, s.max_t, s.lse_t, by_tt, l.p);
  log_ratios<S>(l.x, l.y, l.count, LogScale(s.max_s, s.max_s, c.ts, s.lse_s),
                LogScale(s.max_t, s.max_t, c.tt, s.lse_t), l.r);
  s.log_q = log(beside) - s.lse_s;
  s.log_p = (s.rest - s.max_t) / c.tt - s.lse_t;
  s.q = s.sum_s == 0 ? 0.0 : beside / s.sum_s;
  s.p = static_cast<T>(exp(s.log_p));
  if (!c.apart) {
    pointwise_value<S>(c, c.powers ? rest.powers * exp(-c.degree() * s.lse_s) : 0.0, s);
    return s;
  }
  if (c.unit) {
    const Exponent<S> at_one(1.0);
    s.sum_h = (c.renormalized ? 0.0 : rest.sum_h) + exponential_sum<S>(l.x, l.count, s.max_s, at_one);
    s.sum_u = teacher_sum<S>(c, s.max_t, s.rest, 1.0);
  }
  s.label_x = label - s.max_s;
  target_value<S>(c, s);
  return s;
}

// dD/du and dD/dv of the listed classes, to_u and to_v; the label set apart has 0 there.
template <class S>
static void listed_slopes(const TopKRow<S>& c, const SoftTerm& s) {
  const Listed<S>& l = c.listed;
  if (c.apart) {
    const TargetSlopes& t = s.slopes;
    linear_slopes<S>(l.q, l.p, l.r, c.unit, l.count, {t.student, t.teacher, t.relation, s.mean_h, t.pull}, l.to_u,
                     l.to_v);
    return;
  }
  with_divergence<S>(c.p, [&](const auto& divergence) {
    if (divergence.kTakesLogs) {
      log_probabilities<S>(l.x, l.count, LogScale(s.max_s, s.max_s, c.ts, s.lse_s), l.to_u);
      log_probabilities<S>(l.y, l.count, LogScale(s.max_t, s.max_t, c.tt, s.lse_t), l.to_v);
    }
    pointwise_slopes<S>(divergence, l.q, l.p, l.r, l.count, s.mean_g, s.mean_h, l.to_u, l.to_v, l.to_u, l.to_v);
  });
}
