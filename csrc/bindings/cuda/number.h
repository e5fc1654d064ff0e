// A number of a call, or where it lies.
#pragma once

#include <tuple>

#include "bindings/bindings.h"

namespace mfd {

// (address in device memory or 0, value where that is 0)
using Number = std::tuple<Address, double>;

}  // namespace mfd
