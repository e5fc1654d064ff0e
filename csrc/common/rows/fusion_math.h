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

// Least norm in the cosine's denominator.
constexpr double kLeastNorm = 1e-8;

// The power of two that a row is scaled with before its norm is taken, from the sum of its squares as it is:
// 0 where the squares are within the range of their type and the norm is not below the least.
MFD_ROW_FN int norm_exponent(double squares, bool is_double) {
  if (squares < kLeastNorm * kLeastNorm) return is_double ? 520 : 75;
  if (squares <= (is_double ? 0x1p900 : 0x1p100)) return 0;
  return is_double ? -600 : -80;  // also of a NaN
}

// The cosine of rows that are scaled by these powers of two.
MFD_ROW_FN FeatureRow scaled_cosine(double dot, double ss, double tt, int of_student, int of_teacher) {
  const double s = sqrt(ss), t = sqrt(tt);
  const double least_s = ldexp(kLeastNorm, of_student), least_t = ldexp(kLeastNorm, of_teacher);
  const double norms = (s < least_s ? least_s : s) * (t < least_t ? least_t : t), cosine = dot / norms;
  return {1.0 - cosine, -1.0 / norms, s < least_s ? 0.0 : cosine / ss, t < least_t ? 0.0 : cosine / tt,
          of_student,   of_teacher};
}

// From the sums over a row of `width`: first = sum h(s - t), or <s, t>, <s, s> and <t, t> for the cosine,
// which is 0 beside a zero vector. The last two: what s and t were scaled with.
MFD_ROW_FN FeatureRow feature_row_of_sums(FeatureKind kind, double first, double ss, double tt, int64_t width,
                                          int of_student = 0, int of_teacher = 0) {
  const double n = static_cast<double>(width);
  if (kind == kMse) return {first / n, 2.0 / n, 0, 0, 0, 0};
  if (kind == kSmoothL1) return {first / n, 1.0 / n, 0, 0, 0, 0};
  if (ss == 0 || tt == 0) return {1.0, 0, 0, 0, 0, 0};
  if (of_student || of_teacher) return scaled_cosine(first, ss, tt, of_student, of_teacher);
  const double norms = sqrt(ss) * sqrt(tt), cosine = first / norms;
  return {1.0 - cosine, -1.0 / norms, cosine / ss, cosine / tt, 0, 0};
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
