// Slopes of the soft term to the softened logits u = x/Ts and v = y/Tt of one block, from the saved statistics.

template <class S>
struct BackwardRow {
  typedef typename S::T T;
  const Backward& g;
  View x, y;
  double max_s, lse_s, max_t, lse_t, lse_h, lse_u, divergence, ts, tt, soft_scale, grad_soft, grad_hard;
  double mean_g, mean_h;    // E_q[df/dq], E_p[df/dp]
  double label_x, label_y;  // minus the maxima
  int64_t label;
  bool apart;
  Target target;
  TargetSlopes slopes;

  BackwardRow(const Backward& backward, int64_t row, const Scratch& scratch) : g(backward) {
    const Problem& p = g.problem;
    const T* s = static_cast<const T*>(g.stats) + row * kStats;
    max_s = s[kStudentMax];
    lse_s = static_cast<double>(s[kStudentLse]) + s[kStudentLseLow];
    max_t = s[kTeacherMax];
    lse_t = static_cast<double>(s[kTeacherLse]) + s[kTeacherLseLow];
    lse_h = s[kHardLse];
    lse_u = s[kTeacherHardLse];
    divergence = s[kDivergence];
    mean_g = s[kStudentMean];
    mean_h = p.divergence == Divergence::kForwardKL ? divergence : s[kTeacherMean];
    ts = at<T>(p.student_temperature, row);
    tt = at<T>(p.teacher_temperature, row);
    soft_scale = p.scale_by_temperature ? ts * ts : 1.0;
    grad_soft = at<T>(g.grad_soft, row);
    grad_hard = p.labels ? at<T>(g.grad_hard, row) : 0.0;
    label = p.labels ? p.labels[row] : -1;
    apart = sets_label_apart(p.divergence);
    x = {&p.student, row_offset(p.student, row), apart ? label : -1, {}};
    y = {&p.teacher, row_offset(p.teacher, row), x.apart, {}};
    if (p.student.standardize) x.centre = row_centre<S>(x, p.classes, static_cast<T*>(scratch.block_x));
    if (p.teacher.standardize) y.centre = row_centre<S>(y, p.classes, static_cast<T*>(scratch.block_y));
    label_x = label_y = 0;
    target = {};
    slopes = {};
    if (!apart) return;
    label_x = logit_at<S>(x, label, scratch) - max_s;
    label_y = logit_at<S>(y, label, scratch) - max_t;
    target = {log_odds(label_x, ts, lse_s), log_odds(label_y, tt, lse_t), log_odds(label_x, 1.0, lse_h),
              log_odds(label_y, 1.0, lse_u)};
    slopes = target_slopes(p, target);
    lse_h = log_add(lse_h, label_x);
    lse_u = log_add(lse_u, label_y);
  }
};

// out = exp((x - max)/T)*exp(-lse), padded with zeros to a whole vector.
template <class S>
static void probabilities(const typename S::T* x, int64_t n, double max, double lse,
                          const Exponent<S>& exponent, typename S::T* out) {
  typedef typename S::T T;
  const typename S::V m = S::splat(static_cast<T>(max)), factor = S::splat(static_cast<T>(exp(-lse)));
  for (int64_t i = 0; i < n; i += S::kWidth) {
    const int64_t left = n - i < S::kWidth ? n - i : S::kWidth;
    S::store(out + i, exponent(S::load_first(x + i, left, static_cast<T>(-kInf)) - m) * factor);
  }
}

// Forward KL and the divergences that set the label apart:
//   to_u = student*q - teacher*p,  to_v = p*(relation*(t - mean) + pull), t = r or -log q; 0 where p is 0, NaN
//   throughout where the row's mean is.
struct LinearSlopes {
  double student, teacher, relation, mean, pull;
};

template <class S>
static void linear_slopes(const typename S::T* q, const typename S::T* p, const typename S::T* t, bool negated,
                          int64_t n, const LinearSlopes& s, typename S::T* to_u, typename S::T* to_v) {
  typedef typename S::T T;
  typedef typename S::V V;
  const V student = S::splat(static_cast<T>(s.student)), teacher = S::splat(static_cast<T>(s.teacher));
  const V relation = S::splat(static_cast<T>(negated ? -s.relation : s.relation));
  const V mean = S::splat(static_cast<T>(negated ? -s.mean : s.mean)), pull = S::splat(static_cast<T>(s.pull));
  const V zero = S::splat(static_cast<T>(s.mean != s.mean ? kNan : 0.0));
  for (int64_t i = 0; i < n; i += S::kWidth) {
    const V probability = S::load(p + i), term = S::load(t + i) - mean;
    S::store(to_u + i, student * S::load(q + i) - teacher * probability);
    S::store(to_v + i, S::select(probability == V{}, zero, probability * (relation * term + pull)));
  }
}

// Pointwise divergences: to_u = g - q*sum g, to_v = h - p*sum h.
template <class S, class D>
static void pointwise_slopes(const D& divergence, const typename S::T* q, const typename S::T* p,
                             const typename S::T* r, int64_t n, double sum_g, double sum_h,
                             const typename S::T* log_q, const typename S::T* log_p, typename S::T* to_u,
                             typename S::T* to_v) {
  typedef typename S::T T;
  typedef typename S::V V;
  const V cq = S::splat(static_cast<T>(sum_g)), cp = S::splat(static_cast<T>(sum_h));
  for (int64_t i = 0; i < n; i += S::kWidth) {
    const V student = S::load(q + i), teacher = S::load(p + i);
    const Point<S> point = divergence(student, teacher, S::load(r + i), D::kTakesLogs ? S::load(log_q + i) : V{},
                                      D::kTakesLogs ? S::load(log_p + i) : V{});
    S::store(to_u + i, point.g - student * cq);
    S::store(to_v + i, point.h - teacher * cp);
  }
}

// The block's q, p and slopes without the label's class where it is set apart; each array is one of scratch's
// blocks.
template <class S>
struct BlockSlopes {
  typename S::T *q, *p, *to_u, *to_v;
};

template <class S>
static BlockSlopes<S> block_slopes(const BackwardRow<S>& row, const Exponent<S>& by_ts, const Exponent<S>& by_tt,
                                   const typename S::T* x, const typename S::T* y, int64_t n,
                                   const Scratch& scratch) {
  typedef typename S::T T;
  const Problem& problem = row.g.problem;
  const BlockSlopes<S> b = {static_cast<T*>(scratch.exp_s), static_cast<T*>(scratch.exp_t),
                            static_cast<T*>(scratch.block_q), static_cast<T*>(scratch.block_p)};
  T* r = static_cast<T*>(scratch.block_r);
  probabilities<S>(x, n, row.max_s, row.lse_s, by_ts, b.q);
  probabilities<S>(y, n, row.max_t, row.lse_t, by_tt, b.p);
  const LogScale student(row.max_s, row.max_s, row.ts, row.lse_s), teacher(row.max_t, row.max_t, row.tt, row.lse_t);
  if (problem.divergence == Divergence::kNKD) {
    log_probabilities<S>(x, n, student, r);
  } else {
    log_ratios<S>(x, y, n, student, teacher, r);
  }
  if (!is_pointwise(problem.divergence)) {
    LinearSlopes s = {1.0, 1.0, 1.0, row.mean_h, 0.0};
    if (row.apart)
      s = {row.slopes.student, row.slopes.teacher, row.slopes.relation, row.mean_h, row.slopes.pull};
    linear_slopes<S>(b.q, b.p, r, problem.divergence == Divergence::kNKD, n, s, b.to_u, b.to_v);
    return b;
  }
  with_divergence<S>(problem, [&](const auto& divergence) {
    if (divergence.kTakesLogs) {
      log_probabilities<S>(x, n, student, b.to_u);
      log_probabilities<S>(y, n, teacher, b.to_v);
    }
    pointwise_slopes<S>(divergence, b.q, b.p, r, n, row.mean_g, row.mean_h, b.to_u, b.to_v, b.to_u, b.to_v);
  });
  return b;
}
