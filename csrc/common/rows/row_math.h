// Row mathematics in double precision, shared by every instruction set. `static`: each translation unit keeps
// its own copy, so that code compiled for one instruction set never runs on another.
#pragma once

#include <math.h>

#include "common/annotations.h"
#include "common/problems/rows.h"

namespace mfd {

#define MFD_ROW_FN static inline __attribute__((unused)) MFD_HOST_DEVICE

constexpr double kNan = __builtin_nan("");
constexpr double kInf = __builtin_inf();

MFD_ROW_FN int64_t row_offset(const Side& side, int64_t row) {
  if (row < side.inner) return row * side.row_stride;
  return (row / side.inner) * side.outer_stride + (row % side.inner) * side.row_stride;
}

MFD_ROW_FN int64_t block_count(int64_t classes) {
  return (classes + kBlock - 1) / kBlock;
}

template <class T>
MFD_ROW_FN double at(const RowScalar& value, int64_t row) {
  return value.rows ? static_cast<double>(static_cast<const T*>(value.rows)[row * value.stride])
                    : value.value;
}

MFD_ROW_FN bool is_labelled(const RowProblem& p, int64_t row) {
  return p.labels && p.labels[row] != p.ignore_index;
}

MFD_ROW_FN bool is_counted(const RowProblem& p, int64_t row) {
  return (!p.mask || p.mask[row]) && (!p.labels || p.keeps_ignored || p.labels[row] != p.ignore_index);
}

// The label of a counted row; -1 without one.
MFD_ROW_FN int64_t label_of(const RowProblem& p, int64_t row) {
  return is_labelled(p, row) ? p.labels[row] : -1;
}

// The divergences whose sums run over the other classes than the label's.
MFD_ROW_FN constexpr bool decouples_target(Divergence d) {
  return d == Divergence::kDKD || d == Divergence::kNKD;
}

// Those that need a second pass over the row, for sum f and E_q[df/dq].
MFD_ROW_FN bool is_pointwise(Divergence d) {
  return d != Divergence::kForwardKL && d != Divergence::kCrossEntropy && !decouples_target(d);
}

// Whose sum of p*log q goes without p*log p.
MFD_ROW_FN bool is_cross_entropy(Divergence d) {
  return d == Divergence::kCrossEntropy || d == Divergence::kNKD;
}

// Divergences from a mean of p and q, whose log(p/m) and log(q/m) come from p and q and differ by r: an r
// that does not fit p and q as they are rounded would not cancel in the value near p = q.
MFD_ROW_FN bool is_of_mean(Divergence d) {
  return d == Divergence::kJSD || d == Divergence::kSkewKL || d == Divergence::kSkewReverseKL;
}

// What rounding adds to the logarithm of the factor that makes probabilities of exponentials.
template <class T>
MFD_ROW_FN double rounding(double factor) {
  const double rounded = static_cast<T>(factor);
  return rounded == 0 ? 0.0 : log1p((rounded - factor) / factor);
}

// What standardised logits, (x - mean)*inverse with a mean that is rounded, lack to have the mean 0. No loss
// notices a common shift, but the gradient through the deviation does.
template <class T>
MFD_ROW_FN double drift(const Centre& centre) {
  return (static_cast<double>(static_cast<T>(centre.mean)) - centre.mean) * centre.inverse;
}

// One row's sums relative to the row's maxima.
struct RowSums {
  double max_s, max_t;
  double sum_s, sum_t, sum_h, sum_u;
  double cross;  // E_p[v - u] with u = (x - max_s)/Ts, v = (y - max_t)/Tt; E_p[-u] for cross-entropies
  double dot_s, dot_t;
  double mean_x;       // mean(x - max_s)
  double value, g, h;  // sums of the pointwise divergences
};

// Which sums a row has. `cross_entropy`: the cross term is E_p[-u].
struct Wanted {
  bool soft, hard, unit, dot_s, dot_t, decoupled, cross_entropy;
};

// exp((block max - row max)/T): 1 where they agree, so that a row of one block costs nothing.
MFD_ROW_FN double block_weight(double block_max, double row_max, double temperature) {
  return block_max == row_max ? 1.0 : exp((block_max - row_max) / temperature);
}

// A row of only -inf has no distribution; beside a decoupled label it is empty.
MFD_ROW_FN void reject_empty(RowSums& row, const Wanted& wanted) {
  if (wanted.decoupled) {
    if (row.sum_t == 0) row.cross = 0;
    return;
  }
  if (row.sum_s == 0) row.sum_s = row.sum_h = kNan;
  if (wanted.soft && row.sum_t == 0) row.sum_t = row.cross = kNan;
}

MFD_ROW_FN RowSums merge_blocks(const BlockSums* sums, int64_t blocks, int64_t classes, double ts, double tt,
                                const Wanted& wanted) {
  RowSums row{};
  row.max_s = sums[0].max_s;
  row.max_t = sums[0].max_t;
  if (blocks == 1) {
    const BlockSums& s = sums[0];
    row.sum_s = s.sum_s;
    row.sum_t = s.sum_t;
    row.sum_h = s.sum_h;
    row.sum_u = s.sum_u;
    row.cross = s.cross / (ts * row.sum_t);
    if (wanted.dot_s) row.dot_s = s.dot_s / ts;
    if (wanted.dot_t) row.dot_t = s.dot_t / tt;
    if (s.sum_x != 0) row.mean_x = s.sum_x / static_cast<double>(classes);
    reject_empty(row, wanted);
    return row;
  }
  for (int64_t b = 1; b < blocks; ++b) {
    if (sums[b].max_s > row.max_s) row.max_s = sums[b].max_s;
    if (sums[b].max_t > row.max_t) row.max_t = sums[b].max_t;
  }
  double cross = 0, sum_x = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const BlockSums& s = sums[b];
    const double du = (s.max_s - row.max_s) / ts, dv = (s.max_t - row.max_t) / tt;
    const double ws = block_weight(s.max_s, row.max_s, ts);
    row.sum_s += ws * s.sum_s;
    if (wanted.hard) row.sum_h += (ts == 1.0 ? ws : block_weight(s.max_s, row.max_s, 1.0)) * s.sum_h;
    if (wanted.soft) {
      const double wt = block_weight(s.max_t, row.max_t, tt);
      const double mass = wt * s.sum_t;
      row.sum_t += mass;
      // A block whose p is 0 throughout contributes 0, whatever its student logits are.
      if (!(static_cast<float>(mass) == 0.0f))
        cross += wt * s.cross / ts + mass * (wanted.cross_entropy ? -du : dv - du);
      if (wanted.unit) row.sum_u += (tt == 1.0 ? wt : block_weight(s.max_t, row.max_t, 1.0)) * s.sum_u;
      if (wanted.dot_t) row.dot_t += s.sum_t == 0 ? 0.0 : wt * s.dot_t / tt + mass * dv;
    }
    if (wanted.dot_s) row.dot_s += s.sum_s == 0 ? 0.0 : ws * s.dot_s / ts + ws * s.sum_s * du;
    sum_x +=
        s.sum_x + static_cast<double>(b + 1 < blocks ? kBlock : classes - b * kBlock) * (s.max_s - row.max_s);
  }
  row.cross = cross / row.sum_t;
  row.mean_x = sum_x / static_cast<double>(classes);
  reject_empty(row, wanted);
  return row;
}

// Adds the second pass: sum f, never negative, and the two means. A NaN anywhere makes the row NaN.
MFD_ROW_FN void merge_points(const BlockSums* sums, int64_t blocks, RowSums& row) {
  for (int64_t b = 0; b < blocks; ++b) {
    row.value += sums[b].value;
    row.g += sums[b].g;
    row.h += sums[b].h;
  }
  if (row.value < 0) row.value = 0;
  if (row.value != row.value) row.g = row.h = kNan;
}

// K = E_p[v - u] - log(sum_t) + log(sum_s), never negative; NaN stays.
MFD_ROW_FN double forward_kl(const RowSums& row) {
  const double k = row.cross - log(row.sum_t / row.sum_s);
  return k < 0 ? 0.0 : k;
}

// -E_p[log q] = E_p[-u] + log(sum_s), never negative; NaN stays.
MFD_ROW_FN double cross_entropy_of_teacher(const RowSums& row) {
  const double k = row.cross + log(row.sum_s);
  return k < 0 ? 0.0 : k;
}

// The slopes of a skew divergence go without the constant that is made for p near q from this forward KL on:
// sum min(p, q) >= 1/2 where it is less (Pinsker).
constexpr double kFarKL = 0.5;

MFD_ROW_FN bool can_be_far(const RowProblem& p) {
  return p.divergence == Divergence::kSkewKL || p.divergence == Divergence::kSkewReverseKL;
}

MFD_ROW_FN bool is_far(const RowProblem& p, const RowSums& row) {
  return can_be_far(p) && forward_kl(row) >= kFarKL;
}

// lse - (1 - eps)*x_label - eps*mean(x), everything minus max(x).
MFD_ROW_FN double cross_entropy(const RowSums& row, double lse, double label, double eps) {
  double value = lse;
  if (eps != 1.0) value -= (1.0 - eps) * label;
  if (eps != 0.0) value -= eps * row.mean_x;
  return value;
}

// The smoothed label's own probability, (1 - eps) + eps/C: exactly 1 for one class.
MFD_ROW_FN double label_share(const RowProblem& p) {
  const double even = p.smoothing / static_cast<double>(p.classes);
  return p.classes == 1 ? 1.0 : (1.0 - p.smoothing) + even;
}

}  // namespace mfd
