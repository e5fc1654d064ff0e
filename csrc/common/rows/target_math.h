// The label's class against the rest of its row, for DKD and NKD. Both probabilities come from the log-odds,
// so that neither is 1 minus the other.
#pragma once

#include "common/rows/row_math.h"

namespace mfd {

struct Odds {
  double log_odds;
  double label, rest;          // probabilities
  double log_label, log_rest;  // and their logarithms
};

MFD_ROW_FN Odds odds_of(double a) {
  const double e = exp(-fabs(a)), l = log1p(e), greater = 1.0 / (1.0 + e), lesser = e * greater;
  if (a >= 0) return {a, greater, lesser, -l, -a - l};
  return {a, lesser, greater, a - l, -l};
}

// weight*value with 0*inf = 0.
MFD_ROW_FN double times(double weight, double value) {
  return weight == 0 ? 0.0 : weight * value;
}

// The odds from the label's logit minus the largest of the others, and their log-sum-exp. A logit of +inf has
// no distribution.
MFD_ROW_FN Odds odds_of(double label, double temperature, double lse) {
  return odds_of(label == kInf ? kNan : label / temperature - lse);
}

// Log-sum-exp over all classes at temperature 1.
MFD_ROW_FN double whole_lse(const Odds& odds, double label, double lse) {
  return odds.log_odds >= 0 ? label - odds.log_label : lse - odds.log_rest;
}

// a.label - b.label, from the smaller of the two pairs.
MFD_ROW_FN double label_difference(const Odds& a, const Odds& b) {
  return a.log_odds > 0 && b.log_odds > 0 ? b.rest - a.rest : a.label - b.label;
}

// KL of the pair (label, rest).
MFD_ROW_FN double pair_kl(const Odds& teacher, const Odds& student) {
  return times(teacher.label, teacher.log_label - student.log_label) +
         times(teacher.rest, teacher.log_rest - student.log_rest);
}

MFD_ROW_FN double pair_entropy(const Odds& odds) {
  return -times(odds.label, odds.log_label) - times(odds.rest, odds.log_rest);
}

// A row's odds: at the temperatures, and at temperature 1.
struct Target {
  Odds student, teacher, hard_student, hard_teacher;
};

// Slopes of the soft term to u = x/Ts and v = y/Tt, before T^2:
//   dL/du_j = student*q_j - teacher*p_j, dL/du_label = label, q and p over the other classes;
//   dL/dv_j = p_j*(rest_weight*h_j + rest_shift), dL/dv_label = -rest_shift, h_j = r_j - E_p[r] (DKD) or the
//   same of -log q (NKD);
// and to x, y at temperature 1 (without T^2), for NKD: target_weight*(softmax(x) - onehot),
// target_loss*(onehot - softmax(y)), whose target_loss is the term itself.
struct TargetSlopes {
  double student, teacher, label, rest_weight, rest_shift, target_weight, target_loss;
};

// 0, or NaN without a distribution on one of the sides: a part of weight 0 does not hide that.
MFD_ROW_FN double zero_of(const Target& t) {
  return 0.0 * (t.student.label + t.teacher.label);
}

MFD_ROW_FN TargetSlopes target_slopes(const RowProblem& problem, const Target& t) {
  TargetSlopes s{};
  // A teacher without classes besides the label says nothing about the rest; one whose mass there underflows
  // does.
  const bool rest = t.teacher.log_odds != kInf;
  if (problem.divergence == Divergence::kDKD) {
    const double alpha = problem.first, beta = (rest ? problem.second : 0.0) + zero_of(t);
    s.label = alpha * label_difference(t.student, t.teacher);
    s.student = beta - s.label;
    s.teacher = s.rest_weight = beta;
    s.rest_shift =
        zero_of(t) - alpha * times(t.teacher.label * t.teacher.rest, t.teacher.log_odds - t.student.log_odds);
  } else {
    s.label = s.rest_shift = zero_of(t);
    s.student = s.teacher = s.rest_weight = (rest ? problem.first : 0.0) + s.rest_shift;
    s.target_weight = t.hard_teacher.label;
    s.target_loss = times(s.target_weight, -t.hard_student.log_label);
  }
  return s;
}

// What T^2 multiplies: alpha*KL(pair) + beta*KL(rest), or gamma times the cross-entropy of the rest.
MFD_ROW_FN double target_divergence(const RowProblem& problem, const Target& t, double rest) {
  if (problem.divergence == Divergence::kNKD) return times(problem.first, rest) + zero_of(t);
  return times(problem.first, pair_kl(t.teacher, t.student)) + times(problem.second, rest) + zero_of(t);
}

}  // namespace mfd
