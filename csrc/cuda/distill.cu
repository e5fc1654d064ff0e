// Forward pass of the row losses: which threads share a row, and the launch.
#include "cuda/distill_forward.cuh"
#include "cuda/launch.h"
#include "cuda/scale.cuh"

namespace mfd {
namespace cuda {
namespace {

constexpr int64_t kWarpClasses = 1024;
constexpr int kThreads = device::Residency<device::Block>::kThreads;
// Up to this many rows each block counts for itself.
constexpr int64_t kCountInPlace = 8192;
constexpr int64_t kOverhead = 1024;  // of each block, kept by the system

int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

// Bytes of one side's columns in one of `parts` blocks.
int64_t parked_bytes(const Problem& p, const Side& side, int parts) {
  constexpr int64_t kColumns = device::VectorOf<device::F32>::kColumns;
  const int64_t vectors = (p.classes + kColumns - 1) / kColumns, each = (vectors + parts - 1) / parts;
  return round_up(each * kColumns * (side.dtype == Dtype::kFloat32 ? 4 : 2), 16);
}

int64_t pair_bytes(const Problem& p, bool use_soft, int parts) {
  return parked_bytes(p, p.student, parts) + (use_soft ? parked_bytes(p, p.teacher, parts) : 0);
}

// Groups' own memory and states; find_factors and finish_loss need 33 doubles of the states' place.
template <class Group>
int64_t states_at() {
  return round_up(sizeof(typename Group::Shared), 16);
}
template <class Group>
int64_t parking_at(int groups) {
  return states_at<Group>() + round_up(groups * sizeof(device::RowState) + 34 * sizeof(double), 16);
}

int threads_for(int64_t vectors) {
  return vectors >= 2 * kThreads ? kThreads : kThreads / 2;
}

// Whether the lean kernels do.
bool is_lean(const Forward& f) {
  const auto plain = [](const Side& s) { return s.scale == 1.0 && !(s.softcap > 0) && !s.standardize; };
  return f.use_soft && f.problem.divergence == Divergence::kForwardKL && !f.problem.is_double &&
         !f.student_entropy && plain(f.problem.student) && plain(f.problem.teacher);
}

template <class S, class Group, bool kParked, bool kLean>
void start_kernel(device::ForwardLaunch launch, const Plan& plan, const DeviceFacts& facts,
                  const Where& where) {
  const Problem& p = launch.forward.problem;
  const int in_block = plan.rung == Rung::kWarp ? plan.threads / 32 : 1;
  launch.states_at = static_cast<int>(states_at<Group>());
  launch.parking_at = static_cast<int>(parking_at<Group>(in_block));
  launch.teacher_at = kParked ? static_cast<int>(parked_bytes(p, p.student, plan.cluster)) : 0;
  launch.parking_bytes = kParked ? static_cast<int>(pair_bytes(p, launch.forward.use_soft, plan.cluster)) : 0;
  const int64_t shared = launch.parking_at + int64_t{in_block} * launch.parking_bytes;
  // As many blocks as the device runs at a time; a streamed row should find its second pass in the L2 cache.
  int64_t resident = facts.shared_per_processor / (shared + kOverhead);
  if (resident > 2048 / plan.threads) resident = 2048 / plan.threads;
  if (resident < 1 || !kParked) resident = 1;
  int64_t clusters = facts.processors * resident / plan.cluster;
  if (clusters > kMaxGroups / in_block) clusters = kMaxGroups / in_block;
  const int64_t needed = (p.n_rows + in_block - 1) / in_block;
  if (clusters > needed) clusters = needed;
  if (clusters < 1) clusters = 1;
  start(where, {clusters * plan.cluster, plan.threads, shared, plan.cluster},
        device::distill_forward<S, Group, kParked, kLean>, launch);
}

template <class Group, bool kParked>
void start_forward(const device::ForwardLaunch& launch, const Plan& plan, const DeviceFacts& facts,
                   const Where& where) {
  if (is_lean(launch.forward)) {
    start_kernel<device::F32, Group, kParked, true>(launch, plan, facts, where);
  } else {
    start_kernel<device::F32, Group, kParked, false>(launch, plan, facts, where);
  }
}

}  // namespace

Plan plan_of(const Problem& p, bool use_soft, int device) {
  const DeviceFacts facts = facts_of(device);
  if (p.is_double) return {Rung::kStream, 1, 128};
  const int64_t vectors = (p.classes + 7) / 8;
  if (p.classes <= kWarpClasses) return {Rung::kWarp, 1, device::Residency<device::Warp>::kThreads};
  const int64_t room = facts.shared_per_block - parking_at<device::Cluster>(1);
  // Two blocks on a processor overlap one's loads with the other's arithmetic.
  const int64_t half = (facts.shared_per_processor / 2 - kOverhead) - parking_at<device::Cluster>(1);
  const bool has_clusters = facts.capability >= 90 && facts.capability < 120;
  if (has_clusters) {
    for (const int64_t bound : {half, room})
      for (int cluster = 1; cluster <= 8; cluster *= 2)
        if (pair_bytes(p, use_soft, cluster) <= bound && bound <= room)
          return {cluster == 1 ? Rung::kBlock : Rung::kCluster, cluster, threads_for(vectors / cluster)};
  } else if (pair_bytes(p, use_soft, 1) <= room) {
    return {Rung::kBlock, 1, threads_for(vectors)};
  }
  return {Rung::kStream, 1, kThreads};
}

void forward(const Forward& f, const ScalarLoss* scalar, const Where& where) {
  const DeviceGuard guard(where.device);
  const DeviceFacts facts = facts_of(where.device);
  const Problem& p = f.problem;
  device::ForwardLaunch launch{};
  launch.forward = f;
  launch.soft_weight = launch.hard_weight = launch.divisor = {nullptr, 1.0};
  if (scalar) {
    launch.soft_weight = {scalar->soft_weight.address, scalar->soft_weight.value};
    launch.hard_weight = {scalar->hard_weight.address, scalar->hard_weight.value};
    launch.divisor = {scalar->divisor.address, scalar->divisor.value};
    launch.count_rows = scalar->count_rows;
    ScalarWorkspace& workspace = *scalar->workspace;
    launch.partial = workspace.partial;
    launch.ticket = &workspace.ticket;
    launch.loss = scalar->loss;
    if (scalar->count_rows && p.n_rows > kCountInPlace) {
      constexpr int64_t kMost = sizeof(workspace.counts) / sizeof(workspace.counts[0]);
      const int64_t blocks = (p.n_rows + 1023) / 1024;
      int64_t* const counts = workspace.counts;
      launch.counts = counts;
      launch.n_counts = static_cast<int>(blocks < kMost ? blocks : kMost);
      start(where, {launch.n_counts, 256, 32 * sizeof(double)}, device::count_rows<>, p, counts);
    }
  }
  const Plan plan = plan_of(p, f.use_soft, where.device);
  if (p.is_double) return start_kernel<device::F64, device::Block, false, false>(launch, plan, facts, where);
  switch (plan.rung) {
    case Rung::kWarp:
      return start_forward<device::Warp, true>(launch, plan, facts, where);
    case Rung::kBlock:
      return start_forward<device::Block, true>(launch, plan, facts, where);
    case Rung::kCluster:
      return start_forward<device::Cluster, true>(launch, plan, facts, where);
    case Rung::kStream:
      return start_forward<device::Block, false>(launch, plan, facts, where);
  }
}

void scale_in_place(void* grad, Dtype dtype, int64_t n, const void* factor, Dtype factor_dtype,
                    const Where& where) {
  const DeviceGuard guard(where.device);
  constexpr int kThreads = 256;
  constexpr int64_t kPerBlock = kThreads * 8;
  const int64_t needed = (n + kPerBlock - 1) / kPerBlock;
  const int64_t most = int64_t{8} * attribute(cudaDevAttrMultiProcessorCount, where.device);
  start(where, {needed < most ? needed : most, kThreads}, device::scale_in_place<>, grad, dtype, n, factor,
        factor_dtype);
}

}  // namespace cuda
}  // namespace mfd
