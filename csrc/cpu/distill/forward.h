// Forward of rows, in groups or in blocks: both passes, and the values of a row from its sums.
#pragma once

#include "common/rows/row_terms.h"
#include "common/vector/mixture.h"
#include "cpu/distill/second_pass.h"

namespace mfd::MFD_ISA {
namespace {

// E_p[v - u] again where a student logit is -inf: terms whose p underflows in the compute dtype count as 0.
template <class S>
static double infinite_cross(const RowContext<S>& c, const RowSums& row, const Scratch& scratch) {
  typedef typename S::T T;
  const RowProblem& p = c.f.problem;
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
      const double v = c.wanted.cross_entropy ? 0.0 : (static_cast<double>(y.x[i]) - row.max_t) / c.tt;
      cross += probability * (v - u);
    }
  }
  return cross;
}

// First index of the maximum, as torch.argmax; -1 in a row with NaN.
template <class S>
static int64_t first_argmax(View view, int64_t classes, const Scratch& scratch) {
  typedef typename S::T T;
  view.excluded = -1;
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

template <class S>
MFD_INLINE RowResult row_result_of(const RowContext<S>& c, RowSums sums, const Scratch& scratch) {
  const Forward& f = c.f;
  if (sums.cross == kInf && !needs_points(c)) sums.cross = infinite_cross(c, sums, scratch);
  const double label = c.use_hard() || c.decoupled ? logit_at<S>(c.x, c.label, scratch) - sums.max_s : 0.0;
  const double label_t = c.decoupled ? logit_at<S>(c.y, c.label, scratch) - sums.max_t : 0.0;
  Odds at_one{};
  const bool mixes = c.wanted.unit && c.has_mixture();
  if (mixes) at_one = mixed_odds(f.problem.mixture->count, scratch.teachers);
  RowResult r = row_result(f, c.wanted, c.ts, c.tt, sums, label, label_t, mixes ? &at_one : nullptr);
  if (!c.use_hard()) r.hard = 0;
  return r;
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
    if (c.label < 0) {
      q = q_teacher = 0;
    } else if (!c.decoupled) {
      q = exp(r.label / c.ts) / sums.sum_s;
      q_teacher = exp((logit_at<S>(c.y, c.label, scratch) - sums.max_t) / c.tt) / sums.sum_t;
    }
    put<T>(f.student_label_prob, c.row, q);
    put<T>(f.teacher_label_prob, c.row, q_teacher);
  }
  if (!f.agreement) return;
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

template <class S>
MFD_INLINE RowSums finish_sums(const RowContext<S>& c, const Scratch& scratch) {
  const RowProblem& p = c.f.problem;
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
  const RowProblem& p = f.problem;
  const int64_t teachers = f.use_soft && p.mixture ? p.mixture->count : 0;
  const bool prepared = p.student.standardize || p.teacher.standardize || teachers;
  const bool per_row = p.student_temperature.rows || p.teacher_temperature.rows || teachers;
  Scales<S> scales(f.use_soft ? p.student_temperature.value : 1.0,
                   f.use_soft ? p.teacher_temperature.value : 1.0, is_cross_entropy(p.divergence));
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
      if (per_row) scales = Scales<S>(c.ts, c.tt, c.wanted.cross_entropy);
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
  row_sums<S>(c, Scales<S>(c.ts, c.tt, c.wanted.cross_entropy), begin, end, scratch);
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

}  // namespace
}  // namespace mfd::MFD_ISA
