// What the parts of the Python bindings share. Tensors cross as addresses; the Python side checks, allocates
// and keeps them alive.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "common/problems/fusion.h"

namespace mfd {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Rows of a matrix: (address, dtype, inner, outer_stride, row_stride), as backends/layout.py has it.
using MatrixFields = std::tuple<Address, int, int64_t, int64_t, int64_t>;

inline RowMatrix matrix(const MatrixFields& rows) {
  return {pointer(std::get<0>(rows)), static_cast<Dtype>(std::get<1>(rows)), std::get<2>(rows),
          std::get<3>(rows), std::get<4>(rows)};
}

// A number at an address of the compute dtype.
inline void put_value(Address out, bool is_double, double value) {
  if (is_double) {
    *pointer<double>(out) = value;
  } else {
    *pointer<float>(out) = static_cast<float>(value);
  }
}

// What a forward pass per row writes, 0 where it is not wanted. The CPU has both entropies and the agreement
// or none.
inline Forward per_row_forward(const RowProblem& problem, Address soft, Address hard, Address stats,
                               Address student_entropy, Address teacher_entropy, Address student_label_prob,
                               Address teacher_label_prob, Address agreement) {
  Forward f{};
  f.problem = problem;
  f.use_soft = true;
  f.use_hard = problem.labels != nullptr;
  f.weight = {nullptr, 0, 1.0};
  f.soft = pointer(soft);
  f.hard = pointer(hard);
  f.stats = pointer(stats);
  f.student_entropy = pointer(student_entropy);
  f.teacher_entropy = pointer(teacher_entropy);
  f.student_label_prob = pointer(student_label_prob);
  f.teacher_label_prob = pointer(teacher_label_prob);
  f.agreement = pointer<unsigned char>(agreement);
  return f;
}

// The backward pass of rows with a sparse teacher, whose values' gradient is that of the one teacher.
inline TopKPass topk_backward(const Backward& g, const TopK& teacher) {
  TopKPass pass{};
  pass.forward.problem = g.problem;
  pass.forward.use_soft = true;
  pass.forward.use_hard = g.problem.labels != nullptr;
  pass.forward.weight = {nullptr, 0, 1.0};
  pass.forward.soft_factor = pass.forward.hard_factor = 1.0;
  pass.forward.grad = g.d_student;
  pass.forward.stream = g.stream;
  pass.teacher = teacher;
  pass.grad_soft = g.grad_soft;
  pass.grad_hard = g.grad_hard;
  pass.d_values = g.d_teacher;
  pass.d_temperature = g.d_temperature;
  pass.d_teacher_temperature = g.d_teacher_temperature;
  return pass;
}

// Where a pool's backward writes what its parameters get.
inline void set_gradients(PoolBackward& g, const std::vector<Address>& d_features, int64_t d_row_stride,
                          bool stream, Address d_query, Address d_bias) {
  for (size_t m = 0; m < d_features.size(); ++m) g.d_features[m] = pointer(d_features[m]);
  g.d_row_stride = d_row_stride;
  g.stream = stream;
  g.d_query = pointer(d_query);
  g.d_bias = pointer(d_bias);
}

// The classes that describe problems, to kernels of all backends.
void bind_problems(pybind11::module_& m);
// The launchers of the CUDA kernels, in the submodule "cuda".
void bind_cuda(pybind11::module_& m);
// Those of the fusion kernels, into that submodule.
void bind_cuda_fusion(pybind11::module_& m);
void bind_cuda_mfd(pybind11::module_& m);
void bind_cuda_plans(pybind11::module_& m);

}  // namespace mfd
