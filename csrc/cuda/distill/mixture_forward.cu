// Forward pass of the row losses of several teachers.
#include "cuda/distill/mixture.h"
#include "cuda/distill/mixture_forward.cuh"

namespace mfd {
namespace cuda {
namespace {

int64_t parked_pair(const RowProblem& p, int parts) {
  return parked_bytes(p.classes, p.student.dtype, parts) + parked_bytes(p.classes, Dtype::kFloat32, parts);
}

int groups_in_block(const Plan& plan) {
  return plan.rung == Rung::kWarp ? plan.threads / 32 : 1;
}

template <class Group>
int64_t forward_parking_at(const RowProblem& p, int groups) {
  return parking_at<Group>(groups) + states_bytes(p, groups);
}

// Rows of the mixture that a forward launch keeps in device memory.
int64_t streamed_rows(const RowProblem& p, const Plan& plan, const DeviceFacts& facts) {
  return plan.rung == Rung::kStream ? streaming_blocks(facts, p.n_rows) : 0;
}

template <class S, class Group>
void start_kernel(device::MixtureLaunch launch, const RowProblem& p, const Plan& plan,
                  const DeviceFacts& facts, const Where& where) {
  const int in_block = groups_in_block(plan);
  launch.parked = plan.rung != Rung::kStream;
  launch.states_at = static_cast<int>(states_at<Group>());
  launch.teachers_at = static_cast<int>(parking_at<Group>(in_block));
  launch.parking_at = static_cast<int>(forward_parking_at<Group>(p, in_block));
  launch.teacher_at =
      launch.parked ? static_cast<int>(parked_bytes(p.classes, p.student.dtype, plan.cluster)) : 0;
  launch.parking_bytes = launch.parked ? static_cast<int>(parked_pair(p, plan.cluster)) : 0;
  const int64_t shared = launch.parking_at + int64_t{in_block} * launch.parking_bytes;
  const auto kernel = device::mixture_forward<S, Group>;
  Shape shape{1, plan.threads, shared, plan.cluster};
  shape.blocks =
      launch.parked ? blocks_of(kernel, where, shape, p.n_rows, in_block) : streaming_blocks(facts, p.n_rows);
  start(where, shape, kernel, launch);
}

}  // namespace

Plan mixture_plan(const RowProblem& p, const DeviceFacts& facts) {
  return choose_plan(facts, p.classes, p.is_double, forward_parking_at<device::Cluster>(p, 1),
                     [&](int parts) { return parked_pair(p, parts); });
}

int64_t mixture_scratch(const RowProblem& p, bool backward, int device) {
  const DeviceFacts facts = facts_of(device);
  if (backward) return backward_scratch(p, facts);
  return streamed_rows(p, mixture_plan(p, facts), facts) * row_bytes(p);
}

void mixture_forward(const Forward& f, const ScalarLoss* scalar, void* scratch, const Where& where) {
  static_assert(sizeof(device::MixtureLaunch) <= 4096, "what a kernel takes by value");
  const DeviceGuard guard(where.device);
  const DeviceFacts facts = facts_of(where.device);
  const RowProblem& p = f.problem;
  device::MixtureLaunch launch{};
  launch.forward = f;
  launch.forward.problem = mixed_problem(p, launch.teachers);
  describe_scalar(launch, scalar, where);
  launch.scratch = static_cast<unsigned char*>(scratch);
  launch.scratch_bytes = row_bytes(p);
  const Plan plan = mixture_plan(p, facts);
  if (p.is_double) return start_kernel<device::F64, device::Blocks>(launch, p, plan, facts, where);
  if (plan.rung == Rung::kWarp) return start_kernel<device::F32, device::Warp>(launch, p, plan, facts, where);
  start_kernel<device::F32, device::Blocks>(launch, p, plan, facts, where);
}

}  // namespace cuda
}  // namespace mfd
