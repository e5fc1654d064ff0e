// Backward pass of the per-row terms.
#include "cuda/distill/backward.cuh"
#include "cuda/runtime/launch.h"

namespace mfd {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kWarpClasses = 1024;

template <class S, class Group>
void start_backward(const Backward& g, int in_block, const Where& where) {
  const int64_t needed = (g.problem.n_rows + in_block - 1) / in_block;
  const int64_t most = int64_t{4} * attribute(cudaDevAttrMultiProcessorCount, where.device);
  start(where, {needed < most ? needed : most, kThreads, sizeof(typename Group::Shared)},
        device::distill_backward<S, Group>, g);
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
