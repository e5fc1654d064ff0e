// Passes over the classes that a sparse teacher lists, with the rest as one more class where it has a share
// of the divergence.
#pragma once

#include "common/rows/topk_math.h"
#include "common/vector/slopes.h"
#include "common/vector/topk_divergences.h"
#include "cuda/rows/rows.cuh"

namespace mfd {
namespace device {

// What a class has of the two distributions; logit and value of a listed one.
template <class S>
struct ClassShare {
  typename S::T q, p, r, log_q, log_p, logit, value;
};

// What the passes take of a row's sums, in the compute dtype.
template <class S>
struct ListScales {
  typedef typename S::T T;
  bool near;  // maxima this close leave y - x with no larger error than the differences from the maxima have
  T max_s, max_t, gap, q_scale, p_scale, ratio, inverse_s, inverse_t, moved, lse_s, lse_t;

  MFD_DEVICE ListScales(const SoftTerm& s, double ts, double tt)
      : near(ts == tt && fabs(s.max_t - s.max_s) <= 8.0),
        max_s(static_cast<T>(s.max_s)),
        max_t(static_cast<T>(s.max_t)),
        gap(max_t - max_s),
        q_scale(static_cast<T>(s.sum_s == 0 ? 0.0 : 1.0 / s.sum_s)),
        p_scale(static_cast<T>(s.sum_t == 0 ? 0.0 : 1.0 / s.sum_t)),
        ratio(static_cast<T>(ts / tt)),
        inverse_s(static_cast<T>(1.0 / ts)),
        inverse_t(static_cast<T>(1.0 / tt)),
        moved(static_cast<T>(s.lse_s - s.lse_t)),
        lse_s(static_cast<T>(s.lse_s)),
        lse_t(static_cast<T>(s.lse_t)) {}

  template <class Row>
  MFD_DEVICE ClassShare<S> of_listed(const Row& row, int64_t k) const {
    const T a = row.lx[k], b = row.ly[k], tx = a - max_s, ty = b - max_t;
    const T d = near ? b - a - gap : S::fma(ty, ratio, -tx);
    return {row.by_ts(tx) * q_scale,
            row.by_tt(ty) * p_scale,
            S::fma(d, inverse_s, moved),
            S::fma(tx, inverse_s, -lse_s),
            S::fma(ty, inverse_t, -lse_t),
            a,
            b};
  }
};

// `known`: whether the teacher's share of the rest is.
template <class S>
MFD_INLINE ClassShare<S> share_of_rest(const SoftTerm& s, bool known) {
  typedef typename S::T T;
  const double log_p = known ? s.log_p : -kInf;
  return {static_cast<T>(s.q),
          static_cast<T>(known ? s.p : 0.0),
          static_cast<T>(log_p - s.log_q),
          static_cast<T>(s.log_q),
          static_cast<T>(log_p),
          T(0),
          T(0)};
}

// act(share, is_rest) for what the divergence sums over, this thread's part: the listed classes but a
// decoupled label, and the rest.
template <class S, class Row, class Act>
MFD_INLINE void over_shares(const Row& row, const Act& act) {
  const ListScales<S> scales(row.state->s, row.ts, row.tt);
  row.over_listed([&](int64_t k, int64_t column) {
    if (!row.is_decoupled(column)) act(scales.of_listed(row, k), false);
  });
  const bool has_rest =
      !row.is_renormalized() && !row.is_decoupling() && !row.has_powers() && row.group.part() == 0;
  // The thread whose turn it is after the last listed class.
  if (has_rest && row.listed % row.group.threads() == row.group.rank())
    act(share_of_rest<S>(row.state->s, row.knows_rest()), true);
}

// The forward KL, over the group.
template <class S, class Row>
MFD_INLINE double list_distance(const Row& row) {
  double sum[1] = {0};
  over_shares<S>(row,
                 [&](const ClassShare<S>& c, bool) { sum[0] += static_cast<double>(weighed<S>(c.p, c.r)); });
  row.group.template reduce<Sum>(sum);
  return sum[0];
}

// The point of a class; of NKD, whose value over the rest is a cross-entropy, its part of that.
template <class S, class Row, class Divergence>
MFD_INLINE Point<S> point_of(const Row& row, const Divergence& divergence, const ClassShare<S>& c) {
  typedef typename S::T T;
  if (row.is_nkd()) return {T(0), T(0), -weighed<S>(c.p, c.log_q)};
  return divergence(c.q, c.p, c.r, c.log_q, c.log_p);
}

// Sums of the points of the listed classes, and the rest's point, over the group.
template <class S, class Row>
MFD_INLINE void list_points(const Row& row, ClassPoint* listed, ClassPoint* rest) {
  double v[6] = {};
  with_topk_divergence<S>(row.p, row.state->s.far, [&](const auto& divergence) {
    over_shares<S>(row, [&](const ClassShare<S>& c, bool is_rest) {
      const Point<S> point = point_of<S>(row, divergence, c);
      const double value = static_cast<double>(point.value), g = static_cast<double>(point.g),
                   h = static_cast<double>(point.h);
      v[0] += is_rest ? 0.0 : value;
      v[1] += is_rest ? 0.0 : g;
      v[2] += is_rest ? 0.0 : h;
      v[3] += is_rest ? value : 0.0;
      v[4] += is_rest ? g : 0.0;
      v[5] += is_rest ? h : 0.0;
    });
  });
  row.group.template reduce<Sum>(v);
  *listed = {v[0], v[1], v[2]};
  *rest = {v[3], v[4], v[5]};
}

// act(k, column, share, to_u, to_v, gradient) for the listed classes: the slopes of the divergence to u and
// v, and d loss/d logit as the transform left it.
template <class S, class Row, class Act>
MFD_INLINE void over_slopes(const Row& row, const Act& act) {
  typedef typename S::T T;
  const SoftTerm& s = row.state->s;
  const TopKSlopes& slopes = row.state->slopes;
  const ListScales<S> scales(s, row.ts, row.tt);
  const bool nkd = row.is_nkd(), at_one = row.has_exponentials_at_one();
  const LinearSlope<S> slope(
      {s.slopes.student, s.slopes.teacher, s.slopes.rest_weight, s.mean_h, s.slopes.rest_shift, nkd});
  const T mean_g = static_cast<T>(s.mean_g), mean_h = static_cast<T>(s.mean_h);
  row.over_listed([&](int64_t k, int64_t column) {
    const ClassShare<S> c = scales.of_listed(row, k);
    T to_u = 0, to_v = 0;
    if (!row.is_decoupling()) {
      with_topk_divergence<S>(row.p, s.far, [&](const auto& divergence) {
        const Point<S> point = point_of<S>(row, divergence, c);
        to_u = point.g - c.q * mean_g;
        to_v = point.h - c.p * mean_h;
      });
    } else if (!row.is_decoupled(column)) {
      const SlopePair<S> pair = slope(c.q, c.p, c.r, nkd ? -c.log_q : c.r);
      to_u = pair.to_u;
      to_v = pair.to_v;
    }
    T gradient = static_cast<T>(slopes.soft) * to_u;
    if (at_one) {
      const T h =
          row.by_one(c.logit - static_cast<T>(row.state->all.max)) * static_cast<T>(row.state->h_scale);
      const bool at_label = row.use_hard && column == row.label;
      gradient = gradient + (static_cast<T>(slopes.at_one) * h -
                             static_cast<T>(at_label ? row.state->share : slopes.shift));
    }
    if (nkd && row.is_renormalized())
      gradient = gradient + static_cast<T>(slopes.unit) *
                                (row.by_one(c.logit - scales.max_s) * static_cast<T>(row.state->unit_scale));
    if (row.is_decoupled(column)) gradient = static_cast<T>(row.state->label);
    act(k, column, c, to_u, to_v, gradient);
  });
}

// What the gradients of the temperatures need, and in `dot` sum gradient*x of a standardised row; this
// thread's part.
template <class S, class Row>
MFD_INLINE ListedSums list_sums(const Row& row, double* dot) {
  typedef typename S::T T;
  const T max_s = static_cast<T>(row.state->s.max_s), max_t = static_cast<T>(row.state->s.max_t);
  double v[6] = {};
  over_slopes<S>(row, [&](int64_t, int64_t column, const ClassShare<S>& c, T to_u, T to_v, T gradient) {
    if (!row.is_decoupled(column)) {
      v[0] += to_u == T(0) ? 0.0 : static_cast<double>(to_u * (c.logit - max_s));
      v[1] += static_cast<double>(to_u);
      v[2] += c.q == T(0) ? 0.0 : static_cast<double>(c.q * (c.logit - max_s));
      v[3] += to_v == T(0) ? 0.0 : static_cast<double>(to_v * (c.value - max_t));
      v[4] += static_cast<double>(to_v);
      v[5] += c.p == T(0) ? 0.0 : static_cast<double>(c.p * (c.value - max_t));
    }
    *dot += gradient == T(0) ? 0.0 : static_cast<double>(gradient * c.logit);
  });
  return {v[0], v[1], v[2], v[3], v[4], v[5]};
}

// Writes the gradients of the listed classes and of their values; `dot` as list_sums found it, of the row.
template <class S, class Row>
MFD_INLINE void write_listed(const Row& row, double dot) {
  typedef typename S::T T;
  const SoftTerm& s = row.state->s;
  const ValueFactors& to_value = row.state->values;
  const RowProblem& p = row.p;
  over_slopes<S>(row, [&](int64_t k, int64_t column, const ClassShare<S>& c, T, T to_v, T gradient) {
    if (row.f.grad) {
      if (changes_gradient(p.student)) gradient = raw_gradient<S>(row.x, gradient, c.logit, dot);
      store_one<T>(row.student_gradient() + column * size_of(p.student.dtype), p.student.dtype, gradient);
    }
    if (!row.g.d_values) return;
    const double y = static_cast<double>(c.value);
    double of_value = to_value.label;
    if (!row.is_decoupled(column))
      of_value = to_value.soft * static_cast<double>(to_v) -
                 (row.is_nkd() ? to_value.target_loss * exp(y - s.max_t - to_value.lse_u) : 0.0);
    if (to_value.rest != 0) of_value -= to_value.rest * exp(y - s.rest);
    row.put_value(k, static_cast<T>(of_value));
  });
  if (!row.g.d_values || row.group.part() != 0) return;
  for (int64_t k = row.group.rank(); k < row.listed; k += row.group.threads()) {
    if (is_padding(row.indices[k])) {
      row.put_value(k, T(0));
    } else if (row.indices[k] < 0 || row.indices[k] >= p.classes) {
      row.put_value(k, static_cast<T>(kNan));
    }
  }
}

}  // namespace device
}  // namespace mfd
