// exp, expm1 and log of the pointwise divergences.
#pragma once

#include "cpu/simd/exp.h"
#include "cpu/simd/vec.h"

namespace mfd::MFD_ISA {
namespace {

// The powers of two of exp(z) and expm1(z) = 2^k e^g - 1, g = z - k*log 2 in [-log(2)/2, log(2)/2].
struct PowerOfTwo {
  F32::V scale;  // 2^k
  F32::V minus;  // e^g - 1
};

// k = round(z*log2(e)), f = z*log2(e) - k, 2^f - 1 = f*P(f) with relative error 1.1e-8 before rounding.
// Meaningless outside [kExpLow, kExpHigh], which the callers cut; NaN stays.
constexpr float kExpLow = -87.0f, kExpHigh = 88.0f;
MFD_INLINE PowerOfTwo power_of_two(F32::V z) {
  typedef F32::V V;
  const V magic = F32::splat(12582912.0f + 127.0f);
  const V c_hi = F32::splat(1.44269502f);
  const V shifted = F32::fma(z, c_hi, magic);
  const V k = shifted - magic;
#if MFD_AVX512 || MFD_AVX2
  const V f = F32::fma(z, F32::splat(1.92596303e-8f), F32::fma(z, c_hi, -k));
#else
  // Without a fused multiply-add: log 2 in two parts, of which k times the first is exact (Cody, Waite).
  const V f = ((z - k * 0.693359375f) + k * 2.12194440e-4f) * c_hi;
#endif
  constexpr float kPolynomial[] = {1.540351235e-4f, 1.339073548e-3f, 9.618237495e-3f,
                                   5.550357434e-2f, 2.402264979e-1f, 6.931471879e-1f};
  V p = F32::splat(kPolynomial[0]);
  for (int i = 1; i < 6; ++i) p = F32::fma(p, f, F32::splat(kPolynomial[i]));
  return {(V)((VecI)shifted << 23), f * p};
}

F32::V F32::exp_of(V z) {
  const PowerOfTwo e = power_of_two(z);
  const F32::V value = F32::fma(e.scale, e.minus, e.scale);
  return F32::select(z < kExpLow, F32::V{}, F32::select(z > kExpHigh, F32::splat(__builtin_inff()), value));
}
F32::V F32::expm1_of(V z) {
  const PowerOfTwo e = power_of_two(z);
  const F32::V value = F32::fma(e.scale, e.minus, e.scale - 1.0f);
  return F32::select(z < kExpLow, F32::splat(-1.0f),
                     F32::select(z > kExpHigh, F32::splat(__builtin_inff()), value));
}
// Half as many double lanes: one register again.
constexpr int kDoubleLanes = MFD_LANES / 2;
typedef double VecD __attribute__((vector_size(4 * MFD_LANES)));
typedef int64_t VecL __attribute__((vector_size(4 * MFD_LANES)));
typedef float VecHalf __attribute__((vector_size(2 * MFD_LANES)));

// a*b + c, in one rounding where the hardware can.
MFD_INLINE VecD wide_fma(VecD a, VecD b, VecD c) {
#if MFD_AVX512
  return (VecD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif MFD_AVX2
  return (VecD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// exp(x) in double precision, -700 <= x <= 700: k = round(x/log 2), exp(x) = 2^k exp(g), |g| <= log(2)/2, by
// its Taylor series, whose remainder is below 4e-18.
MFD_INLINE VecD wide_exp(VecD x) {
  constexpr double kMagic = 6755399441055744.0 + 1023.0;  // 1.5*2^52, and the exponent bias
  constexpr double kLog2High = 0x1.62e42feep-1, kLog2Low = 0x1.a39ef35793c76p-33;
  constexpr double kInverseFactorials[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       1.0 / 2,      1.0,         1.0};
  const VecD shifted = x * kLog2E + kMagic, k = shifted - kMagic;
  const VecD g = wide_fma(k, VecD{} - kLog2Low, wide_fma(k, VecD{} - kLog2High, x));
  VecD series = VecD{} + kInverseFactorials[0];
  for (int i = 1; i < 14; ++i) series = wide_fma(series, g, VecD{} + kInverseFactorials[i]);
  return series * (VecD)((VecL)shifted << 52);
}

// sum exp(z) in double precision, z <= 700; -inf adds exp(-700), far below any double's rounding of 1.
static double wide_exponential_sum(const float* z, int64_t n) {
  VecD low{}, high{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    const F32::V least = F32::splat(-700.0f);
    const F32::V x = F32::max(least, load_or_pad<F32>(z + i, left, -700.0f));
    VecHalf half[2];
    __builtin_memcpy(half, &x, sizeof(x));
    low = low + wide_exp(__builtin_convertvector(half[0], VecD));
    high = high + wide_exp(__builtin_convertvector(half[1], VecD));
  }
  low = low + high;
  double total = 0;
  for (int lane = 0; lane < kDoubleLanes; ++lane) total += low[lane];
  return total;
}
static double wide_exponential_sum(const double* z, int64_t n) {
  double total = 0;
  for (int64_t k = 0; k < n; ++k) total += ::exp(z[k]);
  return total;
}

// expm1(z) for z <= 0.
F32::V F32::expm1_below(V z) {
  const PowerOfTwo e = power_of_two(F32::max(F32::splat(kExpLow), z));
  return F32::fma(e.scale, e.minus, e.scale - 1.0f);
}
// k*log 2 + log(1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1), log(1 + f) = f - f^2/2 + f^3 P(f) with relative
// error 3.2e-8 before rounding.
MFD_INLINE F32::V log_of_parts(VecI k, F32::V f) {
  typedef F32::V V;
  constexpr float kPolynomial[] = {8.700430572e-02f, -1.426748622e-01f, 1.491476922e-01f, -1.657758477e-01f,
                                   1.996306370e-01f, -2.500133704e-01f, 3.333391074e-01f};
  V p = F32::splat(kPolynomial[0]);
  for (int i = 1; i < 7; ++i) p = F32::fma(p, f, F32::splat(kPolynomial[i]));
  p = F32::fma(f * f, F32::fma(p, f, F32::splat(-0.5f)), f);
  return F32::fma(__builtin_convertvector(k, V), F32::splat(0.69314718f), p);
}

constexpr int32_t kSqrtHalf = 0x3f3504f3;

// log x for normal x > 0: x = 2^k m, m in [sqrt(1/2), sqrt(2)). Finite at 0.
F32::V F32::log_of(V x) {
  const VecI k = ((VecI)x - kSqrtHalf) >> 23;
  return log_of_parts(k, (F32::V)((VecI)x - (k << 23)) - 1.0f);
}

// log(1 + x) for x >= 0; f is x itself where k is 0, so that a small x keeps its digits.
F32::V F32::log1p_above(V x) {
  const F32::V y = 1.0f + x;
  const VecI k = ((VecI)y - kSqrtHalf) >> 23;
  return log_of_parts(k, F32::select(k == 0, x, (F32::V)((VecI)y - (k << 23)) - 1.0f));
}

}  // namespace
}  // namespace mfd::MFD_ISA
