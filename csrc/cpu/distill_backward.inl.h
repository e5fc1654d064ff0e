// Gradients of the per-row terms, recomputed from the saved statistics: one pass over the logits.

// Sums for the temperature gradients.
struct TemperatureSums {
  double student;  // sum (q - p)*(x - max x) = E_q[x] - E_p[x]
  double excess;   // sum (q - p): what rounding left of 0
  double mean;     // E_q[x - max x]
  double teacher;  // sum p*(r - K)*(y - max y) = E_p[y r] - K E_p[y]
};

template <class S>
struct BackwardRow {
  typedef typename S::T T;
  double max_s, lse_s, max_t, lse_t, lse_h, k, ts, tt, soft_scale, grad_soft, grad_hard;
  int64_t label;

  BackwardRow(const Backward& g, int64_t row) {
    const Problem& p = g.problem;
    const T* s = static_cast<const T*>(g.stats) + row * kStats;
    max_s = s[kStudentMax];
    lse_s = static_cast<double>(s[kStudentLse]) + s[kStudentLseLow];
    max_t = s[kTeacherMax];
    lse_t = static_cast<double>(s[kTeacherLse]) + s[kTeacherLseLow];
    lse_h = s[kHardLse];
    k = s[kDivergence];
    ts = at<T>(p.student_temperature, row);
    tt = at<T>(p.teacher_temperature, row);
    soft_scale = p.scale_by_temperature ? ts * ts : 1.0;
    grad_soft = at<T>(g.grad_soft, row);
    grad_hard = p.labels ? at<T>(g.grad_hard, row) : 0.0;
    label = p.labels ? p.labels[row] : -1;
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

// d/dx = grad_soft*f*(q - p)/Ts + grad_hard*(softmax(x) - (1 - eps)*onehot - eps/C), without the one-hot
// part.
template <class S>
static void student_gradient(const typename S::T* q, const typename S::T* p, const typename S::T* h,
                             int64_t n, double soft, double hard, double shift, typename S::T* out) {
  typedef typename S::T T;
  const typename S::V a = S::splat(static_cast<T>(soft)), b = S::splat(static_cast<T>(hard)),
                      c = S::splat(static_cast<T>(shift));
  for (int64_t i = 0; i < n; i += S::kWidth) {
    typename S::V g = a * (S::load(q + i) - S::load(p + i));
    if (h) g = g + (b * S::load(h + i) - c);
    S::store(out + i, g);
  }
}

// w = p*(r - K), r = log p - log q; 0 where p is 0; NaN throughout where the row's K is.
template <class S>
static void teacher_weights(const typename S::T* x, const typename S::T* y, const typename S::T* p, int64_t n,
                            const BackwardRow<S>& row, typename S::T* w) {
  typedef typename S::T T;
  typedef typename S::V V;
  const V mx = S::splat(static_cast<T>(row.max_s)), my = S::splat(static_cast<T>(row.max_t));
  const V ratio = S::splat(static_cast<T>(row.ts / row.tt)), ts = S::splat(static_cast<T>(row.ts));
  const double shift = row.lse_t - row.lse_s + row.k;
  const V offset = S::splat(static_cast<T>(shift));
  const V zero = S::splat(static_cast<T>(shift != shift ? kNan : 0.0));
  for (int64_t i = 0; i < n; i += S::kWidth) {
    const int64_t left = n - i < S::kWidth ? n - i : S::kWidth;
    const V tx = S::load_first(x + i, left, T(0)) - mx, ty = S::load_first(y + i, left, T(0)) - my;
    const V probability = S::load(p + i);
    const V r = S::fma(ty, ratio, -tx) / ts - offset;
    S::store(w + i, S::select(probability == V{}, zero, probability * r));
  }
}

// sum w*(x - max) where w is not 0, w = weights - minus.
template <class S>
static double weighted_sum(const typename S::T* weights, const typename S::T* minus, const typename S::T* x,
                           int64_t n, double max) {
  typedef typename S::T T;
  typedef typename S::V V;
  const V m = S::splat(static_cast<T>(max));
  V acc{};
  for (int64_t i = 0; i < n; i += S::kWidth) {
    const int64_t left = n - i < S::kWidth ? n - i : S::kWidth;
    V w = S::load(weights + i);
    if (minus) w = w - S::load(minus + i);
    acc = acc + S::select(w == V{}, V{}, w * (S::load_first(x + i, left, T(0)) - m));
  }
  return S::sum(acc);
}

template <class S>
static double plain_sum(const typename S::T* w, int64_t n) {
  typename S::V acc{};
  for (int64_t i = 0; i < n; i += S::kWidth) acc = acc + S::load(w + i);
  return S::sum(acc);
}

// One side's gradient of a block, through the transform and into its dtype.
template <class S>
static void emit(const Side& side, const typename S::T* x, int64_t n, bool stream, typename S::T* gradient,
                 char* out) {
  if (side.scale != 1.0 || side.softcap > 0) transform_backward<S>(side, x, n, gradient);
  convert_out(gradient, n, side.dtype, stream, out);
}

template <class S>
static void backward_block(const Backward& g, const BackwardRow<S>& row, const Exponent<S>& by_ts,
                           const Exponent<S>& by_tt, const Block<S>& x, const Block<S>& y, int64_t start,
                           int64_t n, char* d_student, char* d_teacher, const Scratch& scratch,
                           TemperatureSums* sums) {
  typedef typename S::T T;
  const Problem& problem = g.problem;
  T* q = static_cast<T*>(scratch.exp_s);
  T* p = static_cast<T*>(scratch.exp_t);
  T* h = problem.labels ? static_cast<T*>(scratch.exp_h) : nullptr;
  T* out = static_cast<T*>(scratch.block_out);
  probabilities<S>(x.x, n, row.max_s, row.lse_s, by_ts, q);
  probabilities<S>(y.x, n, row.max_t, row.lse_t, by_tt, p);
  if (g.d_temperature) {
    sums->student += weighted_sum<S>(q, p, x.x, n, row.max_s);
    sums->excess += plain_sum<S>(q, n) - plain_sum<S>(p, n);
    sums->mean += weighted_sum<S>(q, nullptr, x.x, n, row.max_s);
  }
  if (d_student) {
    if (h) probabilities<S>(x.x, n, row.max_s, row.lse_h, Exponent<S>(1.0), h);
    const double shift = row.grad_hard * problem.smoothing / static_cast<double>(problem.classes);
    student_gradient<S>(q, p, h, n, row.grad_soft * row.soft_scale / row.ts, row.grad_hard, shift, out);
    const int64_t at_label = row.label - start;
    if (h && at_label >= 0 && at_label < n) {
      const T soft = static_cast<T>(row.grad_soft * row.soft_scale / row.ts) * (q[at_label] - p[at_label]);
      const T hard = static_cast<T>(row.grad_hard) * h[at_label];
      out[at_label] = soft + (hard - static_cast<T>(row.grad_hard * label_share(problem)));
    }
    emit<S>(problem.student, x.x, n, g.stream, out, d_student + start * dtype_size(problem.student.dtype));
  }
  if (d_teacher || g.d_teacher_temperature) {
    teacher_weights<S>(x.x, y.x, p, n, row, q);
    if (g.d_teacher_temperature) sums->teacher += weighted_sum<S>(q, nullptr, y.x, n, row.max_t);
    if (d_teacher) {
      const typename S::V a = S::splat(static_cast<T>(row.grad_soft * row.soft_scale / row.tt));
      for (int64_t i = 0; i < n; i += S::kWidth) S::store(out + i, a * S::load(q + i));
      emit<S>(problem.teacher, y.x, n, g.stream, out, d_teacher + start * dtype_size(problem.teacher.dtype));
    }
  }
}

// sum p*(r - K), which is 0 but for the rounding of K.
template <class S>
static double teacher_excess(const Backward& g, const BackwardRow<S>& row, const Exponent<S>& by_tt,
                             int64_t x_offset, int64_t y_offset, const Scratch& scratch) {
  typedef typename S::T T;
  const Problem& problem = g.problem;
  double excess = 0;
  for (int64_t start = 0; start < problem.classes; start += kBlock) {
    const int64_t n = problem.classes - start < kBlock ? problem.classes - start : kBlock;
    const Block<S> x = load_block<S>(problem.student, x_offset, start, n, static_cast<T*>(scratch.block_x));
    const Block<S> y = load_block<S>(problem.teacher, y_offset, start, n, static_cast<T*>(scratch.block_y));
    T* p = static_cast<T*>(scratch.exp_t);
    T* w = static_cast<T*>(scratch.exp_s);
    probabilities<S>(y.x, n, row.max_t, row.lse_t, by_tt, p);
    teacher_weights<S>(x.x, y.x, p, n, row, w);
    excess += plain_sum<S>(w, n);
  }
  return excess;
}

template <class S>
static void backward_row(const Backward& g, int64_t index, const Scratch& scratch) {
  typedef typename S::T T;
  const Problem& problem = g.problem;
  const int64_t x_size = dtype_size(problem.student.dtype), y_size = dtype_size(problem.teacher.dtype);
  char* d_student =
      g.d_student ? static_cast<char*>(g.d_student) + index * problem.student.width * x_size : nullptr;
  char* d_teacher =
      g.d_teacher ? static_cast<char*>(g.d_teacher) + index * problem.teacher.width * y_size : nullptr;
  if (!is_counted(problem, index)) {
    if (d_student) write_zeros(d_student, problem.student.width * x_size, g.stream);
    if (d_teacher) write_zeros(d_teacher, problem.teacher.width * y_size, g.stream);
    if (g.d_temperature) static_cast<T*>(g.d_temperature)[index] = T(0);
    if (g.d_teacher_temperature) static_cast<T*>(g.d_teacher_temperature)[index] = T(0);
    return;
  }
  BackwardRow<S> row(g, index);
  const Exponent<S> by_ts(row.ts), by_tt(row.tt);
  const int64_t x_offset = row_offset(problem.student, index), y_offset = row_offset(problem.teacher, index);
  const int64_t classes = problem.classes;
  const double divergence = row.k;
  TemperatureSums sums{};
  if (d_teacher || g.d_teacher_temperature) {
    const double excess = teacher_excess<S>(g, row, by_tt, x_offset, y_offset, scratch);
    if (__builtin_isfinite(excess)) row.k += excess;
  }
  for (int64_t start = 0; start < classes; start += kBlock) {
    const int64_t n = classes - start < kBlock ? classes - start : kBlock;
    const Block<S> x = load_block<S>(problem.student, x_offset, start, n, static_cast<T*>(scratch.block_x));
    const Block<S> y = load_block<S>(problem.teacher, y_offset, start, n, static_cast<T*>(scratch.block_y));
    backward_block<S>(g, row, by_ts, by_tt, x, y, start, n, d_student, d_teacher, scratch, &sums);
  }
  if (d_student) write_zeros(d_student + classes * x_size, (problem.student.width - classes) * x_size, false);
  if (d_teacher) write_zeros(d_teacher + classes * y_size, (problem.teacher.width - classes) * y_size, false);
  // dK/dTs = -(E_q[x] - E_p[x])/Ts^2, dK/dTt = -(E_p[y r] - K E_p[y])/Tt^2; the factor Ts^2 has a derivative
  // too.
  const double scaled = row.grad_soft * row.soft_scale;
  if (g.d_temperature) {
    const double own = problem.scale_by_temperature ? row.grad_soft * 2.0 * row.ts * divergence : 0.0;
    const double difference = sums.excess == 0 ? sums.student : sums.student - sums.excess * sums.mean;
    static_cast<T*>(g.d_temperature)[index] = static_cast<T>(own - scaled * difference / (row.ts * row.ts));
  }
  if (g.d_teacher_temperature)
    static_cast<T*>(g.d_teacher_temperature)[index] =
        static_cast<T>(-scaled * sums.teacher / (row.tt * row.tt));
}

template <class S>
static void backward_rows_of(const Backward& g, int64_t begin, int64_t end, const Scratch& scratch) {
  for (int64_t row = begin; row < end; ++row) backward_row<S>(g, row, scratch);
}
