// Forward pass of the row losses: which threads share a row, and the launch.
#include "cuda/distill/ladder.h"
#include "cuda/rows/scale.cuh"

namespace mfd {
namespace cuda {
namespace {

// Up to this many rows each block counts for itself.
constexpr int64_t kCountInPlace = 8192;

int64_t pair_bytes(const RowProblem& p, bool use_soft, int parts) {
  return parked_bytes(p.classes, p.student.dtype, parts) +
         (use_soft ? parked_bytes(p.classes, p.teacher.dtype, parts) : 0);
}

// Whether the lean kernels do.
bool is_lean(const Forward& f) {
  const auto plain = [](const Side& s) { return s.scale == 1.0 && !(s.softcap > 0) && !s.standardize; };
  return f.use_soft && f.problem.divergence == Divergence::kForwardKL && !f.problem.is_double &&
         !f.student_entropy && plain(f.problem.student) && plain(f.problem.teacher);
}

template <class S, class Group, bool kParked, bool kLean>
void start_kernel(device::ForwardLaunch launch, const Plan& plan, const Where& where) {
  const RowProblem& p = launch.forward.problem;
  const int in_block = plan.rung == Rung::kWarp ? plan.threads / 32 : 1;
  launch.states_at = static_cast<int>(states_at<Group>());
  launch.parking_at = static_cast<int>(parking_at<Group>(in_block));
  launch.teacher_at = kParked ? static_cast<int>(parked_bytes(p.classes, p.student.dtype, plan.cluster)) : 0;
  launch.parking_bytes = kParked ? static_cast<int>(pair_bytes(p, launch.forward.use_soft, plan.cluster)) : 0;
  const int64_t shared = launch.parking_at + int64_t{in_block} * launch.parking_bytes;
  const auto kernel = device::distill_forward<S, Group, kParked, kLean>;
  Shape shape{1, plan.threads, shared, plan.cluster};
  shape.blocks = kParked ? blocks_of(kernel, where, shape, p.n_rows, in_block)
                         : streaming_blocks(facts_of(where.device), p.n_rows);
  start(where, shape, kernel, launch);
}

template <class Group, bool kParked>
void start_forward(const device::ForwardLaunch& launch, const Plan& plan, const Where& where) {
  if (is_lean(launch.forward)) {
    start_kernel<device::F32, Group, kParked, true>(launch, plan, where);
  } else {
    start_kernel<device::F32, Group, kParked, false>(launch, plan, where);
  }
}

}  // namespace

Plan plan_of(const RowProblem& p, bool use_soft, int device) {
  const DeviceFacts facts = facts_of(device);
  if (p.mixture && use_soft) return mixture_plan(p, facts);
  const int64_t fixed = std::max(parking_at<device::Cluster>(1), states_at<device::Cluster>() + kLeanBytes);
  return choose_plan(facts, p.classes, p.is_double, fixed,
                     [&](int parts) { return pair_bytes(p, use_soft, parts); });
}

void describe_scalar(device::ForwardLaunch& launch, const ScalarLoss* scalar, const Where& where) {
  const RowProblem& p = launch.forward.problem;
  launch.soft_weight = launch.hard_weight = launch.divisor = {nullptr, 1.0};
  if (!scalar) return;
  launch.soft_weight = {scalar->soft_weight.address, scalar->soft_weight.value};
  launch.hard_weight = {scalar->hard_weight.address, scalar->hard_weight.value};
  launch.divisor = {scalar->divisor.address, scalar->divisor.value};
  launch.count_rows = scalar->count_rows;
  ScalarWorkspace& workspace = *scalar->workspace;
  launch.partial = workspace.partial;
  launch.ticket = &workspace.ticket;
  launch.loss = scalar->loss;
  if (!scalar->count_rows || p.n_rows <= kCountInPlace) return;
  constexpr int64_t kMost = sizeof(workspace.counts) / sizeof(workspace.counts[0]) / 2;
  const int64_t blocks = (p.n_rows + 1023) / 1024;
  int64_t* const counts = workspace.counts;
  launch.counts = counts;
  launch.n_counts = static_cast<int>(blocks < kMost ? blocks : kMost);
  start(where, {launch.n_counts, 256, 32 * sizeof(double)}, device::count_rows<>, p, counts);
}

void forward(const Forward& f, const ScalarLoss* scalar, const Where& where) {
  const DeviceGuard guard(where.device);
  const RowProblem& p = f.problem;
  device::ForwardLaunch launch{};
  launch.forward = f;
  describe_scalar(launch, scalar, where);
  const Plan plan = plan_of(p, f.use_soft, where.device);
  if (takes_lean(f, scalar, plan)) return lean_forward(launch, plan, where);
  if (p.is_double) return start_kernel<device::F64, device::ThreadBlock, false, false>(launch, plan, where);
  switch (plan.rung) {
    case Rung::kWarp:
      return start_forward<device::Warp, true>(launch, plan, where);
    case Rung::kBlock:
      return start_forward<device::ThreadBlock, true>(launch, plan, where);
    case Rung::kCluster:
      return start_forward<device::Cluster, true>(launch, plan, where);
    case Rung::kStream:
      return start_forward<device::ThreadBlock, false>(launch, plan, where);
  }
}

void scale_in_place(void* grad, Dtype dtype, int64_t n, const void* factor, Dtype factor_dtype,
                    const Where& where) {
  const DeviceGuard guard(where.device);
  constexpr int kThreads = 256;
  constexpr int64_t kPerBlock = kThreads * 8;
  const int64_t needed = (n + kPerBlock - 1) / kPerBlock;
  const int64_t most = resident(device::scale_in_place<>, where, {1, kThreads});
  start(where, {std::min(needed, most), kThreads}, device::scale_in_place<>, grad, dtype, n, factor,
        factor_dtype);
}

}  // namespace cuda
}  // namespace mfd
