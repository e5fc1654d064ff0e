// Slopes of the soft term to the softened logits u = x/Ts and v = y/Tt of one block, from the saved
// statistics.
#pragma once

#include "common/rows/saved_row.h"
#include "common/vector/divergences.h"
#include "common/vector/mixture.h"
#include "common/vector/slopes.h"
#include "cpu/distill/first_pass.h"
#include "cpu/simd/exp.h"

namespace mfd::MFD_ISA {
namespace {

template <class S>
struct BackwardRow : SavedRow {
  typedef typename S::T T;
  const Backward& g;
  View x, y;
  Side mixed;    // y's, of several teachers
  double mix_t;  // temperature of several teachers, whose mixture has tt = 1
  int64_t index;

  BackwardRow(const BackwardRow&) = delete;
  BackwardRow(const Backward& backward, int64_t row, const Scratch& scratch)
      : SavedRow(saved_row<T>(backward, row)), g(backward), index(row) {
    const RowProblem& p = g.problem;
    x = {&p.student, row_offset(p.student, row), decoupled ? label : -1, {}};
    y = {&p.teacher, row_offset(p.teacher, row), x.excluded, {}};
    if (p.student.standardize) x.centre = row_centre<S>(x, p.classes, static_cast<T*>(scratch.block_x));
    const bool mixes = p.mixture != nullptr;
    if (mixes) {
      mix_teachers<S>(p, row, tt, scratch);
      mixed = mixed_side<S>(p.classes);
      mixed.data = scratch.mixture;
      y = {&mixed, 0, x.excluded, {}};
      mix_t = tt;
      tt = 1.0;
    } else if (p.teacher.standardize) {
      y.centre = row_centre<S>(y, p.classes, static_cast<T*>(scratch.block_y));
    }
    if (!decoupled) return;
    const double label_logit = logit_at<S>(x, label, scratch),
                 teachers_logit = logit_at<S>(y, label, scratch);
    const Odds at_one = mixes ? mixed_odds(p.mixture->count, scratch.teachers) : Odds{};
    set_label(*this, p, label_logit, teachers_logit, mixes ? &at_one : nullptr);
  }
};

// out = exp((x - max)/T)*exp(-lse), padded with zeros to a whole vector; all 0 beside a label that has
// everything.
template <class S>
static void probabilities(const typename S::T* x, int64_t n, double max, double lse,
                          const Exponent<S>& exponent, typename S::T* out) {
  typedef typename S::T T;
  const typename S::V m = S::splat(static_cast<T>(max)), factor = S::splat(static_cast<T>(inverse_mass(lse)));
  for (int64_t i = 0; i < n; i += S::kWidth)
    S::store(out + i, exponent(load_or_pad<S>(x + i, n - i, static_cast<T>(-kInf)) - m) * factor);
}

// Logarithms of the softened probabilities from the logits of one block:
//   log q = (x - mx)/Ts + shift, log p likewise, r = log p - log q = (y - my)/Tt - (x - mx)/Ts + shift.
// `close`: at one temperature and close maxima r = ((y - x) - (my - mx))/T + shift, exact where the teacher
// is near.
template <class S>
struct RowLogs {
  typedef typename S::V V;
  typedef typename S::T T;
  bool close;
  V mx, my, gap, ratio, inverse_s, inverse_t, shift, shift_s, shift_t;

  RowLogs(const LogScale& student, const LogScale& teacher) {
    close = are_near(student.block_max, teacher.block_max, teacher.inverse / student.inverse);
    mx = S::splat(static_cast<T>(student.block_max));
    my = S::splat(static_cast<T>(teacher.block_max));
    gap = my - mx;
    ratio = S::splat(static_cast<T>(teacher.inverse / student.inverse));
    inverse_s = S::splat(static_cast<T>(student.inverse));
    inverse_t = S::splat(static_cast<T>(teacher.inverse));
    shift_s = S::splat(static_cast<T>(student.shift));
    shift_t = S::splat(static_cast<T>(teacher.shift));
    shift = S::splat(static_cast<T>(teacher.shift - student.shift));
  }

  template <bool kClose>
  __attribute__((always_inline)) inline V r(V x, V y) const {
    const V d = kClose ? y - x - gap : S::fused(y - my, ratio, mx - x);
    return S::fused(d, inverse_s, shift);
  }
  __attribute__((always_inline)) inline V log_q(V x) const { return S::fused(x - mx, inverse_s, shift_s); }
  __attribute__((always_inline)) inline V log_p(V y) const { return S::fused(y - my, inverse_t, shift_t); }
};

// The divergence at one vector of logits and probabilities.
template <class S, bool kClose, class D>
MFD_INLINE Point<S> point_at(const D& divergence, const RowLogs<S>& logs, typename S::V x, typename S::V y,
                             typename S::V q, typename S::V p) {
  typedef typename S::V V;
  return divergence(q, p, logs.template r<kClose>(x, y), D::kTakesLogs ? logs.log_q(x) : V{},
                    D::kTakesLogs ? logs.log_p(y) : V{});
}

// The block's q, p and slopes without the label's class where it is decoupled; each array is one of scratch's
// blocks.
template <class S>
struct BlockSlopes {
  typename S::T *q, *p, *to_u, *to_v;
};

// Calls act(x, y, i) for every vector; lanes past the end are NaN.
template <class S, class Act>
MFD_INLINE void over_logit_pairs(const typename S::T* x, const typename S::T* y, int64_t n, const Act& act) {
  const typename S::T pad = static_cast<typename S::T>(kNan);
  int64_t i = 0;
  for (; i + S::kWidth <= n; i += S::kWidth) act(S::load(x + i), S::load(y + i), i);
  if (i < n) act(S::load_first(x + i, n - i, pad), S::load_first(y + i, n - i, pad), i);
}

template <class S, bool kClose>
static void linear_slopes(const LinearSlopes& s, const RowLogs<S>& logs, const typename S::T* x,
                          const typename S::T* y, int64_t n, const BlockSlopes<S>& b) {
  typedef typename S::V V;
  const LinearSlope<S> slope(s);
  over_logit_pairs<S>(x, y, n, [&](V logit_x, V logit_y, int64_t i) {
    const V r = logs.template r<kClose>(logit_x, logit_y);
    const V t = s.of_student ? -logs.log_q(logit_x) : r;
    const SlopePair<S> pair = slope(S::load(b.q + i), S::load(b.p + i), r, t);
    S::store(b.to_u + i, pair.to_u);
    S::store(b.to_v + i, pair.to_v);
  });
}

// Pointwise divergences: to_u = g - q*sum g, to_v = h - p*sum h.
template <class S, bool kClose, class D>
static void pointwise_slopes(const D& divergence, const RowLogs<S>& logs, const typename S::T* x,
                             const typename S::T* y, int64_t n, double sum_g, double sum_h,
                             const BlockSlopes<S>& b) {
  typedef typename S::T T;
  typedef typename S::V V;
  const V cq = S::splat(static_cast<T>(sum_g)), cp = S::splat(static_cast<T>(sum_h));
  over_logit_pairs<S>(x, y, n, [&](V logit_x, V logit_y, int64_t i) {
    const V q = S::load(b.q + i), p = S::load(b.p + i);
    const Point<S> point = point_at<S, kClose>(divergence, logs, logit_x, logit_y, q, p);
    S::store(b.to_u + i, point.g - q * cq);
    S::store(b.to_v + i, point.h - p * cp);
  });
}

template <class S, bool kClose>
static void slopes_of(const BackwardRow<S>& row, const RowLogs<S>& logs, const typename S::T* x,
                      const typename S::T* y, int64_t n, const BlockSlopes<S>& b) {
  const RowProblem& problem = row.g.problem;
  if (is_pointwise(problem.divergence)) {
    with_divergence<S>(problem, row.far, [&](const auto& divergence) {
      pointwise_slopes<S, kClose>(divergence, logs, x, y, n, row.mean_g, row.mean_h, b);
    });
    return;
  }
  linear_slopes<S, kClose>(row_linear_slopes(row, problem), logs, x, y, n, b);
}

template <class S>
static BlockSlopes<S> block_slopes(const BackwardRow<S>& row, const Exponent<S>& by_ts,
                                   const Exponent<S>& by_tt, const typename S::T* x, const typename S::T* y,
                                   int64_t n, const Scratch& scratch) {
  typedef typename S::T T;
  const BlockSlopes<S> b = {static_cast<T*>(scratch.exp_s), static_cast<T*>(scratch.exp_t),
                            static_cast<T*>(scratch.to_u), static_cast<T*>(scratch.to_v)};
  probabilities<S>(x, n, row.max_s, row.lse_s, by_ts, b.q);
  probabilities<S>(y, n, row.max_t, row.lse_t, by_tt, b.p);
  const RowLogs<S> logs(LogScale(row.max_s, row.max_s, row.ts, row.lse_s),
                        LogScale(row.max_t, row.max_t, row.tt, row.lse_t));
  if (logs.close) {
    slopes_of<S, true>(row, logs, x, y, n, b);
  } else {
    slopes_of<S, false>(row, logs, x, y, n, b);
  }
  return b;
}

// out = soft*to_u + hard*h - shift
template <class S>
static void combine_slopes(const typename S::T* to_u, const typename S::T* h, int64_t n, double soft,
                           double hard, double shift, typename S::T* out) {
  typedef typename S::T T;
  const typename S::V a = S::splat(static_cast<T>(soft)), b = S::splat(static_cast<T>(hard)),
                      c = S::splat(static_cast<T>(shift));
  for (int64_t i = 0; i < n; i += S::kWidth) {
    typename S::V g = a * S::load(to_u + i);
    if (h) g = g + (b * S::load(h + i) - c);
    S::store(out + i, g);
  }
}

}  // namespace
}  // namespace mfd::MFD_ISA
