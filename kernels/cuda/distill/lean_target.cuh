// DKD and NKD in the lean kernels: the sums run over the other classes than the label's, as those of a
// forward KL and of a cross-entropy. What a row comes to is computed in float64 by one thread of its group
// (common/rows/target_math.h).
#pragma once

#include "common/rows/row_terms.h"
#include "cuda/distill/careful_row.cuh"
#include "cuda/distill/lean_divergences.cuh"

namespace mfd {
namespace device {

// In shared memory, one for each group: what one thread computes for all.
struct TargetState {
  RowSums sums;
  double label_s, label_t;  // the label's logits less the maxima of the others
  Slopes slopes;
  double loss;
};

// Bytes of shared memory from the scratch to the states of the groups.
template <class Terms>
MFD_ROW_FN constexpr int target_states_at() {
  return (kScratchBytes + static_cast<int>(sizeof(Terms)) + 15) / 16 * 16;
}

template <class Terms, class Group>
MFD_INLINE TargetState& target_state(const ForwardLaunch& launch, const Group& group) {
  return reinterpret_cast<TargetState*>(dynamic_shared() + launch.states_at +
                                        target_states_at<Terms>())[group.index_in_block()];
}

// Loss and slopes from the sums. Apart: the registers of its logarithms are no others' concern.
template <int kUnused = 0>
MFD_APART void settle_target_row(const Forward& f, const Factors& factors, int64_t row, TargetState& state) {
  const double ts = at<float>(f.problem.student_temperature, row),
               tt = at<float>(f.problem.teacher_temperature, row);
  const Wanted wanted = wanted_sums(f);
  const RowResult r = row_result(f, wanted, ts, tt, state.sums, state.label_s, state.label_t);
  const double weight = at<float>(f.weight, row), soft = weight * factors.soft, hard = weight * factors.hard;
  state.slopes = row_slopes(f, wanted, soft, hard, ts, r);
  state.loss = soft * r.soft + (f.use_hard ? hard * r.hard : 0.0);
}

// Slope e*student - f*teacher, in which the part that both share is exactly 0 for equal rows.
template <Dtype kDtype, Divergence kDivergence, bool kLabels>
struct LeanTarget {
  typedef LeanSides<kDtype, kDivergence, kLabels> Sides;
  typedef LeanTerms<kDtype, kLabels> Terms;
  typedef typename Terms::Total Total;
  typedef Packed<kDtype> Pack;
  typedef LeanSums<kDivergence, kLabels> Sums;
  static constexpr int kPoints = 0;
  float quotient = 0, factor = 0, extra = 0;
  float value = 0;  // NaN for a row that has to be done with care; the loss is the state's

  MFD_DEVICE LeanTarget(const Terms&, const Sides&, const Total (&)[Sums::kCount], float) {}

  template <class Group>
  MFD_DEVICE void settle_row(const Group& group, const Forward& f, const Terms& terms, int64_t row,
                             const Total (&v)[Sums::kCount], double label_s, double label_t,
                             TargetState& state) {
    if (group.rank() == 0) {
      const double nats = Terms::S::nats(1.0f, terms.ts), classes = static_cast<double>(f.problem.classes);
      RowSums sums{};
      sums.sum_s = v[Sums::kStudent];
      sums.sum_t = v[Sums::kTeacher];
      sums.cross = nats * v[Sums::kCross] / sums.sum_t;
      if constexpr (Sums::kAtOne) sums.sum_h = v[Sums::kHard];
      if constexpr (Sums::kCrossEntropy) sums.sum_u = v[Sums::kUnit];
      if constexpr (kLabels) {
        if (terms.smoothing != 0) sums.mean_x = (v[Sums::kShifted] * (nats * terms.ts) + label_s) / classes;
      }
      state.sums = sums;
      state.label_s = label_s;
      state.label_t = label_t;
      settle_target_row(f, terms.factors, row, state);
    }
    group.sync();
    const Slopes& slopes = state.slopes;
    const double ratio = v[Sums::kTeacher] / v[Sums::kStudent];
    quotient = static_cast<float>(ratio);
    factor = static_cast<float>(slopes.teacher);
    extra = static_cast<float>(slopes.student - slopes.teacher * ratio);
    value = static_cast<float>(0.0 * state.loss);
  }

  MFD_DEVICE void slope(const Sides&, const Pack&, const Pack&, const float (&e)[8], const float (&f)[8],
                        float shift, float (&g)[8]) const {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float difference = fmaf(e[k], quotient, -f[k]);
      if constexpr (kDivergence == Divergence::kDKD) {
        g[k] = fmaf(difference, factor, kLabels ? fmaf(e[k], extra, -shift) : e[k] * extra);
      } else {
        g[k] = kLabels ? fmaf(difference, factor, -shift) : difference * factor;
      }
    }
  }
};

template <Dtype kDtype, bool kLabels>
struct LeanDivergence<kDtype, Divergence::kDKD, kLabels> : LeanTarget<kDtype, Divergence::kDKD, kLabels> {
  using LeanTarget<kDtype, Divergence::kDKD, kLabels>::LeanTarget;
};
template <Dtype kDtype, bool kLabels>
struct LeanDivergence<kDtype, Divergence::kNKD, kLabels> : LeanTarget<kDtype, Divergence::kNKD, kLabels> {
  using LeanTarget<kDtype, Divergence::kNKD, kLabels>::LeanTarget;
};

}  // namespace device
}  // namespace mfd
