// Gradients of one row to several teachers. With b = dD/d(log p), which sums to 0:
//   dD/dv_k = w_k*((p_k/p)*b - p_k*S_k),  S_k = sum (p_k/p)*b = dD/dw_k up to a constant, which weights that
//   sum to 1 do not notice.
#pragma once

#include "common/rows/unheard_teacher.h"
#include "common/vector/mixture.h"
#include "cpu/distill/mixture.h"
#include "cpu/distill/slopes.h"

namespace mfd::MFD_ISA {
namespace {

// Calls act(log p_k, share, i) for every vector of a block; lanes past the end are 0.
template <class S, class Act>
MFD_INLINE void over_shares(const TeacherRow& t, double temperature, const typename S::T* y,
                            const typename S::T* log_p, const typename S::T* b, int64_t n, const Act& act) {
  typedef typename S::T T;
  const LogOf<S> log_of_y = log_of_teacher<S>(t, temperature);
  for (int64_t i = 0; i < n; i += S::kWidth) {
    const int64_t left = n - i < S::kWidth ? n - i : S::kWidth;
    const typename S::V log_pk = log_of_y(S::load_first(y + i, left, static_cast<T>(-kInf)));
    act(log_pk, share_of<S>(log_pk, S::load_first(log_p + i, left, T(0)), S::load(b + i)), i);
  }
}

// S_k of a block for a teacher of weight 0. `x`: the student's logits, `log_p` the mixture's, `label`: of the
// excluded class, if the block holds it.
template <class S>
static double unheard_sum(const BackwardRow<S>& row, const TeacherRow& t, const typename S::T* x,
                          const typename S::T* y, const typename S::T* log_p, int64_t n, int64_t label) {
  const LinearSlopes linear = row_linear_slopes(row, row.g.problem);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double log_pk = (static_cast<double>(y[i]) - t.max) / row.mix_t - t.lse;
    sum += unheard_share(row.g.problem, row, linear, x[i], log_pk, log_p[i], row.decoupled && i == label);
  }
  return sum;
}

template <class S>
static double share_sum(const TeacherRow& t, double temperature, const typename S::T* y,
                        const typename S::T* log_p, const typename S::T* b, int64_t n) {
  typename S::V sum{};
  over_shares<S>(t, temperature, y, log_p, b, n,
                 [&](typename S::V, typename S::V share, int64_t) { sum = sum + share; });
  return S::sum(sum);
}

// dD/dv_k of a block.
template <class S>
static void teacher_slopes(const TeacherRow& t, double temperature, const typename S::T* y,
                           const typename S::T* log_p, const typename S::T* b, int64_t n,
                           typename S::T* out) {
  typedef typename S::T T;
  typedef typename S::V V;
  if (t.weight == 0) {
    for (int64_t i = 0; i < n; i += S::kWidth) S::store(out + i, V{});
    return;
  }
  const V weight = S::splat(static_cast<T>(t.weight)), minus_total = S::splat(static_cast<T>(-t.share));
  over_shares<S>(t, temperature, y, log_p, b, n, [&](V log_pk, V share, int64_t i) {
    S::store(out + i, weight * S::fused(S::exp_of(log_pk), minus_total, share));
  });
}

}  // namespace
}  // namespace mfd::MFD_ISA
