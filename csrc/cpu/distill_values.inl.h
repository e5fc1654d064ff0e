// The values of one row, from its sums.

template <class S>
MFD_INLINE bool needs_points(const RowContext<S>& c) {
  return c.f.use_soft && is_pointwise(c.f.problem.divergence);
}

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

template <class S>
MFD_INLINE RowResult row_result_of(const RowContext<S>& c, RowSums sums, const Scratch& scratch) {
  const Forward& f = c.f;
  if (sums.cross == kInf && !needs_points(c)) sums.cross = infinite_cross(c, sums, scratch);
  const double label = f.use_hard || c.apart ? logit_at<S>(c.x, c.label, scratch) - sums.max_s : 0.0;
  const double label_t = c.apart ? logit_at<S>(c.y, c.label, scratch) - sums.max_t : 0.0;
  if (!c.wanted.unit || !c.has_mixture()) return row_result(f, c.wanted, c.ts, c.tt, sums, label, label_t);
  const Odds at_one = mixed_odds(f.problem.mixture->count, scratch.teachers);
  return row_result(f, c.wanted, c.ts, c.tt, sums, label, label_t, &at_one);
}

template <class S>
static void write_by_products(const RowContext<S>& c, const RowResult& r, const Scratch& scratch) {
  typedef typename S::T T;
  const Forward& f = c.f;
  const RowSums& sums = r.sums;
  const Entropies entropies = row_entropies(r, c.wanted);
  put<T>(f.student_entropy, c.row, entropies.student);
  put<T>(f.teacher_entropy, c.row, entropies.teacher);
  if (f.student_label_prob) {
    double q = r.target.student.label, q_teacher = r.target.teacher.label;
    if (!c.apart) {
      q = exp(r.label / c.ts) / sums.sum_s;
      q_teacher = exp((logit_at<S>(c.y, c.label, scratch) - sums.max_t) / c.tt) / sums.sum_t;
    }
    put<T>(f.student_label_prob, c.row, q);
    put<T>(f.teacher_label_prob, c.row, q_teacher);
  }
  const int64_t best = first_argmax<S>(c.x, f.problem.classes, scratch);
  f.agreement[c.row] = best >= 0 && best == first_argmax<S>(c.y, f.problem.classes, scratch);
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
  if (f.stats) {
    const bool far = needs_points(c) && is_far(f.problem, r.sums);
    saved_statistics(r, c.wanted, far, static_cast<T*>(f.stats) + c.row * kStats);
  }
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
