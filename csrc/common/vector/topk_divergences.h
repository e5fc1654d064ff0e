// The divergences of a sparse teacher: those of all teachers, and the cross-entropy, which elsewhere needs
// one pass, as a sum over the listed classes and the rest.
#pragma once

#include "common/vector/divergences.h"

namespace mfd {

// f = -p*log q, df/dq = 1 - p/q
template <class S>
struct CrossEntropy {
  typedef typename S::V V;
  static constexpr bool kTakesLogs = true;
  MFD_MEMBER Point<S> operator()(V q, V p, V, V log_q, V) const {
    const V h = weighed<S>(p, -log_q);
    return {h, q - p, h};
  }
};

template <class S, class Act>
MFD_INLINE void with_topk_divergence(const RowProblem& p, bool far, const Act& act) {
  if (p.divergence == Divergence::kCrossEntropy) return act(CrossEntropy<S>());
  with_divergence<S>(p, far, act);
}

}  // namespace mfd
