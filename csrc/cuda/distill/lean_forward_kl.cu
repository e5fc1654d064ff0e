// Lean kernels of the forward KL; which calls the lean kernels take.
#include "cuda/distill/lean_launch.h"

namespace mfd {
namespace cuda {
namespace {

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

// As start_lean has them.
bool has_lean_kernel(Divergence divergence, Dtype dtype) {
  if (divergence == Divergence::kForwardKL) return true;
  if (device::is_in_bits(divergence)) return dtype == Dtype::kBFloat16;
  return dtype != Dtype::kFloat16 && (divergence == Divergence::kReverseKL ||
                                      divergence == Divergence::kTVD || decouples_target(divergence));
}

}  // namespace

bool takes_lean(const Forward& f, const ScalarLoss* scalar, const Plan& plan) {
  const RowProblem& p = f.problem;
  return scalar && f.use_soft && has_lean_kernel(p.divergence, p.student.dtype) && !p.keeps_ignored &&
         !f.student_entropy && !p.mixture && !p.is_double && p.student.dtype == p.teacher.dtype &&
         plan.rung != Rung::kStream && is_plain(p.student) && is_plain(p.teacher) &&
         is_one_for_all(p.student_temperature) && is_one_for_all(p.teacher_temperature) &&
         (!decouples_target(p.divergence) || p.classes > 2);  // two others at least
}

void lean_forward_kl(const device::ForwardLaunch& launch, const Plan& plan, bool aligned,
                     const Where& where) {
  start_lean<Divergence::kForwardKL>(launch, plan, aligned, where);
}

void lean_forward(const device::ForwardLaunch& launch, const Plan& plan, const Where& where) {
  const RowProblem& p = launch.forward.problem;
  const bool aligned = is_aligned(p.student) && is_aligned(p.teacher);
  switch (p.divergence) {
    case Divergence::kForwardKL:
      return lean_forward_kl(launch, plan, aligned, where);
    case Divergence::kReverseKL:
    case Divergence::kTVD:
      return lean_pointwise(launch, plan, aligned, where);
    case Divergence::kDKD:
    case Divergence::kNKD:
      return lean_target(launch, plan, aligned, where);
    default:
      return lean_of_mean(launch, plan, aligned, where);
  }
}

}  // namespace cuda
}  // namespace mfd
