// Forward KL of rows of one dtype: which kernel, and the launch.
#include <algorithm>

#include "cuda/distill/forward_kl.cuh"
#include "cuda/distill/forward_kl.h"
#include "cuda/runtime/resident.h"

namespace mfd {
namespace cuda {
namespace {

constexpr int kColumns = 8;

template <Dtype kDtype, bool kLabels, int kVectors>
void start_warp(device::ForwardLaunch launch, const Where& where) {
  constexpr int kThreads = 128, kRows = kThreads / 32;
  launch.states_at = 0;
  const int64_t shared = device::kScratchBytes + sizeof(device::KlTerms<kDtype, kLabels>);
  const auto kernel = device::forward_kl_warp<kDtype, kLabels, kVectors>;
  const int64_t needed = (launch.forward.problem.n_rows + kRows - 1) / kRows;
  const int64_t most = std::min(resident(kernel, where, {1, kThreads, shared}), kMaxGroups);
  start(where, {std::min(needed, most), kThreads, shared}, kernel, launch);
}

// A row may begin and end within a vector.
int64_t vectors_of(int64_t classes, bool aligned) {
  return aligned ? (classes + kColumns - 1) / kColumns : classes / kColumns + 2;
}

template <Dtype kDtype, bool kLabels>
void start_block(device::ForwardLaunch launch, const Plan& plan, int64_t vectors, const Where& where) {
  const int64_t each = (vectors + plan.cluster - 1) / plan.cluster,
                bytes = each * sizeof(device::Packed<kDtype>);
  launch.states_at = static_cast<int>(states_at<device::Cluster>());
  launch.parking_at = static_cast<int>(
      round_up(launch.states_at + device::kScratchBytes + sizeof(device::KlTerms<kDtype, kLabels>), 16));
  launch.teacher_at = static_cast<int>(bytes);
  const int64_t shared = launch.parking_at + 2 * bytes;
  const auto kernel = device::forward_kl_block<kDtype, kLabels>;
  const int64_t most = std::min(resident(kernel, where, {1, plan.threads, shared, plan.cluster}), kMaxGroups);
  const int64_t groups = std::min(launch.forward.problem.n_rows, most);
  start(where, {groups * plan.cluster, plan.threads, shared, plan.cluster}, kernel, launch);
}

template <Dtype kDtype, bool kLabels>
void start_dtype(const device::ForwardLaunch& launch, const Plan& plan, bool aligned, const Where& where) {
  const int64_t vectors = vectors_of(launch.forward.problem.classes, aligned);
  if (vectors <= 32) return start_warp<kDtype, kLabels, 1>(launch, where);
  if (vectors <= 128) return start_warp<kDtype, kLabels, 4>(launch, where);
  start_block<kDtype, kLabels>(launch, plan, vectors, where);
}

template <Dtype kDtype>
void start_labels(const device::ForwardLaunch& launch, const Plan& plan, bool aligned, const Where& where) {
  if (launch.forward.use_hard) {
    start_dtype<kDtype, true>(launch, plan, aligned, where);
  } else {
    start_dtype<kDtype, false>(launch, plan, aligned, where);
  }
}

bool is_plain(const Side& side) {
  return side.scale == 1.0 && !(side.softcap > 0) && !side.standardize;
}

bool is_one_for_all(const RowScalar& value) {
  return !value.rows || value.stride == 0;
}

// Whether every row of a side begins where 16 bytes do.
bool is_aligned(const Side& side) {
  const int64_t columns = side.dtype == Dtype::kFloat32 ? 4 : 8;
  return reinterpret_cast<uintptr_t>(side.data) % 16 == 0 && side.row_stride % columns == 0 &&
         side.outer_stride % columns == 0;
}

}  // namespace

bool takes_forward_kl(const Forward& f, const ScalarLoss* scalar, const Plan& plan) {
  const RowProblem& p = f.problem;
  return scalar && f.use_soft && p.divergence == Divergence::kForwardKL && !p.mixture && !p.is_double &&
         !p.keeps_ignored && !f.student_entropy && p.student.dtype == p.teacher.dtype &&
         plan.rung != Rung::kStream && is_plain(p.student) && is_plain(p.teacher) &&
         is_one_for_all(p.student_temperature) && is_one_for_all(p.teacher_temperature);
}

void forward_kl(const device::ForwardLaunch& launch, const Plan& plan, const Where& where) {
  const RowProblem& p = launch.forward.problem;
  const bool aligned = is_aligned(p.student) && is_aligned(p.teacher);
  switch (p.student.dtype) {
    case Dtype::kBFloat16:
      return start_labels<Dtype::kBFloat16>(launch, plan, aligned, where);
    case Dtype::kFloat16:
      return start_labels<Dtype::kFloat16>(launch, plan, aligned, where);
    default:
      return start_labels<Dtype::kFloat32>(launch, plan, aligned, where);
  }
}

}  // namespace cuda
}  // namespace mfd
