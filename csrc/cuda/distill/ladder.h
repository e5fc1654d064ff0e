// The ladder of the row kernels: which threads share a row, and how large the grid is.
#pragma once

#include <algorithm>

#include "cuda/distill/forward.cuh"
#include "cuda/runtime/resident.h"

namespace mfd {
namespace cuda {

constexpr int64_t kWarpClasses = 1024;
constexpr int kThreads = device::Residency<device::ThreadBlock>::kThreads;
constexpr int64_t kOverhead = 1024;  // of each block, kept by the system

inline int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

// Bytes of a row's columns in one of `parts` blocks.
inline int64_t parked_bytes(int64_t classes, Dtype dtype, int parts) {
  constexpr int64_t kColumns = device::VectorOf<device::F32>::kColumns;
  const int64_t vectors = (classes + kColumns - 1) / kColumns, each = (vectors + parts - 1) / parts;
  return round_up(each * kColumns * (dtype == Dtype::kFloat32 ? 4 : 2), 16);
}

// Groups' own memory and states; find_factors and finish_loss need 33 doubles of the states' place.
template <class Group>
int64_t states_at() {
  return round_up(sizeof(typename Group::Shared), 16);
}
template <class Group, class State = device::RowState>
int64_t parking_at(int groups) {
  return states_at<Group>() + round_up(groups * sizeof(State) + 34 * sizeof(double), 16);
}

// Beside the group's own memory and the rows, at most: terms and state of a lean kernel, and of both its rows
// two vectors that begin or end outside an unaligned row.
constexpr int64_t kLeanBytes = 768;

inline int threads_for(int64_t vectors) {
  return vectors >= 2 * kThreads ? kThreads : kThreads / 2;
}

// `bytes(parts)`: of shared memory for the part of a row in one of `parts` blocks; `fixed`: for all else.
template <class Bytes>
Plan choose_plan(const DeviceFacts& facts, int64_t classes, bool is_double, int64_t fixed,
                 const Bytes& bytes) {
  if (is_double) return {Rung::kStream, 1, 128};
  const int64_t vectors = (classes + 7) / 8;
  if (classes <= kWarpClasses) return {Rung::kWarp, 1, device::Residency<device::Warp>::kThreads};
  const int64_t room = facts.shared_per_block - fixed;
  // Two blocks on a processor overlap one's loads with the other's arithmetic.
  const int64_t half = (facts.shared_per_processor / 2 - kOverhead) - fixed;
  const bool has_clusters = facts.capability >= 90 && facts.capability < 120;
  if (has_clusters) {
    for (const int64_t bound : {half, room})
      for (int cluster = 1; cluster <= 8; cluster *= 2)
        if (bytes(cluster) <= bound && bound <= room)
          return {cluster == 1 ? Rung::kBlock : Rung::kCluster, cluster, threads_for(vectors / cluster)};
  } else if (bytes(1) <= room) {
    return {Rung::kBlock, 1, threads_for(vectors)};
  }
  return {Rung::kStream, 1, kThreads};
}

// A streamed row should find its second pass in the L2 cache: one block on each processor.
inline int64_t streaming_blocks(const DeviceFacts& facts, int64_t n_rows) {
  return std::max<int64_t>(1, std::min({int64_t{facts.processors}, kMaxGroups, n_rows}));
}

// As many blocks of `shape`, which has one, as the device runs at a time and the rows need.
template <class... Parameters>
int64_t blocks_of(void (*kernel)(Parameters...), const Where& where, const Shape& shape, int64_t n_rows,
                  int in_block) {
  const int64_t needed = (n_rows + in_block - 1) / in_block, most = kMaxGroups / in_block;
  return std::max<int64_t>(1, std::min({resident(kernel, where, shape), most, needed})) * shape.cluster;
}

Plan mixture_plan(const RowProblem& p, const DeviceFacts& facts);

// What every forward launch gets of the scalar loss; starts the launch that counts many rows. `scalar` is
// null for per-row outputs.
void describe_scalar(device::ForwardLaunch& launch, const ScalarLoss* scalar, const Where& where);

// Row losses of one dtype and one divergence that nothing transforms: the lean kernels, one file for each
// family of divergences; the others are forward.cu's.
bool takes_lean(const Forward& f, const ScalarLoss* scalar, const Plan& plan);
void lean_forward(const device::ForwardLaunch& launch, const Plan& plan, const Where& where);

// `aligned`: whether every row begins where 16 bytes do.
void lean_forward_kl(const device::ForwardLaunch& launch, const Plan& plan, bool aligned, const Where& where);
void lean_pointwise(const device::ForwardLaunch& launch, const Plan& plan, bool aligned, const Where& where);
void lean_target(const device::ForwardLaunch& launch, const Plan& plan, bool aligned, const Where& where);
void lean_of_mean(const device::ForwardLaunch& launch, const Plan& plan, bool aligned, const Where& where);

}  // namespace cuda
}  // namespace mfd
