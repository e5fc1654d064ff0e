// What the backward pass of a row starts from: the saved statistics, and the slopes that follow from them.
#pragma once

#include "common/rows/row_math.h"
#include "common/rows/target_math.h"

namespace mfd {

struct SavedRow {
  double max_s, lse_s, max_t, lse_t, lse_h, lse_u, divergence, ts, tt, soft_scale, grad_soft, grad_hard;
  double mean_g, mean_h;    // E_q[df/dq], E_p[df/dp]
  double label_x, label_y;  // minus the maxima; 0 where the label is not decoupled
  int64_t label;
  bool decoupled, far;
  Target target;
  TargetSlopes slopes;
};

// T is the compute dtype. The labels' logits follow by `set_label`.
template <class T>
MFD_ROW_FN SavedRow saved_row(const Backward& g, int64_t row) {
  const RowProblem& p = g.problem;
  const T* s = static_cast<const T*>(g.stats) + row * kStats;
  SavedRow r{};
  r.max_s = s[kStudentMax];
  r.lse_s = static_cast<double>(s[kStudentLse]) + s[kStudentLseLow];
  r.max_t = s[kTeacherMax];
  r.lse_t = static_cast<double>(s[kTeacherLse]) + s[kTeacherLseLow];
  r.lse_h = s[kHardLse];
  r.lse_u = s[kTeacherHardLse];
  r.divergence = s[kDivergence];
  r.mean_g = s[kStudentMean];
  const bool is_mean = p.divergence == Divergence::kForwardKL || p.divergence == Divergence::kCrossEntropy;
  r.mean_h = is_mean ? r.divergence : s[kTeacherMean];
  r.ts = at<T>(p.student_temperature, row);
  r.tt = at<T>(p.teacher_temperature, row);
  r.soft_scale = p.scale_by_temperature ? r.ts * r.ts : 1.0;
  r.grad_soft = at<T>(g.grad_soft, row);
  r.label = label_of(p, row);
  r.grad_hard = is_labelled(p, row) ? at<T>(g.grad_hard, row) : 0.0;
  r.decoupled = decouples_target(p.divergence);
  r.far = is_pointwise(p.divergence) && s[kFar] != T(0);
  return r;
}

// The logits of the label of a decoupled target; `at_one` are the odds of several teachers at T = 1, null for
// one.
MFD_ROW_FN void set_label(SavedRow& r, const RowProblem& p, double x, double y,
                          const Odds* at_one = nullptr) {
  r.label_x = x - r.max_s;
  r.label_y = y - r.max_t;
  r.target = {odds_of(r.label_x, r.ts, r.lse_s), odds_of(r.label_y, r.tt, r.lse_t),
              odds_of(r.label_x, 1.0, r.lse_h), at_one ? *at_one : odds_of(r.label_y, 1.0, r.lse_u)};
  r.slopes = target_slopes(p, r.target);
  r.lse_h = whole_lse(r.target.hard_student, r.label_x, r.lse_h);
  r.lse_u = whole_lse(r.target.hard_teacher, r.label_y, r.lse_u);
}

// exp(-lse); 0 beside a label that has everything.
MFD_ROW_FN double inverse_mass(double lse) {
  return lse == -kInf ? 0.0 : exp(-lse);
}

// Forward KL, its cross-entropy and the divergences that decouple the label:
//   to_u = student*q - teacher*p,  to_v = p*(rest_weight*(t - mean) + rest_shift), t = r or -log q; 0 where p
//   is 0, NaN throughout where the row's mean is.
struct LinearSlopes {
  double student, teacher, rest_weight, mean, rest_shift;
  bool of_student;  // t = -log q
};

MFD_ROW_FN LinearSlopes row_linear_slopes(const SavedRow& r, const RowProblem& p) {
  const bool of_student = is_cross_entropy(p.divergence);
  if (!r.decoupled) return {1.0, 1.0, 1.0, r.mean_h, 0.0, of_student};
  return {r.slopes.student, r.slopes.teacher,    r.slopes.rest_weight,
          r.mean_h,         r.slopes.rest_shift, of_student};
}

// Factors of d/dx = soft*to_u + (hard*softmax(x) - shift) and d/dy = soft*to_v - unit*softmax(y), and what
// comes in their place or on top at the label.
struct StudentFactors {
  double soft, hard, shift;
  double decoupled;  // the gradient of the label of a decoupled target
  double share;      // hard*share leaves the gradient of another label
};

MFD_ROW_FN StudentFactors student_factors(const SavedRow& r, const RowProblem& p) {
  StudentFactors f;
  f.soft = r.grad_soft * r.soft_scale / r.ts;
  f.hard = r.grad_hard + r.grad_soft * r.slopes.target_weight;
  f.shift = r.grad_hard * p.smoothing / static_cast<double>(p.classes);
  // softmax(x)_label - 1 = -rest
  f.decoupled = times(f.soft, r.slopes.label) - times(f.hard, r.target.hard_student.rest) +
                (r.grad_hard * p.smoothing - f.shift);
  f.share = f.hard * label_share(p);
  return f;
}

struct TeacherFactors {
  double soft, unit;
  double decoupled;  // added to the gradient of the label of a decoupled target
};

MFD_ROW_FN TeacherFactors teacher_factors(const SavedRow& r) {
  TeacherFactors f;
  f.soft = r.grad_soft * r.soft_scale / r.tt;
  f.unit = r.grad_soft * r.slopes.target_loss;
  f.decoupled = times(-f.soft, r.slopes.rest_shift) + times(f.unit, r.target.hard_teacher.rest);
  return f;
}

// Sums over a row, without the label's class where it is decoupled.
struct SlopeSums {
  double to_u, to_v;    // what rounding left of 0
  double u_x, v_y;      // sum to_u*(x - max x), sum to_v*(y - max y)
  double mean_x;        // E_q[x - max x]
  double x_dot, y_dot;  // sum d_x*x, sum d_y*y of standardised logits
};

MFD_ROW_FN bool is_finite(double x) {
  return x - x == 0;
}

// Means that fit the slopes as this pass rounds them: both slopes sum to 0.
MFD_ROW_FN void settle_means(SavedRow& r, const RowProblem& p, const SlopeSums& sums) {
  if (is_pointwise(p.divergence) && is_finite(sums.to_u)) r.mean_g += sums.to_u;
  const double rest_weight = r.decoupled ? r.slopes.rest_weight : 1.0;
  const double excess = rest_weight == 0 ? 0.0 : (sums.to_v - r.slopes.rest_shift) / rest_weight;
  if (is_finite(excess)) r.mean_h += excess;
}

// dD/dTs = -sum dD/du*x/Ts^2, dD/dTt = -sum dD/dv*y/Tt^2; the factor Ts^2 has a derivative too.
MFD_ROW_FN double temperature_gradient(const SavedRow& r, const RowProblem& p, const SlopeSums& sums) {
  const double own = p.scale_by_temperature ? r.grad_soft * 2.0 * r.ts * r.divergence : 0.0;
  const double excess = sums.to_u + r.slopes.label;
  double slope = sums.u_x + times(r.slopes.label, r.label_x);
  if (excess != 0) slope -= excess * sums.mean_x;
  return own - r.grad_soft * r.soft_scale * slope / (r.ts * r.ts);
}

MFD_ROW_FN double teacher_temperature_gradient(const SavedRow& r, const SlopeSums& sums) {
  const double slope = sums.v_y - times(r.slopes.rest_shift, r.label_y);
  return -r.grad_soft * r.soft_scale * slope / (r.tt * r.tt);
}

// Of several teachers at the temperature `t`; their slopes include the label's.
MFD_ROW_FN double mixed_temperature_gradient(const SavedRow& r, double t, const SlopeSums& sums) {
  return -r.grad_soft * r.soft_scale * sums.v_y / (t * t);
}

}  // namespace mfd
