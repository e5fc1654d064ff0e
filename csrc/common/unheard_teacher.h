// What a teacher of weight 0 contributes to dD/dw_k: its p_k/p has no bound, so that the product with
// dD/d(log p) of which the others' shares are made would overflow or lose it. In double precision, class by
// class.
#pragma once

#include "common/saved_row.h"

namespace mfd {

// log(p/m) at r = log p - log q, m = share*p + (1 - share)*q.
MFD_ROW_FN double log_over_mean(double r, double share) {
  return r < 0 ? r - log1p(share * expm1(r)) : -log1p((1 - share) * expm1(-r));
}

// dD/dp of a pointwise divergence at r = log p - log q, of which neither need be representable.
MFD_ROW_FN double slope_of_p(const Problem& problem, bool far, double r, double log_p) {
  const double first = problem.first, second = problem.second;
  switch (problem.divergence) {
    case Divergence::kReverseKL:
      return -expm1(-r);
    case Divergence::kJSD:
      return first * log_over_mean(r, first);
    case Divergence::kSkewKL:
      return log_over_mean(r, first) - first * expm1(log_over_mean(r, first));
    case Divergence::kSkewReverseKL: {
      const double log_qm = log_over_mean(r, 1 - first) - r;
      return (first - 1) * (far ? exp(log_qm) : expm1(log_qm));
    }
    case Divergence::kTVD:
      return r > 0 ? 0.5 : r < 0 ? -0.5 : r;
    case Divergence::kAlphaBeta:
      return exp((first + second - 1) * log_p) * (second == 0 ? r : -expm1(-second * r) / second);
    default:
      return r;
  }
}

// p_k*dD/dp of a class with the student's logit `x`; `at_label`: it is the class set apart.
MFD_ROW_FN double unheard_share(const Problem& problem, const SavedRow& row, const LinearSlopes& linear,
                                double x, double log_pk, double log_p, bool at_label) {
  if (log_pk == -kInf || log_p == -kInf) return 0;
  if (at_label) {
    const Target& target = row.target;
    const double alpha = problem.divergence == Divergence::kDKD ? problem.first : 0.0;
    return alpha *
           times(exp(log_pk) * target.teacher.rest, target.teacher.log_odds - target.student.log_odds);
  }
  const double of_rest = row.max_t + row.lse_t;  // log of what the classes compared hold of p
  const double log_q = (x - row.max_s) / row.ts - row.lse_s, r = log_p - of_rest - log_q;
  double slope;
  if (is_pointwise(problem.divergence)) {
    slope = slope_of_p(problem, row.far, r, log_p - of_rest) - row.mean_h;
  } else {
    slope = times(linear.relation, (linear.of_student ? -log_q : r) - linear.mean) + linear.pull;
  }
  return times(exp(log_pk - of_rest), slope);
}

}  // namespace mfd
