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
// Plans of calls, before the ops.
void bind_plans(pybind11::module_& m);
// The CPU's ops.
void bind_distill_loss(pybind11::module_& m);
void bind_modal_pool(pybind11::module_& m);
void bind_feature_loss(pybind11::module_& m);
void bind_mfd_loss(pybind11::module_& m);
void bind_product(pybind11::module_& m);
void bind_gradient_buffers(pybind11::module_& m);
// The launchers of the CUDA kernels, in the submodule "cuda".
void bind_cuda(pybind11::module_& m);
// Those of the fusion kernels, into that submodule.
void bind_cuda_fusion(pybind11::module_& m);
void bind_cuda_mfd(pybind11::module_& m);

}  // namespace mfd
