// The single pass of mfd_loss: its place in shared memory, and the launch.
#include "cuda/fusion/mfd_loss.h"
#include "cuda/mfd/single_pass.cuh"
#include "cuda/runtime/launch.h"

namespace mfd {
namespace cuda {
namespace {

struct SinglePassLayout {
  int y_stride, z_stride;
  int64_t z_at, shared_at, bytes;
};

SinglePassLayout layout_of(int64_t width, int64_t classes) {
  SinglePassLayout l{};
  l.y_stride = device::parked_stride(width);
  l.z_stride = device::parked_stride(classes);
  l.z_at = int64_t{kMfdRows} * l.y_stride * 4;
  l.shared_at = l.z_at + int64_t{kMfdRows} * l.z_stride * 4;
  l.bytes = l.shared_at + static_cast<int64_t>(sizeof(device::MfdShared));
  return l;
}

Scalar scalar_of(const RowScalar& value) {
  return {value.rows, value.value};
}

}  // namespace

bool mfd_fits(int64_t width, int64_t classes, int device) {
  return layout_of(width, classes).bytes <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

void mfd_loss(const MfdPass& pass, const Where& where) {
  const DeviceGuard guard(where.device);
  const RowProblem& problem = pass.forward.problem;
  const SinglePassLayout l = layout_of(pass.pool.width, problem.classes);
  device::MfdLaunch launch{};
  launch.pass = pass;
  launch.y_stride = l.y_stride;
  launch.z_stride = l.z_stride;
  launch.z_at = static_cast<int>(l.z_at);
  launch.shared_at = static_cast<int>(l.shared_at);
  launch.fast = true;
  for (int m = 0; m < pass.pool.modalities; ++m)
    launch.fast = launch.fast && pass.pool.features[m].dtype != Dtype::kFloat32;
  device::ForwardLaunch& logits = launch.logits;
  logits.forward = pass.forward;
  logits.forward.problem.student = {
      nullptr, Dtype::kFloat32, problem.n_rows, 0, l.z_stride, l.z_stride, 1.0, 0.0, false};
  logits.soft_weight = scalar_of(pass.soft_weight);
  logits.hard_weight = scalar_of(pass.hard_weight);
  logits.divisor = scalar_of(pass.divisor);
  logits.count_rows = pass.count_rows;
  launch.lean = pass.forward.use_soft && problem.divergence == Divergence::kForwardKL;
  start(where, {(problem.n_rows + kMfdRows - 1) / kMfdRows, device::kMfdThreads, l.bytes},
        device::mfd_single_pass<>, launch);
}

}  // namespace cuda
}  // namespace mfd
