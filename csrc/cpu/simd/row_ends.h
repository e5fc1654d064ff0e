// Rows whose length is no multiple of a vector's.
#pragma once

#include "cpu/simd/vec.h"

namespace mfd::MFD_ISA {
namespace {

// Vectors of which `left` >= 1 elements exist; the others are 0.
template <class S, class E>
MFD_INLINE typename S::V load_upto(const E* p, int64_t left) {
  return left >= S::kWidth ? S::load(p) : S::load_first(p, left, typename S::T(0));
}

template <class S, class E>
MFD_INLINE void store_upto(E* p, typename S::V v, int64_t left) {
  left >= S::kWidth ? S::store(p, v) : S::store_first(p, v, left);
}

// step(i, left) for the vectors of a row of n elements: `left` is a constant but in the last one.
template <class S, class Step>
MFD_INLINE void over_vectors(int64_t n, const Step& step) {
  int64_t i = 0;
  for (; i + S::kWidth <= n; i += S::kWidth) step(i, S::kWidth);
  if (i < n) step(i, n - i);
}
#define MFD_STEP [&](int64_t i, int64_t left) __attribute__((always_inline))

}  // namespace
}  // namespace mfd::MFD_ISA
