// Several teachers as the kernels take them.
#pragma once

#include "cuda/distill/ladder.h"
#include "cuda/distill/mixture.cuh"

namespace mfd {
namespace cuda {

// `p` as the kernels take it, the mixture in place of its first teacher; and its teachers.
inline RowProblem mixed_problem(const RowProblem& p, device::DeviceMixture& teachers) {
  const Mixture& m = *p.mixture;
  if (m.count > kMaxTeachers) throw std::invalid_argument("mfd_fast: too many teachers");
  for (int64_t k = 0; k < m.count; ++k) teachers.sides[k] = m.teachers[k];
  teachers.count = static_cast<int>(m.count);
  teachers.weights = m.weights;
  teachers.row_stride = m.row_stride;
  teachers.temperature = p.teacher_temperature;
  RowProblem mixed = p;
  mixed.teacher = {nullptr, p.is_double ? Dtype::kFloat64 : Dtype::kFloat32, 1, 0, 0, p.classes, 1.0, 0.0,
                   false};
  mixed.teacher_temperature = {nullptr, 0, 1.0};
  mixed.mixture = nullptr;
  return mixed;
}

inline int64_t states_bytes(const RowProblem& p, int groups) {
  return round_up(groups * p.mixture->count * static_cast<int64_t>(sizeof(device::TeacherState)), 16);
}

// A row of the mixture, in whole vectors.
inline int64_t row_bytes(const RowProblem& p) {
  return round_up(p.classes, 8) * (p.is_double ? 8 : 4);
}

// Bytes of device memory for the rows of a backward launch.
int64_t backward_scratch(const RowProblem& p, const DeviceFacts& facts);

}  // namespace cuda
}  // namespace mfd
