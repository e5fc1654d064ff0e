// First pass over a row: what does not depend on the block, single logits, and the sums of its blocks.
#pragma once

#include "common/rows/row_terms.h"
#include "cpu/distill/mixture.h"
#include "cpu/distill/sums.h"
#include "cpu/rows/rows.h"
#include "cpu/runtime/kernels.h"

namespace mfd::MFD_ISA {
namespace {

template <class S>
struct RowContext {
  typedef typename S::T T;
  const Forward& f;
  int64_t row, label;  // -1 where there is none
  double ts, tt;
  bool decoupled;  // the divergence decouples the label's class
  int hard;        // where the exponentials at temperature 1 come from
  Wanted wanted;
  View x, y;
  Side mixed;  // y's, of several teachers

  RowContext(const Forward& forward, int64_t r) : f(forward), row(r) {
    const RowProblem& p = f.problem;
    label = label_of(p, row);
    // Without the soft term the student's exponentials are those of the cross-entropy.
    ts = f.use_soft ? at<T>(p.student_temperature, row) : 1.0;
    tt = f.use_soft ? at<T>(p.teacher_temperature, row) : 1.0;
    decoupled = f.use_soft && decouples_target(p.divergence);
    wanted = wanted_sums(f);
    hard = wanted.hard ? hard_mode(ts) : kNoHard;
    x = {&p.student, row_offset(p.student, row), decoupled ? label : -1, {}};
    y = {&p.teacher, f.use_soft ? row_offset(p.teacher, row) : 0, x.excluded, {}};
    if (!has_mixture()) return;
    tt = 1.0;
    mixed = mixed_side<S>(p.classes);
    y = {&mixed, 0, x.excluded, {}};
  }
  RowContext(const RowContext&) = delete;

  bool has_mixture() const { return f.use_soft && f.problem.mixture; }
  bool use_hard() const { return f.use_hard && label >= 0; }

  // What needs the whole row before the first pass: the standardised sides' centres, kept in the row's first
  // block, and the mixture of several teachers.
  inline void prepare(const Scratch& scratch) {
    if (has_mixture()) {
      mix_teachers<S>(f.problem, row, at<T>(f.problem.teacher_temperature, row), scratch);
      mixed.data = scratch.mixture;
    }
    if (x.side->standardize)
      x.centre = scratch.sums->student =
          row_centre<S>(x, f.problem.classes, static_cast<T*>(scratch.block_x));
    if (f.use_soft && y.side->standardize)
      y.centre = scratch.sums->teacher =
          row_centre<S>(y, f.problem.classes, static_cast<T*>(scratch.block_y));
  }
  inline void recall(const Scratch& scratch) {
    mixed.data = scratch.mixture;
    if (x.side->standardize) x.centre = scratch.sums->student;
    if (y.side->standardize) y.centre = scratch.sums->teacher;
  }

  // The student's logits after the first pass, which leaves transformed ones in scratch.
  inline const T* student_block(int64_t start, int64_t n, const Scratch& scratch) const {
    if (scratch.capped) return static_cast<const T*>(scratch.capped) + start;
    return load_block<S>(x, start, n, static_cast<T*>(scratch.block_x)).x;
  }
};

// Where this row's next block, or the next row's first one, lies.
template <class S>
MFD_INLINE Ahead ahead_of(const RowProblem& p, const Block<S>& x, const Block<S>& y) {
  const int64_t sx = dtype_size(p.student.dtype), sy = dtype_size(p.teacher.dtype);
  const int64_t distance = p.classes < kBlock ? p.classes : kBlock;
  return {x.raw + distance * sx, y.raw + distance * sy, sx, sy};
}

// Transformed value of one logit, also of the excluded class.
template <class S>
static double logit_at(View view, int64_t column, const Scratch& scratch) {
  view.excluded = -1;
  return static_cast<double>(
      load_block<S>(view, column, 1, static_cast<typename S::T*>(scratch.block_out)).x[0]);
}

// sum (x - max) over a block; the excluded class, of which `x` says -inf, counts too.
template <class S>
static double block_shifted_total(const RowContext<S>& c, typename S::T* x, int64_t start, int64_t n,
                                  double max, const Scratch& scratch) {
  typedef typename S::T T;
  const int64_t label = c.x.excluded - start;
  if (label < 0 || label >= n) return block_shifted_sum<S>(x, n, max);
  const double logit = logit_at<S>(c.x, c.label, scratch);
  x[label] = static_cast<T>(max);
  const double total = block_shifted_sum<S>(x, n, max) + (logit - max);
  x[label] = static_cast<T>(-kInf);
  return total;
}

// First pass over blocks [begin, end) of one row.
template <class S>
static void row_sums(const RowContext<S>& c, const Scales<S>& scales, int64_t begin, int64_t end,
                     const Scratch& scratch) {
  typedef typename S::T T;
  const Forward& f = c.f;
  const RowProblem& p = f.problem;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t start = b * kBlock, n = p.classes - start < kBlock ? p.classes - start : kBlock;
    T* x_buffer = scratch.capped ? static_cast<T*>(scratch.capped) + start : static_cast<T*>(scratch.block_x);
    const Block<S> x = load_block<S>(c.x, start, n, x_buffer);
    Block<S> y = x;
    if (f.use_soft) y = load_block<S>(c.y, start, n, static_cast<T*>(scratch.block_y));
    T* es = static_cast<T*>(scratch.exp_s) + start;
    T* et = static_cast<T*>(scratch.exp_t) + start;
    const Kept<T> kept = {es, et, scratch.exp_h ? static_cast<T*>(scratch.exp_h) + start : es,
                          scratch.difference ? static_cast<T*>(scratch.difference) + start : es};
    BlockSums& out = scratch.sums[b];
    out.max_s = block_max<S>(x.x, n);
    out.max_t = f.use_soft ? block_max<S>(y.x, n) : T(0);
    const Ahead ahead = ahead_of<S>(p, x, y);
    if (!f.use_soft) {
      block_sums<S, kNoSoft, 1>(x.x, x.x, n, scales, ahead, kept, &out);
    } else if (!is_pointwise(p.divergence)) {
      block_sums_of<S, kCross>(c.hard, x.x, y.x, n, scales, ahead, kept, &out);
    } else if (are_near(out.max_s, out.max_t, c.ts / c.tt)) {
      block_sums_of<S, kSubtracted>(c.hard, x.x, y.x, n, scales, ahead, kept, &out);
    } else {
      block_sums_of<S, kFused>(c.hard, x.x, y.x, n, scales, ahead, kept, &out);
    }
    out.sum_x = 0;
    if (f.use_hard && p.smoothing != 0) {
      out.sum_x = c.decoupled ? block_shifted_total<S>(c, const_cast<T*>(x.x), start, n, out.max_s, scratch)
                              : block_shifted_sum<S>(x.x, n, out.max_s);
    }
    if (c.wanted.unit && !c.has_mixture()) {
      out.sum_u = c.tt == 1.0 ? out.sum_t : block_unit_sum_of<S>(hard_mode(c.tt), et, y.x, n, out.max_t);
    }
    if (c.wanted.dot_s) out.dot_s = weighted_sum<S>(es, x.x, n, out.max_s);
    if (c.wanted.dot_t) out.dot_t = weighted_sum<S>(et, y.x, n, out.max_t);
  }
}

}  // namespace
}  // namespace mfd::MFD_ISA
