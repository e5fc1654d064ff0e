// Backward pass of the per-row terms.
#include "cuda/distill/backward.cuh"
#include "cuda/distill/ladder.h"

namespace mfd {
namespace cuda {
namespace {

template <class S, class Group>
void start_backward(const Backward& g, int in_block, const Where& where) {
  const auto kernel = device::distill_backward<S, Group>;
  Shape shape{1, kThreads, sizeof(typename Group::Shared)};
  shape.blocks = blocks_of(kernel, where, shape, g.problem.n_rows, in_block);
  start(where, shape, kernel, g);
}

}  // namespace

void backward(const Backward& g, const Where& where) {
  const DeviceGuard guard(where.device);
  if (g.problem.is_double) {
    start_backward<device::F64, device::ThreadBlock>(g, 1, where);
  } else if (g.problem.classes <= kWarpClasses) {
    start_backward<device::F32, device::Warp>(g, kThreads / 32, where);
  } else {
    start_backward<device::F32, device::ThreadBlock>(g, 1, where);
  }
}

}  // namespace cuda
}  // namespace mfd
