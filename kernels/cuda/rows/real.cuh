// float32 and float64 arithmetic of one thread under the names that common/vector/divergences.h asks of a
// vector type, and the exponential of the softmax.
#pragma once

#include <math.h>

#include "common/rows/row_math.h"
#include "common/vector/divergences.h"
#include "common/vector/exponent.h"
#include "cuda/rows/device.cuh"

namespace mfd {
namespace device {

// Finite at 0.
MFD_INLINE float log_of(float x) {
  return logf(fmaxf(x, 1.175494351e-38f));
}
MFD_INLINE double log_of(double x) {
  return log(fmax(x, 2.2250738585072014e-308));
}
MFD_INLINE float exp_of(float x) {
  return expf(x);
}
MFD_INLINE double exp_of(double x) {
  return exp(x);
}
MFD_INLINE float expm1_of(float x) {
  return expm1f(x);
}
MFD_INLINE double expm1_of(double x) {
  return expm1(x);
}
// expm1(x) for x <= 0.
MFD_INLINE float expm1_below(float x) {
  return expm1f(x);
}
MFD_INLINE double expm1_below(double x) {
  return expm1(x);
}
// log(1 + x) for x >= 0.
MFD_INLINE float log1p_above(float x) {
  return log1pf(x);
}
MFD_INLINE double log1p_above(double x) {
  return log1p(x);
}
MFD_INLINE float tanh_of(float x) {
  return tanhf(x);
}
MFD_INLINE double tanh_of(double x) {
  return tanh(x);
}

struct F32 {
  typedef float T;
  typedef float V;
  static constexpr float kLowest = -3.402823466e38f;
  static constexpr float kLeast = 1.175494351e-38f;
  MFD_INLINE V splat(T v) { return v; }
  MFD_INLINE V select(bool mask, V a, V b) { return mask ? a : b; }
  MFD_INLINE V max(V a, V b) { return fmaxf(a, b); }
  MFD_INLINE V min(V a, V b) { return fminf(a, b); }
  MFD_INLINE V fma(V a, V b, V c) { return fmaf(a, b, c); }
  MFD_INLINE V exp_of(V x) { return device::exp_of(x); }
  MFD_INLINE V expm1_of(V x) { return device::expm1_of(x); }
  MFD_INLINE V expm1_below(V x) { return device::expm1_below(x); }
  MFD_INLINE V log1p_above(V x) { return device::log1p_above(x); }
  MFD_INLINE V log_of(V x) { return device::log_of(x); }
  MFD_INLINE V tanh_of(V x) { return device::tanh_of(x); }
};

struct F64 {
  typedef double T;
  typedef double V;
  static constexpr double kLowest = -1.7976931348623157e308;
  static constexpr double kLeast = 2.2250738585072014e-308;
  MFD_INLINE V splat(T v) { return v; }
  MFD_INLINE V select(bool mask, V a, V b) { return mask ? a : b; }
  MFD_INLINE V max(V a, V b) { return fmax(a, b); }
  MFD_INLINE V min(V a, V b) { return fmin(a, b); }
  MFD_INLINE V fma(V a, V b, V c) { return ::fma(a, b, c); }
  MFD_INLINE V exp_of(V x) { return device::exp_of(x); }
  MFD_INLINE V expm1_of(V x) { return device::expm1_of(x); }
  MFD_INLINE V expm1_below(V x) { return device::expm1_below(x); }
  MFD_INLINE V log1p_above(V x) { return device::log1p_above(x); }
  MFD_INLINE V log_of(V x) { return device::log_of(x); }
  MFD_INLINE V tanh_of(V x) { return device::tanh_of(x); }
};

// exp(t/T) for t <= 0: exactly 0 where the result would be below 2^-126 (so -inf gives 0), NaN where t is
// NaN.
template <class S>
struct Exponent;

// 2^z, z = t*c, c = log2(e)/T = c_hi + c_lo. With `fast`, for logits of 16 bits, the hardware's 2^z; else k =
// round(z), 2^(z - k) by polynomial, 2^k through the exponent bits.
template <>
struct Exponent<F32> {
  float c_hi, c_lo, floor;  // floor: the t of 2^-126
  bool fast;

  MFD_DEVICE Exponent(double temperature, bool fast_) : fast(fast_) {
    const double c = 1.4426950408889634074 / temperature;
    c_hi = static_cast<float>(c);
    c_lo = static_cast<float>(c - static_cast<double>(c_hi));
    floor = static_cast<float>(-125.999 / c);
  }
  MFD_DEVICE float operator()(float t) const { return fast ? of<true>(t) : of<false>(t); }
  template <bool kFast>
  MFD_DEVICE float of(float t) const {
    if constexpr (kFast) return vanishes(t) ? 0.0f : exp2_fast(t * c_hi);
    const float magic = 12582912.0f + 127.0f;
    const float shifted = fmaf(t, c_hi, magic);
    const float k = shifted - magic;
    const float f = fmaf(t, c_lo, fmaf(t, c_hi, -k));
    const float power = exp2_polynomial<F32>(f) * bits_as<float>(bits_as<uint32_t>(shifted) << 23);
    return vanishes(t) ? 0.0f : power;
  }
  MFD_DEVICE bool vanishes(float t) const { return t < floor; }
};

template <>
struct Exponent<F64> {
  double temperature, floor;
  MFD_DEVICE Exponent(double t, bool) : temperature(t), floor(-708.0 * t) {}
  MFD_DEVICE double operator()(double t) const { return vanishes(t) ? 0.0 : exp(t / temperature); }
  MFD_DEVICE bool vanishes(double t) const { return t < floor; }
};

}  // namespace device
}  // namespace mfd
