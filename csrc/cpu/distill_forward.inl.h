// Values and student gradient of the distillation loss, row by row.

// Everything about one row that does not depend on the block.
template <class S>
struct RowContext {
  const Forward& f;
  int64_t row, label;
  double ts, tt;
  int hard;
  int64_t x_offset, y_offset;

  RowContext(const Forward& forward, int64_t r) : f(forward), row(r) {
    typedef typename S::T T;
    const Problem& p = f.problem;
    label = p.labels ? p.labels[row] : -1;
    // Without the soft term the student's exponentials are those of the cross-entropy.
    ts = f.use_soft ? at<T>(p.student_temperature, row) : 1.0;
    tt = f.use_soft ? at<T>(p.teacher_temperature, row) : 1.0;
    hard = hard_mode<S>(f, ts);
    x_offset = row_offset(p.student, row);
    y_offset = f.use_soft ? row_offset(p.teacher, row) : 0;
  }
};

// Where this row's next block, or the next row's first one, lies.
template <class S>
MFD_INLINE Ahead ahead_of(const Problem& p, const Block<S>& x, const Block<S>& y) {
  const int64_t sx = dtype_size(p.student.dtype), sy = dtype_size(p.teacher.dtype);
  const int64_t distance = p.classes < kBlock ? p.classes : kBlock;
  return {x.raw + distance * sx, y.raw + distance * sy, sx, sy};
}

template <class S>
static void row_sums(const RowContext<S>& c, const Scales<S>& scales, int64_t begin, int64_t end,
                     const Scratch& scratch) {
  typedef typename S::T T;
  const Forward& f = c.f;
  const Problem& p = f.problem;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t start = b * kBlock, n = p.classes - start < kBlock ? p.classes - start : kBlock;
    T* x_buffer = scratch.capped ? static_cast<T*>(scratch.capped) + start : static_cast<T*>(scratch.block_x);
    const Block<S> x = load_block<S>(p.student, c.x_offset, start, n, x_buffer);
    Block<S> y = x;
    if (f.use_soft) y = load_block<S>(p.teacher, c.y_offset, start, n, static_cast<T*>(scratch.block_y));
    T* es = static_cast<T*>(scratch.exp_s) + start;
    T* et = static_cast<T*>(scratch.exp_t) + start;
    T* eh = scratch.exp_h ? static_cast<T*>(scratch.exp_h) + start : es;
    BlockSums& out = scratch.sums[b];
    const Ahead ahead = ahead_of<S>(p, x, y);
    if (f.use_soft) {
      block_sums_of<S, true>(c.hard, x.x, y.x, n, scales, ahead, es, et, eh, &out);
    } else {
      block_sums<S, false, 1>(x.x, x.x, n, scales, ahead, es, et, eh, &out);
    }
    out.sum_x = f.use_hard && p.smoothing != 0 ? block_shifted_sum<S>(x.x, n, out.max_s) : 0.0;
    if (f.student_entropy) {
      out.dot_s = block_dot<S>(es, x.x, n, out.max_s);
      out.dot_t = block_dot<S>(et, y.x, n, out.max_t);
    }
  }
}

// Transformed value of one logit.
template <class S>
static double logit_at(const Side& side, int64_t offset, int64_t column, const Scratch& scratch) {
  typename S::T* buffer = static_cast<typename S::T*>(scratch.block_out);
  return static_cast<double>(load_block<S>(side, offset, column, 1, buffer).x[0]);
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
    const Block<S> x = load_block<S>(p.student, c.x_offset, start, n, static_cast<T*>(scratch.block_x));
    const Block<S> y = load_block<S>(p.teacher, c.y_offset, start, n, static_cast<T*>(scratch.block_y));
    const T* et = static_cast<const T*>(scratch.exp_t) + start;
    for (int64_t i = 0; i < n; ++i) {
      const double probability = static_cast<double>(et[i]) * weight;
      if (static_cast<T>(probability) == T(0)) continue;
      const double u = (static_cast<double>(x.x[i]) - row.max_s) / c.ts;
      cross += probability * ((static_cast<double>(y.x[i]) - row.max_t) / c.tt - u);
    }
  }
  return cross;
}

// First index of the maximum, as torch.argmax; -1 in a row with NaN.
template <class S>
static int64_t first_argmax(const Side& side, int64_t offset, int64_t classes, const Scratch& scratch) {
  typedef typename S::T T;
  int64_t best = 0;
  T largest = 0;
  for (int64_t start = 0; start < classes; start += kBlock) {
    const int64_t n = classes - start < kBlock ? classes - start : kBlock;
    const T* x = load_block<S>(side, offset, start, n, static_cast<T*>(scratch.block_x)).x;
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
MFD_INLINE void write_values(const RowContext<S>& c, RowSums row, const Scratch& scratch) {
  typedef typename S::T T;
  const Forward& f = c.f;
  const Problem& p = f.problem;
  double k = 0, soft = 0, hard = 0;
  if (f.use_soft) {
    if (row.cross == kInf) row.cross = infinite_cross(c, row, scratch);
    k = forward_kl(row);
    soft = p.scale_by_temperature ? c.ts * c.ts * k : k;
  }
  if (f.use_hard) {
    hard = cross_entropy(row, logit_at<S>(p.student, c.x_offset, c.label, scratch) - row.max_s, p.smoothing);
  }
  if (f.row_loss) {
    const double weighted =
        (f.use_soft ? f.soft_factor * soft : 0.0) + (f.use_hard ? f.hard_factor * hard : 0.0);
    f.row_loss[c.row] = at<T>(f.weight, c.row) * weighted;
  }
  put<T>(f.soft, c.row, soft);
  put<T>(f.hard, c.row, hard);
  if (f.stats) {
    const double lse_s = log(row.sum_s), lse_t = log(row.sum_t);
    const double values[kStats] = {row.max_s,
                                   lse_s,
                                   row.max_t,
                                   lse_t,
                                   f.use_hard ? log(row.sum_h) : 0.0,
                                   k,
                                   lse_s - static_cast<T>(lse_s),
                                   lse_t - static_cast<T>(lse_t)};
    for (int i = 0; i < kStats; ++i) put<T>(f.stats, c.row * kStats + i, values[i]);
  }
  if (!f.student_entropy) return;
  put<T>(f.student_entropy, c.row, log(row.sum_s) - row.dot_s / row.sum_s);
  put<T>(f.teacher_entropy, c.row, log(row.sum_t) - row.dot_t / row.sum_t);
  if (f.student_label_prob) {
    const double x = logit_at<S>(p.student, c.x_offset, c.label, scratch) - row.max_s;
    const double y = logit_at<S>(p.teacher, c.y_offset, c.label, scratch) - row.max_t;
    put<T>(f.student_label_prob, c.row, exp(x / c.ts) / row.sum_s);
    put<T>(f.teacher_label_prob, c.row, exp(y / c.tt) / row.sum_t);
  }
  const int64_t best = first_argmax<S>(p.student, c.x_offset, p.classes, scratch);
  f.agreement[c.row] = best >= 0 && best == first_argmax<S>(p.teacher, c.y_offset, p.classes, scratch);
}

// d loss/d student of blocks [begin, end) of one row; the last block also writes the unused columns.
template <class S>
static void write_gradient(const RowContext<S>& c, const RowSums& row, int64_t begin, int64_t end,
                           const Scratch& scratch) {
  typedef typename S::T T;
  const Forward& f = c.f;
  const Problem& p = f.problem;
  const int64_t size = dtype_size(p.student.dtype);
  const double w = at<T>(f.weight, c.row);
  // d soft/dx = (Ts^2 or 1)*(q - p)/Ts
  const double soft = f.use_soft ? w * f.soft_factor * (p.scale_by_temperature ? c.ts : 1.0 / c.ts) : 0.0;
  const double hard = f.use_hard ? w * f.hard_factor : 0.0;
  const double per_s = soft / row.sum_s, per_t = f.use_soft ? soft / row.sum_t : 0.0;
  const double per_h = f.use_hard ? hard / row.sum_h : 0.0;
  char* out = static_cast<char*>(f.grad) + c.row * p.student.width * size;
  const bool direct = is_direct<S>(p.student);
  T* buffer = static_cast<T*>(scratch.block_out);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t start = b * kBlock, n = p.classes - start < kBlock ? p.classes - start : kBlock;
    const BlockSums& sums = scratch.sums[b];
    const double ws = block_weight(sums.max_s, row.max_s, c.ts);
    Factors<T> factors;
    factors.a = static_cast<T>(per_s * ws);
    factors.b = f.use_soft ? static_cast<T>(per_t * block_weight(sums.max_t, row.max_t, c.tt)) : T(0);
    factors.h = T(0);
    if (f.use_hard) {
      factors.h = static_cast<T>(per_h * (c.ts == 1.0 ? ws : block_weight(sums.max_s, row.max_s, 1.0)));
    }
    factors.shift = static_cast<T>(hard * p.smoothing / static_cast<double>(p.classes));
    const T* es = static_cast<const T*>(scratch.exp_s) + start;
    const T* et = static_cast<const T*>(scratch.exp_t) + start;
    const T* eh = scratch.exp_h ? static_cast<const T*>(scratch.exp_h) + start : es;
    T* target = direct ? reinterpret_cast<T*>(out + start * size) : buffer;
    if (f.use_soft) {
      block_gradient_of<S, true>(c.hard, es, et, eh, n, factors, direct && f.stream, target);
    } else {
      block_gradient<S, false, 1>(es, et, eh, n, factors, direct && f.stream, target);
    }
    const int64_t at_label = c.label - start;
    if (f.use_hard && at_label >= 0 && at_label < n) {
      factors.shift = static_cast<T>(hard * label_share(p));
      target[at_label] =
          gradient_at<T>(c.hard, f.use_soft, es[at_label], et[at_label], eh[at_label], factors);
    }
    if (direct) continue;
    if (p.student.scale != 1.0 || p.student.softcap > 0) {
      const T* x = scratch.capped ? static_cast<const T*>(scratch.capped) + start : buffer;
      transform_backward<S>(p.student, x, n, buffer);
    }
    convert_out(buffer, n, p.student.dtype, f.stream, out + start * size);
  }
  if (end == block_count(p.classes) && p.student.width > p.classes)
    write_zeros(out + p.classes * size, (p.student.width - p.classes) * size, f.stream);
}

template <class S>
MFD_INLINE RowSums finish_sums(const RowContext<S>& c, const Scratch& scratch) {
  const Problem& p = c.f.problem;
  return merge_blocks(scratch.sums, block_count(p.classes), p.classes, c.ts, c.tt, c.f.use_soft, c.f.use_hard,
                      c.f.student_entropy != nullptr);
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

// The part of a worker's scratch row that belongs to the k-th of several short rows.
template <class S>
MFD_INLINE Scratch nth_of(const Scratch& scratch, int64_t k, int64_t stride) {
  typedef typename S::T T;
  Scratch s = scratch;
  s.exp_s = static_cast<T*>(s.exp_s) + k * stride;
  s.exp_t = static_cast<T*>(s.exp_t) + k * stride;
  if (s.exp_h) s.exp_h = static_cast<T*>(s.exp_h) + k * stride;
  if (s.capped) s.capped = static_cast<T*>(s.capped) + k * stride;
  s.sums += k;
  return s;
}

template <class S>
static void forward_rows_of(const Forward& f, int64_t begin, int64_t end, const Scratch& scratch) {
  const Problem& p = f.problem;
  const bool per_row = p.student_temperature.rows || p.teacher_temperature.rows;
  Scales<S> scales(f.use_soft ? p.student_temperature.value : 1.0,
                   f.use_soft ? p.teacher_temperature.value : 1.0);
  const int64_t blocks = block_count(p.classes);
  // Short rows go in groups that fill a block, so that one row's sums need not be known before the next
  // begins.
  const int64_t stride = (p.classes + kRowAlign - 1) / kRowAlign * kRowAlign;
  const int64_t group = blocks == 1 ? kBlock / stride : 1;
  for (int64_t first = begin; first < end; first += group) {
    const int64_t rows = end - first < group ? end - first : group;
    for (int64_t k = 0; k < rows; ++k) {
      if (!is_counted(p, first + k)) continue;
      const RowContext<S> c(f, first + k);
      if (per_row) scales = Scales<S>(c.ts, c.tt);
      row_sums<S>(c, scales, 0, blocks, nth_of<S>(scratch, k, stride));
    }
    for (int64_t k = 0; k < rows; ++k) {
      if (!is_counted(p, first + k)) {
        skip_row<S>(f, first + k);
        continue;
      }
      const RowContext<S> c(f, first + k);
      const Scratch own = nth_of<S>(scratch, k, stride);
      const RowSums sums = finish_sums(c, own);
      write_values(c, sums, own);
      if (f.grad) write_gradient(c, sums, 0, blocks, own);
    }
  }
}

template <class S>
static void forward_sums_of(const Forward& f, int64_t row, int64_t begin, int64_t end,
                            const Scratch& scratch) {
  if (!is_counted(f.problem, row)) return;
  const RowContext<S> c(f, row);
  row_sums<S>(c, Scales<S>(c.ts, c.tt), begin, end, scratch);
}

// The worker of the first block writes the row's values; all merge the same sums.
template <class S>
static void forward_outputs_of(const Forward& f, int64_t row, int64_t begin, int64_t end,
                               const Scratch& scratch) {
  if (!is_counted(f.problem, row)) {
    if (begin == 0) skip_row<S>(f, row);
    return;
  }
  const RowContext<S> c(f, row);
  const RowSums sums = finish_sums(c, scratch);
  if (begin == 0) write_values(c, sums, scratch);
  if (f.grad) write_gradient(c, sums, begin, end, scratch);
}
