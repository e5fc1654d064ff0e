// Row mathematics of the fusion kernels in double precision, for host and device.
#pragma once

#include "common/problems/fusion.h"
#include "common/rows/row_math.h"

namespace mfd {

// Where a row of a matrix starts, in elements.
MFD_ROW_FN int64_t matrix_offset(const RowMatrix& m, int64_t row) {
  if (row < m.inner) return row * m.row_stride;
  return (row / m.inner) * m.outer_stride + (row % m.inner) * m.row_stride;
}

// From the sums over a row of `width`: first = sum h(s - t), or <s, t>, <s, s> and <t, t> for the cosine,
// which is 0 beside a zero vector.
MFD_ROW_FN FeatureRow feature_row_of_sums(FeatureKind kind, double first, double ss, double tt,
                                          int64_t width) {
  const double n = static_cast<double>(width);
  if (kind == kMse) return {first / n, 2.0 / n, 0, 0};
  if (kind == kSmoothL1) return {first / n, 1.0 / n, 0, 0};
  if (ss == 0 || tt == 0) return {1.0, 0, 0, 0};
  const double norms = sqrt(ss) * sqrt(tt), cosine = first / norms;
  return {1.0 - cosine, -1.0 / norms, cosine / ss, cosine / tt};
}

// One modality's term of KL(target || weights); 0 log 0 = 0, +inf where an absent modality has a target. It
// takes the weight's logarithm, -inf where absent: that is finite where the weight itself is 0.
MFD_ROW_FN double pool_kl_term(double target, double log_weight) {
  return target == 0 ? 0.0 : target * (log(target) - log_weight);
}

// Its gradient to the score, times the temperature; mass = sum_m target_m.
MFD_ROW_FN double pool_kl_gradient(double weight, double mass, double target) {
  return weight * mass - target;
}

// d loss/d score*temperature = a (g - sum_j a_j g_j), g = d loss/d a.
MFD_ROW_FN double score_gradient(double a, double g, double mean) {
  return a * (g - mean);
}

// One modality's term of d loss/d temperature, ds = d loss/d score: as sum_m ds_m = 0, log a_m may stand for
// s_m/temperature, from which it differs by a constant.
MFD_ROW_FN double temperature_term(double a, double ds) {
  return a == 0 ? 0.0 : -ds * log(a);
}

}  // namespace mfd
