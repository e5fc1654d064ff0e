// Lean kernels of DKD and NKD, of bfloat16 and float32 logits.
#include "cuda/distill/lean_launch.h"

namespace mfd {
namespace cuda {

void lean_target(const device::ForwardLaunch& launch, const Plan& plan, bool aligned, const Where& where) {
  if (launch.forward.problem.divergence == Divergence::kDKD) {
    start_lean<Divergence::kDKD>(launch, plan, aligned, where);
  } else {
    start_lean<Divergence::kNKD>(launch, plan, aligned, where);
  }
}

}  // namespace cuda
}  // namespace mfd
