// What a row's sums come to: the terms, the saved statistics, the by-products, and the slopes of the
// gradient.
#pragma once

#include "common/rows/row_math.h"
#include "common/rows/target_math.h"

namespace mfd {

// What a row comes to; `k` is what T^2 multiplies.
struct RowResult {
  RowSums sums;
  Target target;
  double k, rest, soft, hard;
  double label, label_t;  // x_label - max_s, y_label - max_t, where they matter
  double lse_h;           // log sum exp(x - max_s) over all classes
};

// d loss/dx_j = student*e_s - teacher*e_t + hard*e_h - shift, with label_shift at the label; e relative to
// the row's maxima, e_t = q*df/dq for the pointwise divergences. The e of a decoupled label are 0.
struct Slopes {
  double student, teacher, hard, shift, label_shift;
};

// 0 of a number over 0.
MFD_ROW_FN double ratio_or_zero(double a, double b) {
  return b == 0 && a == a ? 0.0 : a / b;
}

MFD_ROW_FN double rest_divergence(const RowSums& sums, bool unit) {
  if (sums.sum_t == 0) return 0.0;
  if (sums.sum_s == 0) return kInf;
  return unit ? sums.cross + log(sums.sum_s) : forward_kl(sums);
}

MFD_ROW_FN Wanted wanted_sums(const Forward& f) {
  const bool unit = f.use_soft && f.problem.divergence == Divergence::kNKD;
  const bool entropies = f.student_entropy != nullptr;
  const bool decoupled = f.use_soft && decouples_target(f.problem.divergence);
  const bool cross_entropy = f.use_soft && is_cross_entropy(f.problem.divergence);
  return {f.use_soft, f.use_hard || unit, unit, entropies, entropies, decoupled, cross_entropy};
}

// The labels' logits are relative to the maxima; `at_one` are the odds of several teachers at T = 1, null for
// one.
MFD_ROW_FN RowResult row_result(const Forward& f, const Wanted& wanted, double ts, double tt,
                                const RowSums& sums, double label, double label_t,
                                const Odds* at_one = nullptr) {
  const RowProblem& p = f.problem;
  RowResult r{};
  r.sums = sums;
  r.label = label;
  r.label_t = label_t;
  if (wanted.hard) r.lse_h = log(sums.sum_h);
  if (wanted.decoupled) {
    r.target.student = odds_of(label, ts, log(sums.sum_s));
    r.target.teacher = odds_of(label_t, tt, log(sums.sum_t));
    if (wanted.hard) {
      r.target.hard_student = odds_of(label, 1.0, r.lse_h);
      r.lse_h = whole_lse(r.target.hard_student, label, r.lse_h);
    }
    if (wanted.unit) r.target.hard_teacher = at_one ? *at_one : odds_of(label_t, 1.0, log(sums.sum_u));
    r.rest = rest_divergence(sums, wanted.unit);
    r.k = target_divergence(p, r.target, r.rest);
  } else if (f.use_soft) {
    r.k = is_pointwise(p.divergence) ? sums.value
          : wanted.cross_entropy     ? cross_entropy_of_teacher(sums)
                                     : forward_kl(sums);
  }
  if (f.use_soft) r.soft = p.scale_by_temperature ? ts * ts * r.k : r.k;
  if (wanted.unit) r.soft += target_slopes(p, r.target).target_loss;
  if (f.use_hard) r.hard = cross_entropy(sums, r.lse_h, label, p.smoothing);
  return r;
}

// `soft_factor`, `hard_factor`: d loss/d soft and d loss/d hard of this row.
MFD_ROW_FN Slopes row_slopes(const Forward& f, const Wanted& wanted, double soft_factor, double hard_factor,
                             double ts, const RowResult& r) {
  const RowProblem& p = f.problem;
  // d soft/dx = (Ts^2 or 1)/Ts * d soft/du
  const double soft = f.use_soft ? soft_factor * (p.scale_by_temperature ? ts : 1.0 / ts) : 0.0;
  const double hard = f.use_hard ? hard_factor : 0.0;
  Slopes s{};
  s.shift = hard * p.smoothing / static_cast<double>(p.classes);
  if (wanted.decoupled) {
    const TargetSlopes slopes = target_slopes(p, r.target);
    // hard*softmax(x) and unit*softmax(x) share their exponentials.
    const double at_one = hard + (wanted.unit ? soft_factor * slopes.target_weight : 0.0);
    const double rest = wanted.hard ? at_one * r.target.hard_student.rest : 0.0;
    s.student = ratio_or_zero(soft * slopes.student, r.sums.sum_s);
    s.teacher = ratio_or_zero(soft * slopes.teacher, r.sums.sum_t);
    s.hard = ratio_or_zero(rest, r.sums.sum_h);
    s.label_shift = rest - soft * slopes.label - (hard * p.smoothing - s.shift);
    return s;
  }
  if (f.use_soft) {
    const bool pointwise = is_pointwise(p.divergence);
    s.student = (pointwise ? -soft * r.sums.g : soft) / r.sums.sum_s;
    s.teacher = pointwise ? -soft : soft / r.sums.sum_t;
  }
  if (f.use_hard) s.hard = hard / r.sums.sum_h;
  s.label_shift = hard * label_share(p);
  return s;
}

// A row of statistics; T is the compute dtype. `far`: see is_far.
template <class T>
MFD_ROW_FN void saved_statistics(const RowResult& r, const Wanted& wanted, bool far, T* values) {
  const double lse_s = log(r.sums.sum_s), lse_t = log(r.sums.sum_t);
  for (int i = 0; i < kStats; ++i) values[i] = T(0);
  values[kStudentMax] = static_cast<T>(r.sums.max_s);
  values[kStudentLse] = static_cast<T>(lse_s);
  values[kTeacherMax] = static_cast<T>(r.sums.max_t);
  values[kTeacherLse] = static_cast<T>(lse_t);
  values[kHardLse] = wanted.hard ? static_cast<T>(log(r.sums.sum_h)) : T(0);
  values[kDivergence] = static_cast<T>(r.k);
  // An empty rest beside the label has a log-sum-exp of -inf.
  values[kStudentLseLow] = lse_s == -kInf ? T(0) : static_cast<T>(lse_s - static_cast<T>(lse_s));
  values[kTeacherLseLow] = lse_t == -kInf ? T(0) : static_cast<T>(lse_t - static_cast<T>(lse_t));
  values[kStudentMean] = static_cast<T>(r.sums.g);
  values[kTeacherMean] = static_cast<T>(wanted.decoupled ? r.rest : r.sums.h);
  values[kTeacherHardLse] = wanted.unit ? static_cast<T>(log(r.sums.sum_u)) : T(0);
  if (far) values[kFar] = T(1);
}

struct Entropies {
  double student, teacher;
};

// Those of a row whose label is decoupled follow from its log-odds.
MFD_ROW_FN Entropies row_entropies(const RowResult& r, const Wanted& wanted) {
  const RowSums& sums = r.sums;
  Entropies e;
  e.student = sums.sum_s == 0 ? 0.0 : log(sums.sum_s) - sums.dot_s / sums.sum_s;
  e.teacher = sums.sum_t == 0 ? 0.0 : log(sums.sum_t) - sums.dot_t / sums.sum_t;
  if (!wanted.decoupled) return e;
  return {pair_entropy(r.target.student) + r.target.student.rest * e.student,
          pair_entropy(r.target.teacher) + r.target.teacher.rest * e.teacher};
}

}  // namespace mfd
