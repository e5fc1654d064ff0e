// Launcher of the single pass of mfd_loss. Nothing here waits for the device; every address is one of the
// device's.
#pragma once

#include "common/problems/mfd.h"
#include "cuda/distill/distill.h"

namespace mfd {
namespace cuda {

// Whether the logits and pooled features of a block's rows fit into the device's shared memory.
bool mfd_fits(int64_t width, int64_t classes, int device);

void mfd_loss(const MfdPass& pass, const Where& where);

}  // namespace cuda
}  // namespace mfd
