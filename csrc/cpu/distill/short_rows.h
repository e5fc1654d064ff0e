// The common case of rows that fit a block: forward KL and cross-entropy of logits that are read where they
// lie, at one temperature each, for the loss and its gradient. All that does not depend on the row is found
// once for all of them; the arithmetic is that of forward.h.
#pragma once

#include "common/rows/row_terms.h"
#include "cpu/distill/forward.h"

namespace mfd::MFD_ISA {
namespace {

template <class S>
MFD_INLINE bool is_short_case(const Forward& f) {
  const RowProblem& p = f.problem;
  return f.use_soft &&
         (p.divergence == Divergence::kForwardKL || p.divergence == Divergence::kCrossEntropy) &&
         !p.mixture && p.classes <= kBlock && is_direct<S>(p.student) && is_direct<S>(p.teacher) &&
         !p.student.standardize && !p.teacher.standardize && !p.student_temperature.rows &&
         !p.teacher_temperature.rows && p.smoothing == 0 && !f.stats && !f.student_entropy &&
         p.student.width == p.classes;
}

template <class S>
struct ShortRows {
  typedef typename S::T T;
  const Forward& f;
  const RowProblem& p;
  const Scratch& scratch;
  const double ts, tt;
  const Wanted wanted;
  const int hard;
  const Scales<S> scales;
  const int64_t n, stride;  // classes; elements of a scratch row

  ShortRows(const Forward& forward, const Scratch& s)
      : f(forward),
        p(forward.problem),
        scratch(s),
        ts(p.student_temperature.value),
        tt(p.teacher_temperature.value),
        wanted(wanted_sums(f)),
        hard(wanted.hard ? hard_mode(ts) : kNoHard),
        scales(ts, tt, wanted.cross_entropy),
        n(p.classes),
        stride((n + kRowAlign - 1) / kRowAlign * kRowAlign) {}

  const T* student(int64_t row) const {
    return static_cast<const T*>(p.student.data) + row_offset(p.student, row);
  }
  Kept<T> kept(int64_t k) const {
    const Kept<T> first = {static_cast<T*>(scratch.exp_s), static_cast<T*>(scratch.exp_t),
                           static_cast<T*>(scratch.exp_h ? scratch.exp_h : scratch.exp_s), nullptr};
    return {first.es + k * stride, first.et + k * stride, first.eh + k * stride, nullptr};
  }

  // First pass, into the k-th scratch row.
  void sums(int64_t row, int64_t k) const {
    const T* x = student(row);
    const T* y = static_cast<const T*>(p.teacher.data) + row_offset(p.teacher, row);
    BlockSums& out = scratch.sums[k];
    out.max_s = block_max<S>(x, n);
    out.max_t = block_max<S>(y, n);
    const Ahead ahead = {reinterpret_cast<const char*>(x + n), reinterpret_cast<const char*>(y + n),
                         sizeof(T), sizeof(T)};
    block_sums_of<S, kCross>(hard, x, y, n, scales, ahead, kept(k), &out);
  }

  // Values and gradient; false where a student logit of -inf needs the general road.
  bool finish(int64_t row, int64_t k) const {
    const BlockSums& s = scratch.sums[k];
    RowSums row_sums{};
    row_sums.max_s = s.max_s;
    row_sums.max_t = s.max_t;
    row_sums.sum_s = s.sum_s;
    row_sums.sum_t = s.sum_t;
    row_sums.sum_h = s.sum_h;
    row_sums.cross = s.cross / (ts * s.sum_t);
    if (row_sums.cross == kInf) return false;
    reject_empty(row_sums, wanted);
    const int64_t label = f.use_hard ? label_of(p, row) : -1;
    const double label_logit = label >= 0 ? static_cast<double>(student(row)[label]) - s.max_s : 0.0;
    RowResult r = row_result(f, wanted, ts, tt, row_sums, label_logit, 0.0);
    if (label < 0) r.hard = 0;
    const double weight = at<T>(f.weight, row);
    if (f.row_loss) {
      const double weighted = f.soft_factor * r.soft + (label >= 0 ? f.hard_factor * r.hard : 0.0);
      f.row_loss[row] = weight * weighted;
    }
    put<T>(f.soft, row, r.soft);
    put<T>(f.hard, row, r.hard);
    const double hard_factor = label >= 0 ? weight * f.hard_factor : 0.0;
    if (f.grad) gradient(row, label, k, row_slopes(f, wanted, weight * f.soft_factor, hard_factor, ts, r));
    return true;
  }

  void gradient(int64_t row, int64_t own, int64_t k, const Slopes& slopes) const {
    const Kept<T> e = kept(k);
    GradientFactors<T> factors = {static_cast<T>(slopes.student), static_cast<T>(slopes.teacher),
                                  static_cast<T>(f.use_hard ? slopes.hard : 0.0),
                                  static_cast<T>(slopes.shift)};
    LabelGradient<T> label{own, T(0)};
    if (own >= 0) {
      GradientFactors<T> at_label = factors;
      at_label.shift = static_cast<T>(slopes.label_shift);
      label.value = gradient_at<T>(hard, true, e.es[label.at], e.et[label.at], e.eh[label.at], at_label);
    }
    T* out = static_cast<T*>(f.grad) + row * n;
    block_gradient_of<S, true>(hard, e.es, e.et, e.eh, n, factors, f.stream, label, out);
  }
};

// In groups that fill a block, so that one row's sums need not be known before the next begins.
template <class S>
static void short_rows_of(const Forward& f, int64_t begin, int64_t end, const Scratch& scratch) {
  const ShortRows<S> rows(f, scratch);
  const int64_t group = kBlock / rows.stride;
  for (int64_t first = begin; first < end; first += group) {
    const int64_t last = end - first < group ? end : first + group;
    for (int64_t row = first; row < last; ++row)
      if (is_counted(f.problem, row)) rows.sums(row, row - first);
    bool general[kBlock / kRowAlign] = {};
    for (int64_t row = first; row < last; ++row) {
      if (!is_counted(f.problem, row)) {
        skip_row<S>(f, row);
      } else {
        general[row - first] = !rows.finish(row, row - first);
      }
    }
    for (int64_t row = first; row < last; ++row)
      if (general[row - first]) forward_rows_of<S>(f, row, row + 1, scratch);
  }
}

}  // namespace
}  // namespace mfd::MFD_ISA
