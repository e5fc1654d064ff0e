// Second pass over a row, from the exponentials and the differences of the logits that the first pass has
// left in scratch: f, g and h of every class of a pointwise divergence, then the student's gradient.
#pragma once

#include "common/rows/row_terms.h"
#include "common/vector/divergences.h"
#include "cpu/distill/first_pass.h"
#include "cpu/distill/gradient.h"
#include "cpu/rows/rows.h"

namespace mfd::MFD_ISA {
namespace {

template <class S>
MFD_INLINE bool needs_points(const RowContext<S>& c) {
  return c.f.use_soft && is_pointwise(c.f.problem.divergence);
}

// Sums of f, g and h over a block of exponentials e_s, e_t (times q_scale, p_scale the probabilities) and
// differences d: r = d/Ts + moved. With kKeep g takes the place of e_t, for the gradient, and the sum of h is
// left out.
template <class S, bool kKeep, class D>
static void block_points(const D& divergence, const LogScale& student, const LogScale& teacher,
                         const typename S::T* x, const typename S::T* y, const Kept<typename S::T>& kept,
                         int64_t n, double q_scale, double p_scale, double moved, BlockSums* out) {
  typedef typename S::T T;
  typedef typename S::V V;
  const V cq = S::splat(static_cast<T>(q_scale)), cp = S::splat(static_cast<T>(p_scale));
  const V inverse = S::splat(static_cast<T>(student.inverse));
  const V shift = S::splat(static_cast<T>(moved));
  const LogOf<S> log_q(student), log_p(teacher);
  V value{}, g{}, h{};
  // Lanes past the end hold q = p = 0 and r = NaN: nothing comes of them.
  for (int64_t i = 0; i < n; i += S::kWidth) {
    V logit_x{}, logit_y{};
    if (D::kTakesLogs) {
      const int64_t left = n - i < S::kWidth ? n - i : S::kWidth;
      logit_x = log_q(S::load_first(x + i, left, T(0)));
      logit_y = log_p(S::load_first(y + i, left, T(0)));
    }
    const V r = S::fused(S::load(kept.difference + i), inverse, shift);
    const Point<S> point =
        divergence(S::load(kept.es + i) * cq, S::load(kept.et + i) * cp, r, logit_x, logit_y);
    value = value + point.value;
    g = g + point.g;
    if (kKeep) {
      S::store(kept.et + i, point.g);
    } else {
      h = h + point.h;
    }
  }
  out->value = S::sum(value);
  out->g = S::sum(g);
  out->h = kKeep ? 0.0 : static_cast<double>(S::sum(h));
}

// The second pass over blocks [begin, end) of one row.
template <class S, bool kKeep>
static void row_points(const RowContext<S>& c, const RowSums& row, int64_t begin, int64_t end,
                       const Scratch& scratch) {
  typedef typename S::T T;
  const RowProblem& p = c.f.problem;
  const double lse_s = log(row.sum_s), lse_t = log(row.sum_t);
  const bool far = is_far(p, row);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t start = b * kBlock, n = p.classes - start < kBlock ? p.classes - start : kBlock;
    BlockSums& sums = scratch.sums[b];
    const LogScale student(sums.max_s, row.max_s, c.ts, lse_s), teacher(sums.max_t, row.max_t, c.tt, lse_t);
    const Kept<T> kept = {static_cast<T*>(scratch.exp_s) + start, static_cast<T*>(scratch.exp_t) + start,
                          nullptr, static_cast<T*>(scratch.difference) + start};
    const double q_scale = block_weight(sums.max_s, row.max_s, c.ts) / row.sum_s;
    const double p_scale = block_weight(sums.max_t, row.max_t, c.tt) / row.sum_t;
    double moved = teacher.shift - student.shift;
    if (is_of_mean(p.divergence)) moved += rounding<T>(p_scale) - rounding<T>(q_scale);
    with_divergence<S>(p, far, [&](const auto& divergence) {
      const T *x = nullptr, *y = nullptr;
      if (divergence.kTakesLogs) {
        x = c.student_block(start, n, scratch);
        y = load_block<S>(c.y, start, n, static_cast<T*>(scratch.block_y)).x;
      }
      block_points<S, kKeep>(divergence, student, teacher, x, y, kept, n, q_scale, p_scale, moved, &sums);
    });
  }
}

// d loss/d (transformed student logits) of one block.
template <class S>
MFD_INLINE void block_slope(const RowContext<S>& c, const RowSums& row, const Slopes& slopes, int64_t b,
                            int64_t n, bool stream, const Scratch& scratch, typename S::T* out) {
  typedef typename S::T T;
  const Forward& f = c.f;
  const int64_t start = b * kBlock;
  const BlockSums& sums = scratch.sums[b];
  const double ws = block_weight(sums.max_s, row.max_s, c.ts);
  GradientFactors<T> factors;
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
  LabelGradient<T> label{c.label - start, T(0)};
  if ((c.use_hard() || c.decoupled) && label.at >= 0 && label.at < n) {
    GradientFactors<T> own = factors;
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
  const RowProblem& p = f.problem;
  const int64_t size = dtype_size(p.student.dtype);
  char* out = static_cast<char*>(f.grad) + c.row * p.student.width * size;
  const bool direct = is_direct<S>(p.student) && !p.student.standardize;
  T* buffer = static_cast<T*>(scratch.block_out);
  T* capped = static_cast<T*>(scratch.capped);
  if (c.decoupled && capped) capped[c.label] = static_cast<T>(r.label + r.sums.max_s);
  const double weight = at<T>(f.weight, c.row);
  const double hard = c.use_hard() ? weight * f.hard_factor : 0.0;
  const Slopes slopes = row_slopes(f, c.wanted, weight * f.soft_factor, hard, c.ts, r);
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

}  // namespace
}  // namespace mfd::MFD_ISA
