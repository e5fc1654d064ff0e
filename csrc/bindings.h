// What the parts of the Python bindings share. Tensors cross as addresses; the Python side checks, allocates
// and keeps them alive.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "common/types.h"

namespace mfd {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Side, Teachers, Problem and TopK.
void bind_problem(pybind11::module_& m);
// The launchers of the CUDA kernels, in the submodule "cuda".
void bind_cuda(pybind11::module_& m);

}  // namespace mfd
