// What the parts of the Python bindings share. Tensors cross as addresses; the Python side checks, allocates
// and keeps them alive.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "common/fusion.h"

namespace mfd {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Rows of a matrix: (address, dtype, inner, outer_stride, row_stride), as backends/layout.py has it.
using Rows = std::tuple<Address, int, int64_t, int64_t, int64_t>;

inline Matrix matrix(const Rows& rows) {
  return {pointer(std::get<0>(rows)), static_cast<Dtype>(std::get<1>(rows)), std::get<2>(rows),
          std::get<3>(rows), std::get<4>(rows)};
}

// Side, Teachers, Problem, TopK, Pool and Tap.
void bind_problem(pybind11::module_& m);
// The launchers of the CUDA kernels, in the submodule "cuda".
void bind_cuda(pybind11::module_& m);
// Those of the fusion kernels, into that submodule.
void bind_cuda_fusion(pybind11::module_& m);
void bind_cuda_mfd(pybind11::module_& m);

}  // namespace mfd
