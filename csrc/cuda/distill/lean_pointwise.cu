// Lean kernels of the reverse KL and of the total variation distance.
#include "cuda/distill/lean_launch.h"

namespace mfd {
namespace cuda {

void lean_pointwise(const device::ForwardLaunch& launch, const Plan& plan, bool aligned, const Where& where) {
  if (launch.forward.problem.divergence == Divergence::kReverseKL) {
    start_lean<Divergence::kReverseKL>(launch, plan, aligned, where);
  } else {
    start_lean<Divergence::kTVD>(launch, plan, aligned, where);
  }
}

}  // namespace cuda
}  // namespace mfd
