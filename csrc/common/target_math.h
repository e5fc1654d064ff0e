// The label's class against the rest of its row, for DKD and NKD. A log-odds a stands for the probabilities
// logistic(a) of the label and logistic(-a) of the rest, so that neither is 1 minus the other.
#pragma once

#include "common/row_math.h"

namespace mfd {

MFD_ROW_FN double logistic(double a) {
  if (a >= 0) return 1.0 / (1.0 + exp(-a));
  const double e = exp(a);
  return e / (1.0 + e);
}

// log(1 + e^a) = -log logistic(-a)
MFD_ROW_FN double softplus(double a) {
  return a > 0 ? a + log1p(exp(-a)) : log1p(exp(a));
}

// weight*value with 0*inf = 0.
MFD_ROW_FN double times(double weight, double value) {
  return weight == 0 ? 0.0 : weight * value;
}

// log(e^a + e^b), also where one of them is -inf.
MFD_ROW_FN double log_add(double a, double b) {
  return a == -kInf ? b : a + softplus(b - a);
}

// logistic(a) - logistic(b), from the smaller of the two pairs.
MFD_ROW_FN double logistic_difference(double a, double b) {
  return a > 0 && b > 0 ? logistic(-b) - logistic(-a) : logistic(a) - logistic(b);
}

// KL of the pair (label, rest) of the teacher's log-odds and the student's.
MFD_ROW_FN double pair_kl(double teacher, double student) {
  const double p = logistic(teacher), rest = logistic(-teacher);
  return times(p, softplus(-student) - softplus(-teacher)) + times(rest, softplus(student) - softplus(teacher));
}

// Entropy of the pair.
MFD_ROW_FN double pair_entropy(double a) {
  return times(logistic(a), softplus(-a)) + times(logistic(-a), softplus(a));
}

// Log-odds of the label from its logit minus the largest of the others, and their log-sum-exp. A logit of +inf
// has no distribution.
MFD_ROW_FN double log_odds(double label, double temperature, double lse) {
  return label == kInf ? kNan : label / temperature - lse;
}

// A row's log-odds: at the temperatures, and at temperature 1.
struct Target {
  double student, teacher, hard_student, hard_teacher;
};

// Slopes of the soft term to u = x/Ts and v = y/Tt, before T^2:
//   dL/du_j = student*q_j - teacher*p_j, dL/du_label = label, q and p over the other classes;
//   dL/dv_j = p_j*(relation*h_j + pull), dL/dv_label = -pull, h_j = r_j - E_p[r] (DKD) or the same of -log q
//   (NKD);
// and to x, y at temperature 1 (without T^2), for NKD: unit*(softmax(x) - onehot), drive*(onehot -
// softmax(y)).
struct TargetSlopes {
  double student, teacher, label, relation, pull, unit, drive;
};

MFD_ROW_FN TargetSlopes target_slopes(const Problem& problem, const Target& t) {
  TargetSlopes s{};
  // A teacher without mass besides the label says nothing about the rest.
  const bool rest = t.teacher != kInf;
  if (problem.divergence == Divergence::kDKD) {
    const double alpha = problem.first, beta = rest ? problem.second : 0.0;
    s.label = alpha * logistic_difference(t.student, t.teacher);
    s.student = beta - s.label;
    s.teacher = s.relation = beta;
    s.pull = -alpha * times(logistic(t.teacher) * logistic(-t.teacher), t.teacher - t.student);
  } else {
    s.student = s.teacher = s.relation = rest ? problem.first : 0.0;
    s.unit = logistic(t.hard_teacher);
    s.drive = times(s.unit, softplus(-t.hard_student));
  }
  return s;
}

// What T^2 multiplies: alpha*KL(pair) + beta*KL(rest), or gamma times the cross-entropy of the rest.
MFD_ROW_FN double target_divergence(const Problem& problem, const Target& t, double rest) {
  if (problem.divergence == Divergence::kNKD) return times(problem.first, rest);
  return times(problem.first, pair_kl(t.teacher, t.student)) + times(problem.second, rest);
}

}  // namespace mfd
