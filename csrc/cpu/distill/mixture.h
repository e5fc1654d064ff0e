// Several teachers: a row of log p, p = sum_k w_k*softmax(y_k/Tt), stands in for the logits of one teacher at
// temperature 1.
#pragma once

#include "common/rows/target_math.h"
#include "cpu/distill/sums.h"
#include "cpu/rows/rows.h"
#include "cpu/runtime/kernels.h"
#include "cpu/simd/log.h"

namespace mfd::MFD_ISA {
namespace {

template <class S>
MFD_INLINE View teacher_view(const RowProblem& p, int64_t k, int64_t row, const Centre& centre) {
  const Side& side = p.mixture->teachers[k];
  return {&side, row_offset(side, row), -1, centre};
}

struct LogSumExp {
  double max, lse;  // log sum exp((x - max)/T)
};

// One pass over a row. NaN where it holds no distribution, -inf for a row without classes beside the
// excluded one.
template <class S>
static LogSumExp row_lse(const View& view, int64_t classes, double temperature, typename S::T* buffer) {
  typedef typename S::T T;
  const Exponent<S> exponent(temperature);
  double max = S::kLowest, sum = 0;
  for (int64_t start = 0; start < classes; start += kBlock) {
    const int64_t n = classes - start < kBlock ? classes - start : kBlock;
    const T* x = load_block<S>(view, start, n, buffer).x;
    const double top = block_max<S>(x, n);
    if (top > max) {
      sum *= block_weight(max, top, temperature);
      max = top;
    }
    sum += exponential_sum<S>(x, n, max, exponent);
  }
  return {max, log(sum == 0 && view.excluded < 0 ? kNan : sum)};
}

// log p_k of a vector of one teacher's logits, or log(w*p_k) without a rounding more.
template <class S>
MFD_INLINE LogOf<S> log_of_teacher(const TeacherRow& t, double temperature, double log_weight = 0) {
  return LogOf<S>(LogScale(t.max, t.max, temperature, t.lse - log_weight));
}

template <class S>
static void measure_teachers(const RowProblem& p, int64_t row, double temperature, const Scratch& scratch) {
  typedef typename S::T T;
  const Mixture& m = *p.mixture;
  T* buffer = static_cast<T*>(scratch.block_y);
  for (int64_t k = 0; k < m.count; ++k) {
    TeacherRow& t = scratch.teachers[k];
    t = {};
    t.weight = m.weights ? static_cast<const T*>(m.weights)[row * m.row_stride + k]
                         : 1.0 / static_cast<double>(m.count);
    View view = teacher_view<S>(p, k, row, {});
    if (view.side->standardize) view.centre = t.centre = row_centre<S>(view, p.classes, buffer);
    const LogSumExp soft = row_lse<S>(view, p.classes, temperature, buffer);
    t.max = soft.max;
    t.lse = soft.lse;
    if (p.divergence != Divergence::kNKD) continue;
    const double label = load_block<S>(view, p.labels[row], 1, buffer).x[0];
    view.excluded = p.labels[row];
    const LogSumExp rest = row_lse<S>(view, p.classes, 1.0, buffer);
    const Odds odds = odds_of(label - rest.max, 1.0, rest.lse);
    t.unit_max = rest.max;
    t.unit_lse = whole_lse(odds, label - rest.max, rest.lse);
    t.unit_label = odds.label;
    t.unit_rest = odds.rest;
  }
}

// log p = top + log sum_k exp(log(w_k p_k) - top), into scratch.mixture.
template <class S>
static void mix_teachers(const RowProblem& p, int64_t row, double temperature, const Scratch& scratch) {
  typedef typename S::T T;
  typedef typename S::V V;
  measure_teachers<S>(p, row, temperature, scratch);
  const V nothing = S::splat(static_cast<T>(-kInf));
  T* buffer = static_cast<T*>(scratch.block_y);
  T* sum = static_cast<T*>(scratch.block_out);
  for (int64_t start = 0; start < p.classes; start += kBlock) {
    const int64_t n = p.classes - start < kBlock ? p.classes - start : kBlock;
    T* top = static_cast<T*>(scratch.mixture) + start;
    const auto over_teachers = [&](const auto& act) {
      for (int64_t k = 0; k < p.mixture->count; ++k) {
        const TeacherRow& t = scratch.teachers[k];
        const LogOf<S> log_share = log_of_teacher<S>(t, temperature, log(t.weight));
        const T* y = load_block<S>(teacher_view<S>(p, k, row, t.centre), start, n, buffer).x;
        for (int64_t i = 0; i < n; i += S::kWidth) {
          const int64_t left = n - i < S::kWidth ? n - i : S::kWidth;
          act(k == 0, i, log_share(S::load_first(y + i, left, T(0))));
        }
      }
    };
    over_teachers([&](bool first, int64_t i, V log_share) {
      S::store(top + i, S::max(log_share, first ? nothing : S::load(top + i)));
    });
    over_teachers([&](bool first, int64_t i, V log_share) {
      const V above = S::load(top + i);
      const V e = S::exp_of(log_share - S::select(above == nothing, V{}, above));
      S::store(sum + i, first ? e : S::load(sum + i) + e);
    });
    for (int64_t i = 0; i < n; i += S::kWidth) {
      const V total = S::load(sum + i);
      const V log_p = S::select(total == V{}, nothing, S::load(top + i) + S::log_of(total));
      S::store(top + i, S::select(total == total, log_p, total));
    }
  }
}

// The side whose logits scratch.mixture holds.
template <class S>
MFD_INLINE Side mixed_side(int64_t classes) {
  const Dtype dtype = sizeof(typename S::T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
  return {nullptr, dtype, 1, 0, classes, classes, 1.0, 0.0, false};
}

}  // namespace
}  // namespace mfd::MFD_ISA
