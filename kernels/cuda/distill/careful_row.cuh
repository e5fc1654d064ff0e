// A row of the lean kernels that holds an infinity or a NaN, or has a label out of range: column by column,
// with every rule of the table of special values. Rare: no line of it is in the loops of the other rows.
#pragma once

#include "common/rows/row_terms.h"
#include "cuda/distill/launch.cuh"
#include "cuda/distill/sums.cuh"
#include "cuda/rows/packed.cuh"

namespace mfd {
namespace device {

#if defined(MFD_CUDA_EMULATOR)
#define MFD_APART static __attribute__((noinline))
#else
#define MFD_APART static __device__ __noinline__
#endif

// The functor of a pointwise divergence. common/vector/divergences.h
template <Divergence kDivergence>
struct PointwiseOf;
template <>
struct PointwiseOf<Divergence::kReverseKL> {
  typedef ReverseKL<F32> Type;
};
template <>
struct PointwiseOf<Divergence::kTVD> {
  typedef TVD<F32> Type;
};
template <>
struct PointwiseOf<Divergence::kJSD> {
  typedef JSD<F32> Type;
};
template <>
struct PointwiseOf<Divergence::kSkewKL> {
  typedef SkewKL<F32> Type;
};
template <>
struct PointwiseOf<Divergence::kSkewReverseKL> {
  typedef SkewReverseKL<F32> Type;
};

// The columns of a row, every threads()-th of them to this thread.
template <class Group, class Act>
MFD_INLINE void over_columns(const Group& group, int classes, const Act& act) {
  const int step = group.threads() * static_cast<int>(group.parts());
  for (int k = group.rank() + group.threads() * static_cast<int>(group.part()); k < classes; k += step)
    act(k);
}

// The row's part of the loss; writes the gradient. Apart, and what it gets lies in shared memory: the
// other rows shall not pay for it with registers or a stack.
template <Dtype kDtype, Divergence kDivergence, class Group>
MFD_APART double careful_row(const Forward& f, const Factors& factors, int64_t row) {
  const Group group(reinterpret_cast<typename Group::Shared*>(dynamic_shared()));
  sync_parts(group);
  const RowProblem& p = f.problem;
  const PackedRow<kDtype> of(p, f.grad, row);
  const double ts = at<float>(p.student_temperature, row), tt = at<float>(p.teacher_temperature, row);
  constexpr bool kUnit = kDivergence == Divergence::kNKD;
  const Wanted wanted{true, f.use_hard || kUnit, kUnit, false, false, decouples_target(kDivergence), kUnit};
  const Exponents<F32> exponents(ts, tt, kUnit, kDtype != Dtype::kFloat32);
  constexpr bool kDecouples = decouples_target(kDivergence);
  constexpr bool kPointwise = kDivergence != Divergence::kForwardKL && !kDecouples;
  int64_t label = kDecouples ? p.labels[row] : 0;
  const auto x_at = [&](int k) { return of.value(of.student, k); };
  const auto y_at = [&](int k) { return of.value(of.teacher, k); };
  // act(k) of this thread's columns, but for a decoupled label.
  const auto over_counted = [&](const auto& act) {
    over_columns(group, of.classes, [&](int k) {
      if (!kDecouples || k != label) act(k);
    });
  };

  double maxima[2] = {F32::kLowest, F32::kLowest};
  over_counted([&](int k) {
    maxima[0] = Max::of(maxima[0], static_cast<double>(x_at(k)));
    maxima[1] = Max::of(maxima[1], static_cast<double>(y_at(k)));
  });
  group.template reduce<Max>(maxima);
  const float max_s = static_cast<float>(maxima[0]), max_t = static_cast<float>(maxima[1]);

  double v[kUnit ? 6 : 5] = {};
  over_counted([&](int k) {
    const float tx = x_at(k) - max_s, ty = y_at(k) - max_t, e = exponents.student(tx),
                et = exponents.teacher(ty);
    v[0] += static_cast<double>(e);
    v[1] += static_cast<double>(et);
    // 0*log 0 = 0
    if (!exponents.teacher.vanishes(ty)) v[2] += static_cast<double>(et * fmaf(ty, exponents.ratio, -tx));
    v[3] += static_cast<double>(exponents.hard(e, tx));
    v[4] += static_cast<double>(tx);
    if constexpr (kUnit) v[5] += static_cast<double>(exponents.unit(et, ty));
  });
  group.template reduce<Sum>(v);
  RowSums sums{};
  sums.max_s = maxima[0];
  sums.max_t = maxima[1];
  sums.sum_s = v[0];
  sums.sum_t = v[1];
  sums.cross = v[2] / (ts * v[1]);
  sums.sum_h = v[3];
  if constexpr (kUnit) sums.sum_u = v[5];
  sums.mean_x = v[4] / static_cast<double>(p.classes);
  if (sums.cross == kInf) {  // of a p that is 0 as float32, nothing counts
    const float p_scale = static_cast<float>(1.0 / sums.sum_t);
    double cross[1] = {0};
    over_counted([&](int k) {
      const float tx = x_at(k) - max_s, ty = y_at(k) - max_t, probability = exponents.teacher(ty) * p_scale;
      const double of_teacher = kUnit ? 0.0 : static_cast<double>(ty) / tt;
      if (probability != 0.0f)
        cross[0] += static_cast<double>(probability) * (of_teacher - static_cast<double>(tx) / ts);
    });
    group.template reduce<Sum>(cross);
    sums.cross = cross[0];
  }
  if (!kDecouples && p.labels) label = p.labels[row];
  if (label < 0 || label >= p.classes) {
    sums.sum_s = sums.sum_t = sums.sum_h = kNan;
    label = 0;
  }
  reject_empty(sums, wanted);

  // act(k, point) of this thread's columns.
  const auto over_points = [&](const auto& act) {
    if constexpr (kPointwise) {
      const bool far = is_far(p, sums);
      const typename PointwiseOf<kDivergence>::Type divergence(p.first, can_be_far(p) ? far : p.second);
      const float inverse_s = static_cast<float>(1.0 / ts), q_scale = static_cast<float>(1.0 / sums.sum_s),
                  p_scale = static_cast<float>(1.0 / sums.sum_t);
      double moved = log(sums.sum_s) - log(sums.sum_t);
      if (is_of_mean(kDivergence))
        moved += rounding<float>(1.0 / sums.sum_t) - rounding<float>(1.0 / sums.sum_s);
      over_columns(group, of.classes, [&](int k) {
        const float tx = x_at(k) - max_s, ty = y_at(k) - max_t;
        const float r = fmaf(fmaf(ty, exponents.ratio, -tx), inverse_s, static_cast<float>(moved));
        act(k, divergence(exponents.student(tx) * q_scale, exponents.teacher(ty) * p_scale, r, 0.0f, 0.0f));
      });
    }
  };
  if constexpr (kPointwise) {
    double points[2] = {};
    over_points([&](int, const Point<F32>& point) {
      points[0] += static_cast<double>(point.value);
      points[1] += static_cast<double>(point.g);
    });
    group.template reduce<Sum>(points);
    sums.value = points[0] < 0 ? 0.0 : points[0];
    sums.g = sums.value != sums.value ? kNan : points[1];
  }

  const double label_s = static_cast<double>(x_at(static_cast<int>(label))) - sums.max_s;
  const double label_t = kDecouples ? static_cast<double>(y_at(static_cast<int>(label))) - sums.max_t : 0.0;
  if (kDecouples && f.use_hard && p.smoothing != 0) sums.mean_x += label_s / static_cast<double>(p.classes);
  const RowResult result = row_result(f, wanted, ts, tt, sums, label_s, label_t);
  const double weight = at<float>(f.weight, row);
  const double soft = weight * factors.soft, hard = weight * factors.hard;
  if (of.grad) {
    const Slopes slopes = row_slopes(f, wanted, soft, hard, ts, result);
    const float student = static_cast<float>(slopes.student), teacher = static_cast<float>(slopes.teacher);
    const float of_hard = static_cast<float>(slopes.hard), shift = static_cast<float>(slopes.shift);
    const float label_shift = static_cast<float>(slopes.label_shift);
    // `second`: what the teacher's slope multiplies.
    const auto write = [&](int k, float second) {
      const float tx = x_at(k) - max_s, e = exponents.student(tx);
      float g = e * student - second * teacher;
      if (wanted.hard) g = fmaf(exponents.hard(e, tx), of_hard, g) - (k == label ? label_shift : shift);
      if (kDecouples && k == label) g = -label_shift;
      store_one<float>(of.grad + int64_t{k} * of.kBytes, kDtype, g);
    };
    if constexpr (kPointwise) {
      over_points([&](int k, const Point<F32>& point) { write(k, point.g); });
    } else {
      over_columns(group, of.classes, [&](int k) { write(k, exponents.teacher(y_at(k) - max_t)); });
    }
  }
  sync_parts(group);
  return soft * result.soft + (f.use_hard ? hard * result.hard : 0.0);
}

}  // namespace device
}  // namespace mfd
