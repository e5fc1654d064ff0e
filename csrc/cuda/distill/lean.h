// Row losses of one dtype and one divergence that nothing transforms, one file for each family of
// divergences.
#pragma once

#include "cuda/distill/ladder.h"

namespace mfd {
namespace cuda {

// Whether the lean kernels do; else forward.cu's.
bool takes_lean(const Forward& f, const ScalarLoss* scalar, const Plan& plan);
void lean_forward(const device::ForwardLaunch& launch, const Plan& plan, const Where& where);

// `aligned`: whether every row begins where 16 bytes do.
void lean_forward_kl(const device::ForwardLaunch& launch, const Plan& plan, bool aligned, const Where& where);
void lean_pointwise(const device::ForwardLaunch& launch, const Plan& plan, bool aligned, const Where& where);
void lean_of_mean(const device::ForwardLaunch& launch, const Plan& plan, bool aligned, const Where& where);

}  // namespace cuda
}  // namespace mfd
