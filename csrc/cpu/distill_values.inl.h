// The values of one row, from its sums.

// E_p[v - u] again where a student logit is -inf: terms whose p underflows in the compute dtype count as 0.
template <class S>
static double infinite_cross(const RowContext<S>& c, const RowSums& row, const Scratch& scratch) {
  typedef typename S::T T;
  const Problem& p = c.f.problem;
  double cross = 0;
  for (int64_t start = 0; start < p.classes; start += kBlock) {
    const int64_t n = p.classes - start < kBlock ? p.classes - start : kBlock;
    const double weight = block_weight(scratch.sums[start / kBlock].max_t, row.max_t, c.tt) / row.sum_t;
    const Block<S> x = load_block<S>(c.x, start, n, static_cast<T*>(scratch.block_x));
    const Block<S> y = load_block<S>(c.y, start, n, static_cast<T*>(scratch.block_y));
    const T* et = static_cast<const T*>(scratch.exp_t) + start;
    for (int64_t i = 0; i < n; ++i) {
      const double probability = static_cast<double>(et[i]) * weight;
      if (static_cast<T>(probability) == T(0)) continue;
      const double u = (static_cast<double>(x.x[i]) - row.max_s) / c.ts;
      const double v = c.wanted.unit ? 0.0 : (static_cast<double>(y.x[i]) - row.max_t) / c.tt;
      cross += probability * (v - u);
    }
  }
  return cross;
}

// First index of the maximum, as torch.argmax; -1 in a row with NaN.
template <class S>
static int64_t first_argmax(View view, int64_t classes, const Scratch& scratch) {
  typedef typename S::T T;
  view.apart = -1;
  int64_t best = 0;
  T largest = 0;
  for (int64_t start = 0; start < classes; start += kBlock) {
    const int64_t n = classes - start < kBlock ? classes - start : kBlock;
    const T* x = load_block<S>(view, start, n, static_cast<T*>(scratch.block_x)).x;
    if (start == 0) largest = x[0];
    for (int64_t i = 0; i < n; ++i) {
      if (x[i] != x[i]) return -1;
      if (x[i] > largest) {
        largest = x[i];
        best = start + i;
      }
    }
  }
  return best;
}

template <class T>
MFD_INLINE void put(void* out, int64_t row, double value) {
  if (out) static_cast<T*>(out)[row] = static_cast<T>(value);
}

// What a row comes to; `k` is what T^2 multiplies.
struct RowResult {
  RowSums sums;
  Target target;
  double k, rest, soft, hard;
  double label, label_t;  // x_label - max_s, y_label - max_t, where they matter
  double lse_h;           // log sum exp(x - max_s) over all classes
};

template <class S>
MFD_INLINE double rest_divergence(const RowContext<S>& c, const RowSums& sums) {
  if (sums.sum_t == 0) return 0.0;
  if (sums.sum_s == 0) return kInf;
  return c.wanted.unit ? sums.cross + log(sums.sum_s) : forward_kl(sums);
}

template <class S>
MFD_INLINE RowResult row_result(const RowContext<S>& c, const RowSums& sums, const Scratch& scratch) {
  const Forward& f = c.f;
  const Problem& p = f.problem;
  RowResult r{};
  r.sums = sums;
  if (r.sums.cross == kInf) r.sums.cross = infinite_cross(c, sums, scratch);
  if (f.use_hard || c.apart) r.label = logit_at<S>(c.x, c.label, scratch) - sums.max_s;
  if (c.hard) r.lse_h = log(sums.sum_h);
  if (c.apart) {
    r.label_t = logit_at<S>(c.y, c.label, scratch) - sums.max_t;
    r.target.student = odds_of(r.label, c.ts, log(sums.sum_s));
    r.target.teacher = odds_of(r.label_t, c.tt, log(sums.sum_t));
    if (c.hard) {
      r.target.hard_student = odds_of(r.label, 1.0, r.lse_h);
      r.lse_h = whole_lse(r.target.hard_student, r.label, r.lse_h);
    }
    if (c.wanted.unit)
      r.target.hard_teacher = c.has_mixture() ? mixed_odds(*p.mixture, scratch.teachers)
                                              : odds_of(r.label_t, 1.0, log(sums.sum_u));
    r.rest = rest_divergence<S>(c, r.sums);
    r.k = target_divergence(p, r.target, r.rest);
  } else if (f.use_soft) {
    r.k = is_pointwise(p.divergence) ? sums.value : forward_kl(r.sums);
  }
  if (f.use_soft) r.soft = p.scale_by_temperature ? c.ts * c.ts * r.k : r.k;
  if (c.wanted.unit) r.soft += target_slopes(p, r.target).drive;
  if (f.use_hard) r.hard = cross_entropy(sums, r.lse_h, r.label, p.smoothing);
  return r;
}

template <class S>
static void write_statistics(const RowContext<S>& c, const RowResult& r) {
  typedef typename S::T T;
  const double lse_s = log(r.sums.sum_s), lse_t = log(r.sums.sum_t);
  double values[kStats] = {};
  values[kStudentMax] = r.sums.max_s;
  values[kStudentLse] = lse_s;
  values[kTeacherMax] = r.sums.max_t;
  values[kTeacherLse] = lse_t;
  values[kHardLse] = c.hard ? log(r.sums.sum_h) : 0.0;
  values[kDivergence] = r.k;
  // An empty rest beside the label has a log-sum-exp of -inf.
  values[kStudentLseLow] = lse_s == -kInf ? 0.0 : lse_s - static_cast<T>(lse_s);
  values[kTeacherLseLow] = lse_t == -kInf ? 0.0 : lse_t - static_cast<T>(lse_t);
  values[kStudentMean] = r.sums.g;
  values[kTeacherMean] = c.apart ? r.rest : r.sums.h;
  values[kTeacherHardLse] = c.wanted.unit && !c.has_mixture() ? log(r.sums.sum_u) : 0.0;
  for (int i = 0; i < kStats; ++i) put<T>(c.f.stats, c.row * kStats + i, values[i]);
}

// Entropies and label probabilities; those of a row whose label is set apart follow from its log-odds.
template <class S>
static void write_by_products(const RowContext<S>& c, const RowResult& r, const Scratch& scratch) {
  typedef typename S::T T;
  const Forward& f = c.f;
  const Problem& p = f.problem;
  const RowSums& sums = r.sums;
  double student = sums.sum_s == 0 ? 0.0 : log(sums.sum_s) - sums.dot_s / sums.sum_s;
  double teacher = sums.sum_t == 0 ? 0.0 : log(sums.sum_t) - sums.dot_t / sums.sum_t;
  if (c.apart) {
    student = pair_entropy(r.target.student) + r.target.student.rest * student;
    teacher = pair_entropy(r.target.teacher) + r.target.teacher.rest * teacher;
  }
  put<T>(f.student_entropy, c.row, student);
  put<T>(f.teacher_entropy, c.row, teacher);
  if (f.student_label_prob) {
    double q = r.target.student.label, q_teacher = r.target.teacher.label;
    if (!c.apart) {
      q = exp(r.label / c.ts) / sums.sum_s;
      q_teacher = exp((logit_at<S>(c.y, c.label, scratch) - sums.max_t) / c.tt) / sums.sum_t;
    }
    put<T>(f.student_label_prob, c.row, q);
    put<T>(f.teacher_label_prob, c.row, q_teacher);
  }
  const int64_t best = first_argmax<S>(c.x, p.classes, scratch);
  f.agreement[c.row] = best >= 0 && best == first_argmax<S>(c.y, p.classes, scratch);
}

template <class S>
MFD_INLINE void write_values(const RowContext<S>& c, const RowResult& r, const Scratch& scratch) {
  typedef typename S::T T;
  const Forward& f = c.f;
  if (f.row_loss) {
    const double weighted =
        (f.use_soft ? f.soft_factor * r.soft : 0.0) + (f.use_hard ? f.hard_factor * r.hard : 0.0);
    f.row_loss[c.row] = at<T>(f.weight, c.row) * weighted;
  }
  put<T>(f.soft, c.row, r.soft);
  put<T>(f.hard, c.row, r.hard);
  if (f.stats) write_statistics(c, r);
  if (f.student_entropy) write_by_products(c, r, scratch);
}

// Zeros for a row that is not counted.
template <class S>
static void skip_row(const Forward& f, int64_t row) {
  typedef typename S::T T;
  if (f.row_loss) f.row_loss[row] = 0;
  void* const outputs[] = {
      f.soft, f.hard, f.student_entropy, f.teacher_entropy, f.student_label_prob, f.teacher_label_prob};
  for (void* out : outputs) put<T>(out, row, 0.0);
  if (f.stats) __builtin_memset(static_cast<T*>(f.stats) + row * kStats, 0, kStats * sizeof(T));
  if (f.agreement) f.agreement[row] = 0;
  const int64_t bytes = f.problem.student.width * dtype_size(f.problem.student.dtype);
  if (f.grad) write_zeros(static_cast<char*>(f.grad) + row * bytes, bytes, f.stream);
}
