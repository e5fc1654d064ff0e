// Backward pass of the per-row terms of several teachers.
#include "cuda/distill/mixture.h"
#include "cuda/distill/mixture_backward.cuh"

namespace mfd {
namespace cuda {
namespace {

// How a backward launch shares rows, and where it keeps those of the mixture.
struct BackwardPlan {
  bool by_warp, in_shared;
  int threads, groups;  // groups: in a block
  int64_t blocks;       // 0: as many as are resident
  int64_t shared, mixed_at;
};

BackwardPlan backward_plan(const RowProblem& p, const DeviceFacts& facts) {
  BackwardPlan plan{};
  plan.by_warp = !p.is_double && p.classes <= kWarpClasses;
  plan.threads = plan.by_warp ? 128 : 256;
  const int groups = plan.by_warp ? plan.threads / 32 : 1;
  plan.mixed_at =
      round_up(plan.by_warp ? sizeof(device::Warp::Shared) : sizeof(device::ThreadBlock::Shared), 16) +
      states_bytes(p, groups);
  const int64_t rows = groups * 2 * row_bytes(p);
  plan.in_shared = plan.mixed_at + rows <= facts.shared_per_block;
  plan.shared = plan.mixed_at + (plan.in_shared ? rows : 0);
  plan.groups = groups;
  // Rows in device memory should stay in the L2 cache.
  if (!plan.in_shared) plan.blocks = std::min<int64_t>(facts.processors, (p.n_rows + groups - 1) / groups);
  return plan;
}

template <class S, class Group>
void start_backward(const device::MixtureBackward& g, const BackwardPlan& plan, const Where& where) {
  const auto kernel = device::mixture_backward<S, Group>;
  Shape shape{plan.blocks, plan.threads, plan.shared};
  if (!shape.blocks)
    shape.blocks =
        blocks_of(kernel, where, {1, plan.threads, plan.shared}, g.rows.problem.n_rows, plan.groups);
  start(where, shape, kernel, g);
}

}  // namespace

int64_t backward_scratch(const RowProblem& p, const DeviceFacts& facts) {
  const BackwardPlan plan = backward_plan(p, facts);
  return plan.in_shared ? 0 : plan.blocks * 2 * row_bytes(p);
}

void mixture_backward(const Backward& rows, void* scratch, const Where& where) {
  static_assert(sizeof(device::MixtureBackward) <= 4096, "what a kernel takes by value");
  const DeviceGuard guard(where.device);
  const RowProblem& p = rows.problem;
  const BackwardPlan plan = backward_plan(p, facts_of(where.device));
  device::MixtureBackward g{};
  g.rows = rows;
  g.rows.problem = mixed_problem(p, g.teachers);
  g.rows.d_teacher = g.rows.d_teacher_temperature = nullptr;
  g.d_weights = rows.d_weights;
  g.d_temperature = rows.d_teacher_temperature;
  g.mixes = g.d_weights || g.d_temperature;
  for (int k = 0; k < g.teachers.count; ++k) {
    g.d_teachers[k] = rows.d_teachers[k];
    g.mixes = g.mixes || g.d_teachers[k];
  }
  g.teachers_at = static_cast<int>(plan.mixed_at - states_bytes(p, plan.by_warp ? plan.threads / 32 : 1));
  g.mixed_at = static_cast<int>(plan.mixed_at);
  g.scratch = plan.in_shared ? nullptr : static_cast<unsigned char*>(scratch);
  g.row_bytes = row_bytes(p);
  if (p.is_double) {
    start_backward<device::F64, device::ThreadBlock>(g, plan, where);
  } else if (plan.by_warp) {
    start_backward<device::F32, device::Warp>(g, plan, where);
  } else {
    start_backward<device::F32, device::ThreadBlock>(g, plan, where);
  }
}

}  // namespace cuda
}  // namespace mfd
