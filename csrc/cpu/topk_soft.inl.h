// The soft term of a sparse teacher: its listed classes as vectors and the rest, one class, in double
// precision. What the rest contributes to a divergence that sums over its classes is that of one class of
// their mass wherever f(q, 0) is proportional to q.

// Values and slopes of the soft term, of the K listed classes in Listed's arrays. Maxima and sums are over
// the classes the tail leaves, without the label where the divergence sets it apart.
struct SoftTerm {
  double value;                       // what T^2 multiplies
  double max_s, sum_s, max_t, sum_t;  // with the rest
  double lse_s, lse_t;                // 0 where the sum is
  double rest;                        // y of the rest: log(1 - sum of the listed); -inf for none
  double q, p, log_q, log_p;          // of the rest
  double rest_x;                      // its largest logit minus max_s
  bool far;                           // of a skew divergence; see with_divergence
  double mean_g, mean_h;              // E_q[df/dq], E_p[df/dp]
  double rest_u, rest_v;              // dD/du and dD/dv of the rest
  double label_x, label_y;            // minus the maxima, where the label is apart
  double sum_h, sum_u;                // at temperature 1, of NKD
  Target target;
  TargetSlopes slopes;
};

// log(1 - sum exp(y)) of log-probabilities; -inf where nothing is left.
template <class S>
static double log_of_rest(const typename S::T* y, int64_t n) {
  const double left = 1 - wide_exponential_sum(y, n);
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

// How much of q - p the functors add to f beyond the sum's needs where p is no whole distribution, and minus
// the constant they add to df/dp.
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

// Calls act with the listed logarithms, and whether those of both sides are near: a constant to the compiler.
template <class S, class Act>
MFD_INLINE void with_logs(const TopKRow<S>& c, const SoftTerm& s, const Act& act) {
  const Logs<S> logs(LogScale(s.max_s, s.max_s, c.ts, s.lse_s), LogScale(s.max_t, s.max_t, c.tt, s.lse_t));
  if (logs.close) {
    act(logs, std::true_type());
  } else {
    act(logs, std::false_type());
  }
}

// Sums of f, g and h over the listed classes.
template <class S, class D>
static Point<F64> points_of(const D& divergence, const TopKRow<S>& c, const SoftTerm& s) {
  typedef typename S::V V;
  const Listed<S>& l = c.listed;
  V value{}, g{}, h{};
  with_logs<S>(c, s, [&](const Logs<S>& logs, auto close) {
    over_vectors<S>(l.x, l.y, l.count, [&](V x, V y, int64_t i) {
      const Point<S> point =
          point_at<S, decltype(close)::value>(divergence, logs, x, y, S::load(l.q + i), S::load(l.p + i));
      value = value + point.value;
      g = g + point.g;
      h = h + point.h;
    });
  });
  return {S::sum(value), S::sum(g), S::sum(h)};
}

template <class S>
static Point<F64> listed_points(const TopKRow<S>& c, const SoftTerm& s) {
  Point<F64> sums{};
  with_divergence<S>(c.p, s.far, [&](const auto& divergence) { sums = points_of<S>(divergence, c, s); });
  return sums;
}

// As is_far; not of a p that is no whole distribution.
template <class S>
static bool is_far_teacher(const TopKRow<S>& c, const SoftTerm& s) {
  const Divergence d = c.p.divergence;
  if (c.pass.teacher.tail == Tail::kZero) return false;
  if (d != Divergence::kSkewKL && d != Divergence::kSkewReverseKL) return false;
  return points_of<S>(ForwardKL<S>(0, 0), c, s).value + times(s.p, s.log_p - s.log_q) >= 0.5;
}

// sum f and the two means of a sum over the classes; `rest_powers` is sum q^degree over the rest.
template <class S>
static void pointwise_value(const TopKRow<S>& c, double rest_powers, SoftTerm& s) {
  const Problem& p = c.p;
  const bool whole = c.pass.teacher.tail != Tail::kZero, kl = !is_pointwise(p.divergence);
  s.far = is_far_teacher<S>(c, s);
  const Point<F64> listed = listed_points<S>(c, s);
  Point<F64> rest{0.0, 0.0, 0.0};
  if (c.powers) {
    rest = {rest_powers / (p.first * c.degree()), rest_powers / p.first, 0.0};
  } else if (!c.renormalized) {
    const double seen = whole ? s.p : 0.0, log_seen = whole ? s.log_p : -kInf;
    with_divergence<F64>(p, s.far, [&](const auto& divergence) {
      rest = divergence(s.q, seen, log_seen - s.log_q, s.log_q, log_seen);
    });
  }
  if (!whole) {
    const double shift = whole_shift(p) * s.p;
    rest.h = -shift;
    rest.value -= shift;
  }
  s.mean_g = listed.g + rest.g;
  s.mean_h = listed.h + rest.h;
  s.value = listed.value + rest.value;
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
  const double value_of_rest = times(s.p, rest_term);
  double value;
  if (c.unit) {
    const LogOf<S> log_q(LogScale(s.max_s, s.max_s, c.ts, s.lse_s));
    typename S::V sum{};
    over_vectors<S>(l.x, l.x, l.count, [&](typename S::V x, typename S::V, int64_t i) {
      sum = sum - weighed<S>(S::load(l.p + i), log_q(x));
    });
    s.mean_h = value = S::sum(sum) + value_of_rest;
  } else {
    // The functor of the forward KL: value = h = p*r, g = q - p.
    const Point<F64> points = listed_points<S>(c, s);
    s.mean_h = points.h + value_of_rest;
    value = s.mean_h + points.g + (s.q - s.p);
    if (value < 0) value = 0;
  }
  if (s.sum_t == 0) {
    value = s.mean_h = 0;
  } else if (s.sum_s == 0) {
    value = s.mean_h = kInf;
  }
  s.target.student = odds_of(s.label_x, c.ts, log(s.sum_s));
  s.target.teacher = odds_of(s.label_y, c.tt, log(s.sum_t));
  if (c.unit) {
    s.target.hard_student = odds_of(s.label_x, 1.0, log(s.sum_h));
    s.target.hard_teacher = odds_of(s.label_y, 1.0, log(s.sum_u));
  }
  s.value = target_divergence(c.p, s.target, value);
  s.slopes = target_slopes(c.p, s.target);
  s.rest_u = s.slopes.student * s.q - s.slopes.teacher * s.p;
  s.rest_v = s.p == 0 ? 0.0 : s.p * (times(s.slopes.relation, rest_term - s.mean_h) + s.slopes.pull);
}

// The whole soft term; `max` and `rest` are of the student's classes, and `label` is the logit of the one set
// apart.
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
  s.rest_x = rest.max - s.max_s;
  const double beside = c.renormalized ? 0.0 : rest.sum_s * exp(s.rest_x / c.ts);
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
  s.log_q = c.renormalized ? -kInf : log(rest.sum_s) + s.rest_x / c.ts - s.lse_s;
  s.log_p = (s.rest - s.max_t) / c.tt - s.lse_t;
  s.q = s.sum_s == 0 ? 0.0 : beside / s.sum_s;
  s.p = static_cast<T>(exp(s.log_p));
  if (!c.apart) {
    pointwise_value<S>(c, c.powers ? rest.powers * exp(c.degree() * (s.rest_x / c.ts - s.lse_s)) : 0.0, s);
    return s;
  }
  if (c.unit) {
    const Exponent<S> at_one(1.0);
    s.sum_h = (c.renormalized ? 0.0 : rest.sum_h * exp(s.rest_x)) +
              exponential_sum<S>(l.x, l.count, s.max_s, at_one);
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
  const BlockSlopes<S> b = {l.q, l.p, l.to_u, l.to_v};
  with_logs<S>(c, s, [&](const Logs<S>& logs, auto close) {
    constexpr bool kClose = decltype(close)::value;
    if (c.apart) {
      const TargetSlopes& t = s.slopes;
      linear_slopes<S, kClose>({t.student, t.teacher, t.relation, s.mean_h, t.pull, c.unit}, logs, l.x, l.y,
                               l.count, b);
      return;
    }
    with_divergence<S>(c.p, s.far, [&](const auto& divergence) {
      pointwise_slopes<S, kClose>(divergence, logs, l.x, l.y, l.count, s.mean_g, s.mean_h, b);
    });
  });
}
