// The launch of a lean kernel: its place in shared memory, and the grid.
#pragma once

#include <algorithm>

#include "cuda/distill/ladder.h"
#include "cuda/distill/lean.cuh"
#include "cuda/runtime/resident.h"

namespace mfd {
namespace cuda {

// Of scratch, terms and the states of `groups` groups of threads.
template <Dtype kDtype, Divergence kDivergence, bool kLabels>
constexpr int64_t bytes_before_rows(int groups) {
  typedef device::LeanTerms<kDtype, kLabels> Terms;
  if (!decouples_target(kDivergence)) return device::kScratchBytes + sizeof(Terms);
  return device::target_states_at<Terms>() + groups * static_cast<int64_t>(sizeof(device::TargetState));
}

template <Dtype kDtype, Divergence kDivergence, bool kLabels, int kVectors>
void start_warp(device::ForwardLaunch launch, const Where& where) {
  constexpr int kThreads = 128, kRows = kThreads / 32;
  launch.states_at = 0;
  const int64_t shared = bytes_before_rows<kDtype, kDivergence, kLabels>(kRows);
  const auto kernel = device::lean_warp<kDtype, kDivergence, kLabels, kVectors>;
  const int64_t needed = (launch.forward.problem.n_rows + kRows - 1) / kRows;
  const int64_t most = std::min(resident(kernel, where, {1, kThreads, shared}), kMaxGroups);
  start(where, {std::min(needed, most), kThreads, shared}, kernel, launch);
}

// A row may begin and end within a vector.
inline int64_t vectors_of(int64_t classes, bool aligned) {
  return aligned ? (classes + 7) / 8 : classes / 8 + 2;
}

template <Dtype kDtype, Divergence kDivergence, bool kLabels>
void start_block(device::ForwardLaunch launch, const Plan& plan, int64_t vectors, const Where& where) {
  const int64_t each = (vectors + plan.cluster - 1) / plan.cluster,
                bytes = each * sizeof(device::Packed<kDtype>);
  launch.states_at = static_cast<int>(states_at<device::Cluster>());
  launch.parking_at =
      static_cast<int>(round_up(launch.states_at + bytes_before_rows<kDtype, kDivergence, kLabels>(1), 16));
  launch.teacher_at = static_cast<int>(bytes);
  static_assert(bytes_before_rows<kDtype, kDivergence, kLabels>(1) + 16 +
                        4 * static_cast<int64_t>(sizeof(device::Packed<kDtype>)) <=
                    kLeanBytes,
                "a plan has no room for this kernel");
  const int64_t shared = launch.parking_at + 2 * bytes;
  const auto kernel = device::lean_block<kDtype, kDivergence, kLabels>;
  const int64_t most = std::min(resident(kernel, where, {1, plan.threads, shared, plan.cluster}), kMaxGroups);
  const int64_t groups = std::min(launch.forward.problem.n_rows, most);
  start(where, {groups * plan.cluster, plan.threads, shared, plan.cluster}, kernel, launch);
}

template <Dtype kDtype, Divergence kDivergence, bool kLabels>
void start_lean(const device::ForwardLaunch& launch, const Plan& plan, bool aligned, const Where& where) {
  const int64_t vectors = vectors_of(launch.forward.problem.classes, aligned);
  // Short rows of few registers: of the divergence that most calls have.
  if constexpr (kDivergence == Divergence::kForwardKL) {
    if (vectors <= 32) return start_warp<kDtype, kDivergence, kLabels, 1>(launch, where);
  }
  if (vectors <= 128) return start_warp<kDtype, kDivergence, kLabels, 4>(launch, where);
  start_block<kDtype, kDivergence, kLabels>(launch, plan, vectors, where);
}

template <Dtype kDtype, Divergence kDivergence>
void start_lean(const device::ForwardLaunch& launch, const Plan& plan, bool aligned, const Where& where) {
  if (launch.forward.use_hard) {
    start_lean<kDtype, kDivergence, true>(launch, plan, aligned, where);
  } else {
    start_lean<kDtype, kDivergence, false>(launch, plan, aligned, where);
  }
}

// Of the dtypes whose gradients are taken with the loss; only the forward KL has kernels for float16, whose
// gradients wait for the loss scale.
template <Divergence kDivergence>
void start_lean(const device::ForwardLaunch& launch, const Plan& plan, bool aligned, const Where& where) {
  const Dtype dtype = launch.forward.problem.student.dtype;
  if (dtype == Dtype::kBFloat16)
    return start_lean<Dtype::kBFloat16, kDivergence>(launch, plan, aligned, where);
  if constexpr (kDivergence == Divergence::kForwardKL) {
    if (dtype == Dtype::kFloat16)
      return start_lean<Dtype::kFloat16, kDivergence>(launch, plan, aligned, where);
  }
  if constexpr (!device::is_in_bits(kDivergence))
    start_lean<Dtype::kFloat32, kDivergence>(launch, plan, aligned, where);
}

}  // namespace cuda
}  // namespace mfd
