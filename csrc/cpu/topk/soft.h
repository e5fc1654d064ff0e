// The soft term of a sparse teacher: its listed classes as vectors and the rest, one class, in double
// precision. What the rest contributes to a divergence that sums over its classes is that of one class of
// their mass wherever f(q, 0) is proportional to q.
#pragma once

#include <type_traits>

#include "common/vector/topk_divergences.h"
#include "cpu/distill/slopes.h"
#include "cpu/simd/log.h"
#include "cpu/topk/rest.h"

namespace mfd::MFD_ISA {
namespace {

// log(1 - sum exp(y)) of log-probabilities; -inf where nothing is left.
template <class S>
static double log_of_rest(const typename S::T* y, int64_t n) {
  const double left = 1 - wide_exponential_sum(y, n);
  return left <= 0 ? -kInf : log(left);
}

// Copies the teacher's values; returns the value of the rest.
template <class S>
static double load_values(const TopKRow<S>& c) {
  copy_block<S>({&c.p.teacher, row_offset(c.p.teacher, c.row), -1, {}}, c.listed.count, c.listed.y);
  c.clear_padding(c.listed.y);
  const bool has_rest = c.pass.teacher.logprobs && !c.renormalized && !c.lists_all();
  return has_rest ? log_of_rest<S>(c.listed.y, c.listed.count) : -kInf;
}

// The largest of n values and, in the compute dtype, one more.
template <class S>
static double max_with(const typename S::T* x, int64_t n, double other) {
  const double largest = static_cast<double>(block_max<S>(x, n)), last = static_cast<typename S::T>(other);
  return last > largest ? last : largest;
}

// sum exp((y - max)/T) over the listed values and the rest.
template <class S>
static double teacher_sum(const TopKRow<S>& c, double max, double rest, double temperature,
                          typename S::T* store = nullptr) {
  const double listed = exponential_sum<S>(c.listed.y, c.listed.count, max, Exponent<S>(temperature), store);
  return rest == -kInf ? listed : listed + exp((rest - max) / temperature);
}

// Makes probabilities of exponentials whose sum is exp(lse); see `probabilities`.
template <class S>
static void divide_by_mass(double lse, int64_t n, typename S::T* e) {
  const typename S::V factor = S::splat(static_cast<typename S::T>(inverse_mass(lse)));
  for (int64_t i = 0; i < n; i += S::kWidth) S::store(e + i, S::load(e + i) * factor);
}

// Calls act with the listed logarithms, and whether those of both sides are near: a constant to the compiler.
template <class S, class Act>
MFD_INLINE void with_logs(const TopKRow<S>& c, const SoftTerm& s, const Act& act) {
  const RowLogs<S> logs(LogScale(s.max_s, s.max_s, c.ts, s.lse_s), LogScale(s.max_t, s.max_t, c.tt, s.lse_t));
  if (logs.close) {
    act(logs, std::true_type());
  } else {
    act(logs, std::false_type());
  }
}

// Sums of f, g and h over the listed classes.
template <class S, class D>
static ClassPoint points_of(const D& divergence, const TopKRow<S>& c, const SoftTerm& s) {
  typedef typename S::V V;
  const Listed<S>& l = c.listed;
  V value{}, g{}, h{};
  with_logs<S>(c, s, [&](const RowLogs<S>& logs, auto close) {
    over_logit_pairs<S>(l.x, l.y, l.count, [&](V x, V y, int64_t i) {
      const Point<S> point =
          point_at<S, decltype(close)::value>(divergence, logs, x, y, S::load(l.q + i), S::load(l.p + i));
      value = value + point.value;
      g = g + point.g;
      h = h + point.h;
    });
  });
  return {S::sum(value), S::sum(g), S::sum(h)};
}

template <class S>
static ClassPoint listed_points(const TopKRow<S>& c, const SoftTerm& s) {
  ClassPoint sums{};
  with_topk_divergence<S>(c.p, s.far, [&](const auto& divergence) { sums = points_of<S>(divergence, c, s); });
  return sums;
}

// As is_far; not of a p that is no whole distribution.
template <class S>
static bool is_far_teacher(const TopKRow<S>& c, const SoftTerm& s) {
  if (!can_be_far(c.p) || c.pass.teacher.tail == Tail::kZero) return false;
  return points_of<S>(ForwardKL<S>(0, 0), c, s).value + times(s.p, s.log_p - s.log_q) >= kFarKL;
}

// sum f and the two means of a sum over the classes; `powers` is sum q^degree over the rest.
template <class S>
static void pointwise_value(const TopKRow<S>& c, double powers, SoftTerm& s) {
  const RowProblem& p = c.p;
  const bool whole = c.pass.teacher.tail != Tail::kZero;
  s.far = is_far_teacher<S>(c, s);
  ClassPoint rest{0.0, 0.0, 0.0};
  if (c.powers) {
    rest = power_point(p, powers);
  } else if (!c.renormalized) {
    const double seen = whole ? s.p : 0.0, log_seen = whole ? s.log_p : -kInf;
    with_topk_divergence<F64>(p, s.far, [&](const auto& divergence) {
      const Point<F64> point = divergence(s.q, seen, log_seen - s.log_q, s.log_q, log_seen);
      rest = {point.value, point.g, point.h};
    });
  }
  settle_points(p, whole, listed_points<S>(c, s), rest, s);
}

// What the listed classes besides the label contribute, as settle_target takes it.
template <class S>
static ClassPoint target_points(const TopKRow<S>& c, const SoftTerm& s) {
  if (!c.unit) return listed_points<S>(c, s);
  const Listed<S>& l = c.listed;
  const LogOf<S> log_q(LogScale(s.max_s, s.max_s, c.ts, s.lse_s));
  typename S::V sum{};
  over_logit_pairs<S>(l.x, l.x, l.count, [&](typename S::V x, typename S::V, int64_t i) {
    sum = sum - weighed<S>(S::load(l.p + i), log_q(x));
  });
  return {0.0, 0.0, S::sum(sum)};
}

// The whole soft term; `max` and `rest` are of the student's classes, and `label` is the logit of the
// decoupled one.
template <class S>
static SoftTerm soft_term(const TopKRow<S>& c, double max, const RestSums& rest, double label) {
  typedef typename S::T T;
  const Listed<S>& l = c.listed;
  SoftTerm s{};
  s.rest = load_values<S>(c);
  s.max_s = c.renormalized ? static_cast<double>(block_max<S>(l.x, l.count)) : max;
  if (c.decoupled) {
    s.label_y = l.y[l.label];
    l.y[l.label] = static_cast<T>(-kInf);
  }
  s.max_t = max_with<S>(l.y, l.count, s.rest);
  s.rest_x = rest.max - s.max_s;
  const double beside = c.renormalized ? 0.0 : rest.sum_s * exp(s.rest_x / c.ts);
  s.sum_s = beside + exponential_sum<S>(l.x, l.count, s.max_s, Exponent<S>(c.ts), l.q);
  s.sum_t = teacher_sum<S>(c, s.max_t, s.rest, c.tt, l.p);
  s.label_y -= s.max_t;
  settle_sums(c.p, c.ts, c.tt, beside, c.renormalized ? 0.0 : rest.sum_s, s);
  s.p = static_cast<T>(s.p);
  divide_by_mass<S>(s.lse_s, l.count, l.q);
  divide_by_mass<S>(s.lse_t, l.count, l.p);
  if (!c.decoupled) {
    pointwise_value<S>(c, c.powers ? rest_powers(rest.powers, c.degree(), c.ts, s) : 0.0, s);
    return s;
  }
  if (c.unit) {
    const Exponent<S> at_one(1.0);
    s.sum_h = (c.renormalized ? 0.0 : rest.sum_h * exp(s.rest_x)) +
              exponential_sum<S>(l.x, l.count, s.max_s, at_one);
    s.sum_u = teacher_sum<S>(c, s.max_t, s.rest, 1.0);
  }
  s.label_x = label - s.max_s;
  settle_target(c.p, c.ts, c.tt, target_points<S>(c, s), s);
  return s;
}

// dD/du and dD/dv of the listed classes, to_u and to_v; the decoupled label has 0 there.
template <class S>
static void listed_slopes(const TopKRow<S>& c, const SoftTerm& s) {
  const Listed<S>& l = c.listed;
  const BlockSlopes<S> b = {l.q, l.p, l.to_u, l.to_v};
  with_logs<S>(c, s, [&](const RowLogs<S>& logs, auto close) {
    constexpr bool kClose = decltype(close)::value;
    if (c.decoupled) {
      const TargetSlopes& t = s.slopes;
      linear_slopes<S, kClose>({t.student, t.teacher, t.rest_weight, s.mean_h, t.rest_shift, c.unit}, logs,
                               l.x, l.y, l.count, b);
      return;
    }
    with_topk_divergence<S>(c.p, s.far, [&](const auto& divergence) {
      pointwise_slopes<S, kClose>(divergence, logs, l.x, l.y, l.count, s.mean_g, s.mean_h, b);
    });
  });
}

}  // namespace
}  // namespace mfd::MFD_ISA
