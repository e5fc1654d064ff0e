// What a teacher of weight 0 contributes to dD/dw_k: its p_k/p has no bound, so that the product with
// dD/d(log p) of which the others' shares are made would overflow or lose it. In double precision, class by
// class.
#pragma once

#include "common/rows/saved_row.h"

namespace mfd {

// log(p/m) at r = log p - log q, m = share*p + (1 - share)*q.
MFD_ROW_FN double log_over_mean(double r, double share) {
  return r < 0 ? r - log1p(share * expm1(r)) : -log1p((1 - share) * expm1(-r));
}

// factor*exp(exponent).
struct ScaledExponential {
  double factor, exponent;
};

// p^(degree - 1)*(1 - exp(-beta*r))/beta
MFD_ROW_FN ScaledExponential power_slope(double degree, double beta, double r, double log_p) {
  const double power = degree == 1 ? 0.0 : (degree - 1) * log_p, rise = -beta * r;
  if (beta == 0) return {r, power};
  if (rise > 1) return {expm1(-rise) / beta, power + rise};
  return {-expm1(rise) / beta, power};
}

// dD/dp of a pointwise divergence at r = log p - log q, of which neither need be representable.
MFD_ROW_FN ScaledExponential slope_of_p(const RowProblem& problem, bool far, double r, double log_p) {
  const double first = problem.first, second = problem.second;
  switch (problem.divergence) {
    case Divergence::kReverseKL:
      return power_slope(1.0, 1.0, r, log_p);
    case Divergence::kJSD:
      return {first * log_over_mean(r, first), 0.0};
    case Divergence::kSkewKL:
      return {log_over_mean(r, first) - first * expm1(log_over_mean(r, first)), 0.0};
    case Divergence::kSkewReverseKL: {
      const double log_qm = log_over_mean(r, 1 - first) - r;
      return {(first - 1) * (far ? exp(log_qm) : expm1(log_qm)), 0.0};
    }
    case Divergence::kTVD:
      return {r > 0 ? 0.5 : r < 0 ? -0.5 : r, 0.0};
    case Divergence::kAlphaBeta:
      return power_slope(first + second, second, r, log_p);
    default:
      return {r, 0.0};
  }
}

// p_k*dD/dp of a class with the student's logit `x`; `at_label`: it is the excluded class.
MFD_ROW_FN double unheard_share(const RowProblem& problem, const SavedRow& row, const LinearSlopes& linear,
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
  const double log_share = log_pk - of_rest;
  if (is_pointwise(problem.divergence)) {
    const ScaledExponential slope = slope_of_p(problem, row.far, r, log_p - of_rest);
    return times(slope.factor, exp(log_share + slope.exponent)) - times(exp(log_share), row.mean_h);
  }
  const double slope =
      times(linear.rest_weight, (linear.of_student ? -log_q : r) - linear.mean) + linear.rest_shift;
  return times(exp(log_share), slope);
}

}  // namespace mfd
