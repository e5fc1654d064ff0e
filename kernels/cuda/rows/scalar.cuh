// A scalar argument of a launch.
#pragma once

namespace mfd {

// In device memory, of the compute dtype, or by value.
struct Scalar {
  const void* address;  // null: `value`
  double value;
};

}  // namespace mfd
