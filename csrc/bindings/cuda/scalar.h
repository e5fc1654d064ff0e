// How scalars cross from Python to the launchers.
#pragma once

#include <tuple>

#include "bindings/bindings.h"
#include "cuda/rows/scalar.cuh"

namespace mfd {

// (address in device memory or 0, value where that is 0)
using ScalarFields = std::tuple<Address, double>;

inline Scalar scalar_of(const ScalarFields& fields) {
  return {pointer(std::get<0>(fields)), std::get<1>(fields)};
}

}  // namespace mfd
