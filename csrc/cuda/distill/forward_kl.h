// The kernels of forward KL for rows of one dtype that nothing transforms.
#pragma once

#include "cuda/distill/ladder.h"

namespace mfd {
namespace cuda {

// Whether they do; else distill.cu's.
bool takes_forward_kl(const Forward& f, const ScalarLoss* scalar, const Plan& plan);
void forward_kl(const device::ForwardLaunch& launch, const Plan& plan, const Where& where);

}  // namespace cuda
}  // namespace mfd
