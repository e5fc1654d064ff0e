// A bound that launchers and kernels share.
#pragma once

namespace mfd {

// Teachers of one mixture, at most: kernels take them by value.
constexpr int kMaxTeachers = 32;

}  // namespace mfd
