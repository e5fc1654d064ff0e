// exp(t/T) for t <= 0, the logarithm of a softened probability, and tanh.
//
// exp(t/T) = 2^z, z = t*c, c = log2(e)/T = c_hi + c_lo; k = round(z), f = z - k in [-1/2, 1/2];
// 2^f by polynomial, 2^k through the exponent bits. Exactly 0 where the result would
// be below 2^-126 (so -inf gives 0), NaN where t is NaN.
#pragma once

#include "common/vector/exponent.h"
#include "cpu/simd/vec.h"

namespace mfd::MFD_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634074;

template <class S>
struct Exponent;

template <>
struct Exponent<F32> {
  typedef F32::V V;
  V c_hi, c_lo, floor;  // floor: the t of 2^-126

  explicit Exponent(double temperature) {
    const double c = kLog2E / temperature;
    const float hi = static_cast<float>(c);
    c_hi = F32::splat(hi);
    c_lo = F32::splat(static_cast<float>(c - static_cast<double>(hi)));
    floor = F32::splat(static_cast<float>(-125.999 / c));
  }

  __attribute__((always_inline)) inline V operator()(V t) const {
#if MFD_AVX512 || MFD_AVX2
    // 1.5*2^23 makes the addition round to an integer; + 127 leaves the biased exponent in the low bits.
    const V magic = F32::splat(12582912.0f + 127.0f);
    const V shifted = F32::fma(t, c_hi, magic);
    const V k = shifted - magic;
    const V f = F32::fma(t, c_lo, F32::fma(t, c_hi, -k));
    const V scale = (V)((VecI)shifted << 23);
#else
    V f, scale;
    reduce(t, &f, &scale);
#endif
    // Bits below the floor are meaningless and cut; a NaN is not below it and stays.
    return F32::select(vanishes(t), V{}, exp2_polynomial<F32>(f) * scale);
  }

  // Where exp(t/T) counts as 0.
  __attribute__((always_inline)) inline VecI vanishes(V t) const { return t < floor; }

  // Without a fused multiply-add, t*c is reduced in double precision.
  MFD_INLINE void reduce_lanes(const float* t, double c, float* f, float* scale) {
    for (int i = 0; i < kLanes; ++i) {
      const double magic = 6755399441055744.0 + 127.0;  // 1.5*2^52, and the exponent bias
      const double z = static_cast<double>(t[i]) * c;
      const double shifted = z + magic;
      int64_t bits;
      __builtin_memcpy(&bits, &shifted, 8);
      const uint32_t exponent = static_cast<uint32_t>(bits) << 23;
      f[i] = static_cast<float>(z - (shifted - magic));
      __builtin_memcpy(&scale[i], &exponent, 4);
    }
  }
  __attribute__((always_inline)) inline void reduce(V t, V* f, V* scale) const {
    float lanes[kLanes], f_lanes[kLanes], scale_lanes[kLanes];
    F32::store(lanes, t);
    const double c = static_cast<double>(c_hi[0]) + static_cast<double>(c_lo[0]);
    reduce_lanes(lanes, c, f_lanes, scale_lanes);
    *f = F32::load(f_lanes);
    *scale = F32::load(scale_lanes);
  }
};

template <>
struct Exponent<F64> {
  double temperature, floor;
  explicit Exponent(double t) : temperature(t), floor(-708.0 * t) {}
  inline double operator()(double t) const { return vanishes(t) ? 0.0 : ::exp(t / temperature); }
  inline bool vanishes(double t) const { return t < floor; }
};

// e^n for n = 1..4 from e: exp(t/T) to the power T is exp(t).
template <class S, int N>
MFD_INLINE typename S::V power(typename S::V e) {
  if (N == 1) return e;
  const typename S::V square = e * e;
  return N == 2 ? square : N == 3 ? square * e : square * square;
}

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

// tanh: an odd polynomial (Cephes tanhf) below 0.625, else 1 - 2/(exp(2|x|) + 1).
F32::V F32::tanh_of(V x) {
  const V magnitude = x < 0.0f ? -x : x, square = x * x;
  V p = F32::splat(-5.70498872745e-3f);
  p = F32::fma(p, square, F32::splat(2.06390887954e-2f));
  p = F32::fma(p, square, F32::splat(-5.37397155531e-2f));
  p = F32::fma(p, square, F32::splat(1.33314422036e-1f));
  p = F32::fma(p, square, F32::splat(-3.33332819422e-1f));
  const V small = F32::fma(p * square, x, x);
  const V e = Exponent<F32>(0.5)(-magnitude);  // exp(-2|x|)
  const V large = (1.0f - e) / (1.0f + e);
  return magnitude < 0.625f ? small : (x < 0.0f ? -large : large);
}

}  // namespace
}  // namespace mfd::MFD_ISA
