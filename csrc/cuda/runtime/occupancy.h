// How much of a kernel runs at a time, kept: asking the device takes microseconds.
#pragma once

#include <cstdint>

namespace mfd {
namespace cuda {

struct Occupancy {
  const void* kernel;
  int device, threads, cluster;
  int64_t shared_bytes, resident;
};
// `resident` of what was kept; 0 for nothing.
int64_t find_occupancy(const Occupancy& wanted);
void keep_occupancy(const Occupancy& found);
// For the tests, whose device changes.
void forget_occupancies();

}  // namespace cuda
}  // namespace mfd
