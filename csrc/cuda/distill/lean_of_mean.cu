// Lean kernels of the divergences from a mean of p and q: JSD and the skew divergences, of 16-bit logits.
#include "cuda/distill/lean_launch.h"

namespace mfd {
namespace cuda {

void lean_of_mean(const device::ForwardLaunch& launch, const Plan& plan, bool aligned, const Where& where) {
  switch (launch.forward.problem.divergence) {
    case Divergence::kJSD:
      return start_lean<Divergence::kJSD>(launch, plan, aligned, where);
    case Divergence::kSkewKL:
      return start_lean<Divergence::kSkewKL>(launch, plan, aligned, where);
    default:
      return start_lean<Divergence::kSkewReverseKL>(launch, plan, aligned, where);
  }
}

}  // namespace cuda
}  // namespace mfd
