// Entropies, label probabilities and agreement of a row with a sparse teacher.
#pragma once

#include "cuda/topk/rest.cuh"

namespace mfd {
namespace device {

// The label's value, whether it is listed, and whether the row makes no sense.
struct Found {
  double label_y;
  bool label, bad;
};

template <class S, class Row>
MFD_INLINE void write_by_products(const Row& r, const Found& found) {
  typedef typename S::T T;
  constexpr int N = VectorOf<S>::kColumns;
  const Forward& f = r.f;
  const SoftTerm& s = r.state->s;
  const RestSums& rest = r.state->all.rest;
  double most[2] = {rest.max, s.rest};
  r.over_listed([&](int64_t k, int64_t) {
    most[0] = fmax(most[0], static_cast<double>(r.lx[k]));
    most[1] = fmax(most[1], static_cast<double>(r.ly[k]));
  });
  r.group.template reduce<Max>(most);
  double best[2] = {static_cast<double>(S::kLowest), static_cast<double>(S::kLowest)}, v[4] = {};
  r.over_listed([&](int64_t k, int64_t) {
    best[1] = fmax(best[1], static_cast<double>(r.ly[k]));
    const T tx = r.lx[k] - static_cast<T>(most[0]), ty = r.ly[k] - static_cast<T>(most[1]);
    const T q = r.by_ts(tx), w = r.by_tt(ty);
    v[0] += static_cast<double>(q);
    v[1] += q == T(0) ? 0.0 : static_cast<double>(q * tx);
    v[2] += static_cast<double>(w);
    v[3] += w == T(0) ? 0.0 : static_cast<double>(w * ty);
  });
  r.group.template reduce<Max>(best);
  r.group.template reduce<Sum>(v);
  // Negative positions of the maxima, and whether there is a NaN.
  double at_max[3] = {-kInf, -kInf, 0};
  over_vectors<S>(r.group, r.span, [&](int64_t start) {
    T a[N];
    load_logits<S, false>(r.x, start, r.p.classes, a);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const double column = static_cast<double>(start + k);
      if (a[k] == static_cast<T>(most[0]) && -column > at_max[0]) at_max[0] = -column;
      if (a[k] != a[k]) at_max[2] = 1;
    }
  });
  r.over_listed([&](int64_t k, int64_t) {
    const double slot = static_cast<double>(k);
    if (r.ly[k] == static_cast<T>(best[1]) && -slot > at_max[1]) at_max[1] = -slot;
    if (r.ly[k] != r.ly[k]) at_max[2] = 1;
  });
  r.group.template reduce<Max>(at_max);
  if (r.group.rank() != 0 || r.group.part() != 0) return;
  const double below = (rest.max - most[0]), weight = exp(below / r.ts);
  double sum = v[0] + weight * rest.sum_s, sum_t = v[2];
  const double dot = v[1] + (rest.sum_s == 0 ? 0.0 : weight * (rest.dot_s + rest.sum_s * below));
  const double beside = s.rest == -kInf ? 0.0 : exp((s.rest - most[1]) / r.tt);
  sum_t += beside;
  const double dot_t = v[3] + times(beside, s.rest - most[1]);
  if (sum == 0 || found.bad) sum = kNan;
  if (sum_t == 0 || found.bad) sum_t = kNan;
  r.put(f.student_entropy, log(sum) - dot / (r.ts * sum));
  r.put(f.teacher_entropy, log(sum_t) - dot_t / (r.tt * sum_t));
  const bool labelled = r.label >= 0 || found.bad;
  r.put(f.student_label_prob, !labelled ? 0.0 : exp((r.state->all.label - most[0]) / r.ts) / sum);
  const double of_label = found.label ? exp((found.label_y - most[1]) / r.tt) : 0.0;
  r.put(f.teacher_label_prob, of_label == 0 && !found.bad ? 0.0 : of_label / sum_t);
  if (!f.agreement) return;
  const int64_t column = at_max[0] == -kInf ? 0 : static_cast<int64_t>(-at_max[0]);
  const bool chosen = at_max[1] != -kInf;
  const int64_t choice = chosen ? static_cast<int64_t>(-at_max[1]) : 0;
  f.agreement[r.row] = at_max[2] == 0 && !found.bad && chosen && r.indices[choice] == column;
}

}  // namespace device
}  // namespace mfd
