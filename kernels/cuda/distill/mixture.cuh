// Several teachers: a row of log p, p = sum_k w_k*softmax(y_k/Tt), stands in for the logits of one teacher at
// temperature 1. It lies in shared memory where it fits, else in a scratch row of the group.
#pragma once

#include "common/rows/target_math.h"
#include "common/vector/mixture.h"
#include "cuda/rows/rows.cuh"
#include "cuda/rows/teachers.cuh"

namespace mfd {
namespace device {

// Mixture and its temperature, by value.
struct DeviceMixture {
  Side sides[kMaxTeachers];
  int count;
  const void* weights;
  int64_t row_stride;
  RowScalar temperature;
};

// One row of one teacher. offset: log w - log sum exp of the softened logits.
struct TeacherState : TeacherRow {
  const unsigned char* data;
  double offset;
};

// The mixture of a row, in place of OneTeacher.
template <class S>
struct MixedTeacher {
  typedef typename S::T T;
  static constexpr bool kMixed = true;
  static constexpr int N = VectorOf<S>::kColumns;
  static constexpr Dtype kDtype = sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;

  const unsigned char* mixed;  // where column 0 of log p lies, or would lie
  unsigned char* slopes;       // a row for dD/d(log p); null where nothing asks for it
  double label;                // log p of the label
  Odds odds;                   // of the label at temperature 1, of NKD

  MFD_DEVICE double teacher_logit(const View&, const unsigned char*, int64_t) const { return label; }
  MFD_DEVICE const Odds* odds_at_one() const { return &odds; }
  MFD_DEVICE bool wants_gradients() const { return slopes != nullptr; }

  // Keeps dD/d(log p) of a vector, with that of the label of a decoupled target, minus its rest_shift.
  MFD_DEVICE void keep_slopes(int64_t start, int64_t decoupled, double rest_shift, const T (&to_v)[N]) const {
    if (!slopes) return;
    T kept[N];
#pragma unroll
    for (int k = 0; k < N; ++k) kept[k] = start + k == decoupled ? static_cast<T>(-rest_shift) : to_v[k];
    store_wide(slopes + start * int64_t{sizeof(T)}, kDtype, kept);
  }
};

MFD_INLINE View teacher_view(const Side& side, const TeacherState& t) {
  return {&side, t.data, is_aligned(t.data) && side.dtype != Dtype::kFloat64, -1, t.centre};
}

struct LogSumExp {
  double max, lse;  // log sum exp((y - max)/T)
};

// One pass over a row. NaN where it holds no distribution, -inf for a row without classes beside the
// excluded one.
template <class S, class Group>
MFD_INLINE LogSumExp row_lse(const Group& group, const View& view, const Span& span, int64_t classes,
                             double temperature, bool fast) {
  typedef typename S::T T;
  constexpr int N = VectorOf<S>::kColumns;
  const Exponent<S> exponent(temperature, fast);
  T max = S::kLowest, sum = 0;
  over_vectors<S>(group, span, [&](int64_t start) {
    T y[N];
    load_logits<S, false>(view, start, classes, y);
    const T top = largest_of<S>(y, max);
    if (top > max) {
      sum = sum * exponent(max - top);
      max = top;
    }
#pragma unroll
    for (int k = 0; k < N; ++k) y[k] = exponent(y[k] - max);
    sum = sum + sum_of(y);
  });
  double top[1] = {static_cast<double>(max)};
  group.template reduce<Max>(top);
  double total[1] = {static_cast<double>(sum) * static_cast<double>(exponent(max - static_cast<T>(top[0])))};
  group.template reduce<Sum>(total);
  return {top[0], log(total[0] == 0 && view.excluded < 0 ? kNan : total[0])};
}

// Reads every teacher's row once, and again what standardises it and NKD's sum at temperature 1.
template <class S, class Group>
MFD_INLINE void measure_teachers(const Group& group, const DeviceMixture& m, const RowProblem& p, int64_t row,
                                 int64_t label, const Span& span, TeacherState* states) {
  typedef typename S::T T;
  const double temperature = at<T>(m.temperature, row);
  for (int k = 0; k < m.count; ++k) {
    TeacherState t{};
    const bool fast = size_of(m.sides[k].dtype) == 2;
    View view = view_of<S>(m.sides[k], row, -1);
    t.data = view.data;
    t.weight = m.weights ? static_cast<double>(static_cast<const T*>(m.weights)[row * m.row_stride + k])
                         : 1.0 / static_cast<double>(m.count);
    if (view.side->standardize) find_centre<S, false>(group, view, view.data, span, p.classes);
    t.centre = view.centre;
    const LogSumExp soft = row_lse<S>(group, view, span, p.classes, temperature, fast);
    t.max = soft.max;
    t.lse = soft.lse;
    t.offset = log(t.weight) - t.lse;
    if (p.divergence == Divergence::kNKD) {
      const double logit = logit_at<S>(view, view.data, label);
      view.excluded = label;
      const LogSumExp rest = row_lse<S>(group, view, span, p.classes, 1.0, fast);
      const Odds odds = odds_of(logit - rest.max, 1.0, rest.lse);
      t.unit_max = rest.max;
      t.unit_lse = whole_lse(odds, logit - rest.max, rest.lse);
      t.unit_label = odds.label;
      t.unit_rest = odds.rest;
    }
    if (group.rank() == 0) states[k] = t;
  }
  group.sync();
}

// log sum_k exp(l_k) of one class, term by term.
template <class S>
struct LogSum {
  typedef typename S::T T;
  T top = static_cast<T>(-kInf), total = 0;

  MFD_DEVICE void add(T l) {
    if (l == static_cast<T>(-kInf)) return;
    const T d = l - top, e = exp_of(d > T(0) ? -d : d);
    total = d > T(0) ? S::fma(total, e, T(1)) : total + e;
    top = d > T(0) ? l : top;
  }
  MFD_DEVICE T value() const {
    if (total != total) return total;
    return total == T(0) ? static_cast<T>(-kInf) : top + log_of(total);
  }
};

// log(w_k*p_k) of a logit; `inverse` = 1/Tt.
template <class S>
MFD_INLINE typename S::T log_share(const TeacherState& t, typename S::T inverse, typename S::T y) {
  typedef typename S::T T;
  return S::fma(y - static_cast<T>(t.max), inverse, static_cast<T>(t.offset));
}

// Writes this group's part of log p to `mixed`, where column 0 would lie; what MixedTeacher knows of it.
template <class S, class Group>
MFD_INLINE MixedTeacher<S> mix_teachers(const Group& group, const DeviceMixture& m, const RowProblem& p,
                                        int64_t row, int64_t label, const Span& span, TeacherState* states,
                                        unsigned char* mixed) {
  typedef typename S::T T;
  typedef MixedTeacher<S> Mixed;
  constexpr int N = VectorOf<S>::kColumns;
  measure_teachers<S>(group, m, p, row, label, span, states);
  const T inverse = static_cast<T>(1.0 / at<T>(m.temperature, row));
  over_vectors<S>(group, span, [&](int64_t start) {
    LogSum<S> sums[N];
    for (int k = 0; k < m.count; ++k) {
      const TeacherState& t = states[k];
      T y[N];
      load_logits<S, false>(teacher_view(m.sides[k], t), start, p.classes, y);
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i].add(log_share<S>(t, inverse, y[i]));
    }
    T log_p[N];
#pragma unroll
    for (int i = 0; i < N; ++i) log_p[i] = sums[i].value();
    store_wide(mixed + start * int64_t{sizeof(T)}, Mixed::kDtype, log_p);
  });
  Mixed result{mixed, nullptr, 0.0, {}};
  if (label >= 0) {
    LogSum<S> sum;
    for (int k = 0; k < m.count; ++k) {
      const View view = teacher_view(m.sides[k], states[k]);
      sum.add(log_share<S>(states[k], inverse, static_cast<T>(logit_at<S>(view, view.data, label))));
    }
    result.label = static_cast<double>(sum.value());
    if (p.divergence == Divergence::kNKD) result.odds = mixed_odds(int64_t{m.count}, states);
  }
  group.sync();
  return result;
}

// The label of a row, 0 for one out of range, -1 without one.
MFD_INLINE int64_t readable_label(const RowProblem& p, int64_t row) {
  if (!is_labelled(p, row)) return -1;
  const int64_t label = p.labels[row];
  return label < 0 || label >= p.classes ? 0 : label;
}

}  // namespace device
}  // namespace mfd
