// The student gradient, and rows in groups or in blocks.

// d loss/d (transformed student logits) of one block.
template <class S>
MFD_INLINE void block_slope(const RowContext<S>& c, const RowSums& row, const Slopes& slopes, int64_t b,
                            int64_t n, bool stream, const Scratch& scratch, typename S::T* out) {
  typedef typename S::T T;
  const Forward& f = c.f;
  const int64_t start = b * kBlock;
  const BlockSums& sums = scratch.sums[b];
  const double ws = block_weight(sums.max_s, row.max_s, c.ts);
  Factors<T> factors;
  factors.a = static_cast<T>(slopes.student * ws);
  factors.b = static_cast<T>(slopes.teacher);
  if (f.use_soft && !is_pointwise(f.problem.divergence))
    factors.b = static_cast<T>(slopes.teacher * block_weight(sums.max_t, row.max_t, c.tt));
  factors.h = T(0);
  if (!f.use_soft) {
    factors.h = static_cast<T>(slopes.hard * ws);
  } else if (c.hard) {
    factors.h = static_cast<T>(slopes.hard * (c.ts == 1.0 ? ws : block_weight(sums.max_s, row.max_s, 1.0)));
  }
  factors.shift = static_cast<T>(slopes.shift);
  const T* es = static_cast<const T*>(scratch.exp_s) + start;
  const T* et = static_cast<const T*>(scratch.exp_t) + start;
  const T* eh = scratch.exp_h ? static_cast<const T*>(scratch.exp_h) + start : es;
  Exception<T> label{c.label - start, T(0)};
  if ((f.use_hard || c.apart) && label.at >= 0 && label.at < n) {
    Factors<T> own = factors;
    own.shift = static_cast<T>(slopes.label_shift);
    label.value = gradient_at<T>(c.hard, f.use_soft, es[label.at], et[label.at], eh[label.at], own);
  } else {
    label.at = -1;
  }
  if (f.use_soft) {
    block_gradient_of<S, true>(c.hard, es, et, eh, n, factors, stream, label, out);
  } else {
    block_gradient<S, false, 1>(es, et, eh, n, factors, stream, label, out);
  }
}

// d loss/d student of blocks [begin, end) of one row; the last block also writes the unused columns.
template <class S>
static void write_gradient(const RowContext<S>& c, const RowResult& r, int64_t begin, int64_t end,
                           const Scratch& scratch) {
  typedef typename S::T T;
  const Forward& f = c.f;
  const Problem& p = f.problem;
  const int64_t size = dtype_size(p.student.dtype);
  char* out = static_cast<char*>(f.grad) + c.row * p.student.width * size;
  const bool direct = is_direct<S>(p.student) && !p.student.standardize;
  T* buffer = static_cast<T*>(scratch.block_out);
  T* capped = static_cast<T*>(scratch.capped);
  if (c.apart && capped) capped[c.label] = static_cast<T>(r.label + r.sums.max_s);
  const double weight = at<T>(f.weight, c.row);
  const Slopes slopes = row_slopes(f, c.wanted, weight * f.soft_factor, weight * f.hard_factor, c.ts, r);
  double dot = 0;
  for (int64_t b = begin; p.student.standardize && b < end; ++b) {
    const int64_t start = b * kBlock, n = p.classes - start < kBlock ? p.classes - start : kBlock;
    block_slope(c, r.sums, slopes, b, n, false, scratch, buffer);
    dot += weighted_sum<S>(buffer, capped + start, n, 0.0);
  }
  for (int64_t b = begin; b < end; ++b) {
    const int64_t start = b * kBlock, n = p.classes - start < kBlock ? p.classes - start : kBlock;
    if (direct) {
      block_slope(c, r.sums, slopes, b, n, f.stream, scratch, reinterpret_cast<T*>(out + start * size));
      continue;
    }
    block_slope(c, r.sums, slopes, b, n, false, scratch, buffer);
    if (changes_gradient(p.student))
      transform_backward<S>(c.x, capped ? capped + start : buffer, n, dot, buffer);
    convert_out(buffer, n, p.student.dtype, f.stream, out + start * size);
  }
  if (end == block_count(p.classes) && p.student.width > p.classes)
    write_zeros(out + p.classes * size, (p.student.width - p.classes) * size, f.stream);
}

template <class S>
MFD_INLINE RowSums finish_sums(const RowContext<S>& c, const Scratch& scratch) {
  const Problem& p = c.f.problem;
  return merge_blocks(scratch.sums, block_count(p.classes), p.classes, c.ts, c.tt, c.wanted);
}

template <class S>
static void row_points_of(const RowContext<S>& c, const RowSums& sums, int64_t begin, int64_t end,
                          const Scratch& scratch) {
  if (c.f.grad) {
    row_points<S, true>(c, sums, begin, end, scratch);
  } else {
    row_points<S, false>(c, sums, begin, end, scratch);
  }
}

template <class S>
MFD_INLINE void finish_row(const RowContext<S>& c, RowSums& sums, int64_t begin, int64_t end,
                           const Scratch& scratch) {
  if (needs_points(c)) merge_points(scratch.sums, block_count(c.f.problem.classes), sums);
  const RowResult result = row_result_of(c, sums, scratch);
  if (begin == 0) write_values(c, result, scratch);
  if (c.f.grad) write_gradient(c, result, begin, end, scratch);
}

// The part of a worker's scratch row that belongs to the k-th of several short rows.
template <class S>
MFD_INLINE Scratch nth_of(const Scratch& scratch, int64_t k, int64_t stride, int64_t teachers) {
  typedef typename S::T T;
  Scratch s = scratch;
  s.exp_s = static_cast<T*>(s.exp_s) + k * stride;
  s.exp_t = static_cast<T*>(s.exp_t) + k * stride;
  if (s.exp_h) s.exp_h = static_cast<T*>(s.exp_h) + k * stride;
  if (s.capped) s.capped = static_cast<T*>(s.capped) + k * stride;
  if (s.difference) s.difference = static_cast<T*>(s.difference) + k * stride;
  if (s.mixture) s.mixture = static_cast<T*>(s.mixture) + k * stride;
  s.teachers += k * teachers;
  s.sums += k;
  return s;
}

template <class S>
static void forward_rows_of(const Forward& f, int64_t begin, int64_t end, const Scratch& scratch) {
  const Problem& p = f.problem;
  const int64_t teachers = f.use_soft && p.mixture ? p.mixture->count : 0;
  const bool prepared = p.student.standardize || p.teacher.standardize || teachers;
  const bool per_row = p.student_temperature.rows || p.teacher_temperature.rows || teachers;
  Scales<S> scales(f.use_soft ? p.student_temperature.value : 1.0,
                   f.use_soft ? p.teacher_temperature.value : 1.0, p.divergence == Divergence::kNKD);
  const int64_t blocks = block_count(p.classes);
  // Short rows go in groups that fill a block, so that one row's sums need not be known before the next
  // begins.
  const int64_t stride = (p.classes + kRowAlign - 1) / kRowAlign * kRowAlign;
  const int64_t group = blocks == 1 ? kBlock / stride : 1;
  for (int64_t first = begin; first < end; first += group) {
    const int64_t rows = end - first < group ? end - first : group;
    for (int64_t k = 0; k < rows; ++k) {
      if (!is_counted(p, first + k)) continue;
      RowContext<S> c(f, first + k);
      const Scratch own = nth_of<S>(scratch, k, stride, teachers);
      if (prepared) c.prepare(own);
      if (per_row) scales = Scales<S>(c.ts, c.tt, c.wanted.unit);
      row_sums<S>(c, scales, 0, blocks, own);
    }
    for (int64_t k = 0; k < rows; ++k) {
      if (!is_counted(p, first + k)) {
        skip_row<S>(f, first + k);
        continue;
      }
      RowContext<S> c(f, first + k);
      const Scratch own = nth_of<S>(scratch, k, stride, teachers);
      if (prepared) c.recall(own);
      RowSums sums = finish_sums(c, own);
      if (needs_points(c)) row_points_of(c, sums, 0, blocks, own);
      finish_row(c, sums, 0, blocks, own);
    }
  }
}

template <class S>
static void forward_sums_of(const Forward& f, int64_t row, int64_t begin, int64_t end,
                            const Scratch& scratch) {
  if (!is_counted(f.problem, row)) return;
  const RowContext<S> c(f, row);
  row_sums<S>(c, Scales<S>(c.ts, c.tt, c.wanted.unit), begin, end, scratch);
}

template <class S>
static void forward_points_of(const Forward& f, int64_t row, int64_t begin, int64_t end,
                              const Scratch& scratch) {
  if (!is_counted(f.problem, row)) return;
  const RowContext<S> c(f, row);
  if (needs_points(c)) row_points_of(c, finish_sums(c, scratch), begin, end, scratch);
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
  RowSums sums = finish_sums(c, scratch);
  finish_row(c, sums, begin, end, scratch);
}
