// Logarithms of softened probabilities from logits.
#pragma once

#include "cpu/simd/vec.h"

namespace mfd::MFD_ISA {
namespace {

// (x - max)/T - lse for a block: a factor and two offsets, so that x - block max is exact.
struct LogScale {
  double block_max, inverse, shift;
  LogScale(double block, double row_max, double temperature, double lse)
      : block_max(block), inverse(1.0 / temperature), shift((block - row_max) / temperature - lse) {}
};

// log q or log p of a vector of logits.
template <class S>
struct LogOf {
  typedef typename S::V V;
  V max, inverse, shift;
  explicit LogOf(const LogScale& scale)
      : max(S::splat(static_cast<typename S::T>(scale.block_max))),
        inverse(S::splat(static_cast<typename S::T>(scale.inverse))),
        shift(S::splat(static_cast<typename S::T>(scale.shift))) {}
  __attribute__((always_inline)) inline V operator()(V x) const { return S::fused(x - max, inverse, shift); }
};

}  // namespace
}  // namespace mfd::MFD_ISA
