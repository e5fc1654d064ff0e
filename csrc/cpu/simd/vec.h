// The small vector type the kernels are written against: kLanes floats, through compiler vector extensions,
// with specialised functions where an instruction set has one and a portable twin where it has not.
#pragma once

#include <math.h>
#include <stdint.h>

#include "common/annotations.h"

// Which instruction set a translation unit is compiled for: MFD_ISA, its namespace, and MFD_LANES, the floats
// of a vector. Kernels live in an unnamed namespace inside mfd::MFD_ISA: the linker must never merge code of
// two instruction sets.
#if !defined(MFD_ISA)
#define MFD_ISA isa_baseline
#define MFD_ISA_NAME "baseline"
#define MFD_LANES 4
#endif

#if defined(__AVX512F__)
#define MFD_AVX512 (MFD_LANES == 16)
#define MFD_AVX2 0
#elif defined(__AVX2__)
#define MFD_AVX512 0
#define MFD_AVX2 (MFD_LANES == 8)
#else
#define MFD_AVX512 0
#define MFD_AVX2 0
#endif

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#pragma clang fp contract(off)
#endif

namespace mfd::MFD_ISA {
namespace {

constexpr int kLanes = MFD_LANES;

typedef float VecF __attribute__((vector_size(4 * MFD_LANES)));
typedef int32_t VecI __attribute__((vector_size(4 * MFD_LANES)));
typedef uint32_t VecU __attribute__((vector_size(4 * MFD_LANES)));
typedef uint16_t VecH __attribute__((vector_size(2 * MFD_LANES)));

#if MFD_AVX512
// The unmasked intrinsics of gcc 12 read an undefined register as far as its own warnings can see (PR105593).
constexpr __mmask16 kAllLanes = 0xffff;
#endif

// fp16 <-> fp32 for one value, in integer arithmetic.
MFD_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {
    bits = 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  } else if (magnitude >= 0x400u) {
    bits = (magnitude << 13) + 0x38000000u;
  } else {
    const float small = static_cast<float>(magnitude) * 0x1p-24f;
    __builtin_memcpy(&bits, &small, 4);
  }
  bits |= sign;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

MFD_INLINE uint16_t float_to_half(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // >= 65520 rounds to infinity
  if (bits < 0x38800000u) {                                               // below 2^-14: a multiple of 2^-24
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    // Adding 2^23 ulps of 2^-24 rounds to nearest even.
    magnitude += 0.5f;
    __builtin_memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13));
}

MFD_INLINE float bfloat_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

MFD_INLINE uint16_t float_to_bfloat(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Elements of 16 bits as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// kLanes float32 values.
struct F32 {
  typedef float T;
  typedef VecF V;
  static constexpr int kWidth = kLanes;
  static constexpr float kLowest = -__FLT_MAX__;
  static constexpr float kLeast = __FLT_MIN__;

  MFD_INLINE V splat(T v) { return v - V{}; }  // v - 0 keeps -0
  MFD_INLINE V load(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(V));
    return v;
  }
  MFD_INLINE void store(T* p, V v) { __builtin_memcpy(p, &v, sizeof(V)); }
  MFD_INLINE V select(VecI mask, V a, V b) { return mask ? a : b; }

  // The first n lanes; the others are `fill`.
  MFD_INLINE V load_first(const T* p, int64_t n, T fill) {
#if MFD_AVX512
    return (V)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << n) - 1u), p);
#elif MFD_AVX2
    const __m256i mask = lane_mask(n);
    return (V)_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mask), (__m256)mask);
#else
    V v = splat(fill);
    __builtin_memcpy(&v, p, static_cast<size_t>(n) * sizeof(T));
    return v;
#endif
  }
  MFD_INLINE void store_first(T* p, V v, int64_t n) {
#if MFD_AVX512
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), (__m512)v);
#elif MFD_AVX2
    _mm256_maskstore_ps(p, lane_mask(n), (__m256)v);
#else
    __builtin_memcpy(p, &v, static_cast<size_t>(n) * sizeof(T));
#endif
  }
#if MFD_AVX2
  MFD_INLINE __m256i lane_mask(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
#endif
  // Past the caches; p is aligned to the vector.
  MFD_INLINE void stream(T* p, V v) {
#if MFD_AVX512
    _mm512_stream_ps(p, (__m512)v);
#elif MFD_AVX2
    _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE2__)
    for (int i = 0; i < kLanes; i += 4) {
      __m128 part;
      __builtin_memcpy(&part, reinterpret_cast<const char*>(&v) + 4 * i, 16);
      _mm_stream_ps(p + i, part);
    }
#else
    store(p, v);
#endif
  }

  // The larger; b where either is NaN.
  MFD_INLINE V max(V a, V b) {
#if MFD_AVX512
    return (V)_mm512_maskz_max_ps(kAllLanes, (__m512)a, (__m512)b);
#elif MFD_AVX2
    return (V)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
  }
  // The smaller; b where either is NaN.
  MFD_INLINE V min(V a, V b) {
#if MFD_AVX512
    return (V)_mm512_maskz_min_ps(kAllLanes, (__m512)a, (__m512)b);
#elif MFD_AVX2
    return (V)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
  }
  // a*b + c, in one rounding where the hardware can.
  MFD_INLINE V fma(V a, V b, V c) {
#if MFD_AVX512
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif MFD_AVX2
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
  }
  // a*b + c in one rounding everywhere, which an instruction set without it does in double precision.
  MFD_INLINE V fused(V a, V b, V c) {
#if MFD_AVX512 || MFD_AVX2
    return fma(a, b, c);
#else
    typedef double Wide __attribute__((vector_size(8 * MFD_LANES)));
    const Wide sum = __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide) +
                     __builtin_convertvector(c, Wide);
    return __builtin_convertvector(sum, V);
#endif
  }
  // Lane i and lane i + width meet, width = kLanes/2 .. 1: the same tree with shuffles and without.
  // In double precision: a row with one dominating class would lose what the others add to it.
  MFD_INLINE double sum(V v) {
#if defined(__SSE2__)
    typedef double Double2 __attribute__((vector_size(16)));
#if MFD_AVX512 || MFD_AVX2
    typedef double Double4 __attribute__((vector_size(32)));
#if MFD_AVX512
    typedef float Float8 __attribute__((vector_size(32)));
    typedef double Double8 __attribute__((vector_size(64)));
    const Float8 low8 = (Float8)_mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 0);
    const Float8 high8 = (Float8)_mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 1);
    const Double8 eight = __builtin_convertvector(low8, Double8) + __builtin_convertvector(high8, Double8);
    const Double4 four = (Double4)_mm512_maskz_extractf64x4_pd(0xf, (__m512d)eight, 0) +
                         (Double4)_mm512_maskz_extractf64x4_pd(0xf, (__m512d)eight, 1);
#else
    const Double4 four = (Double4)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)) +
                         (Double4)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#endif
    const Double2 two =
        (Double2)_mm256_castpd256_pd128((__m256d)four) + (Double2)_mm256_extractf128_pd((__m256d)four, 1);
#else
    const Double2 two =
        (Double2)_mm_cvtps_pd((__m128)v) + (Double2)_mm_cvtps_pd(_mm_movehl_ps((__m128)v, (__m128)v));
#endif
    return two[0] + two[1];
#else
    double lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = v[i];
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    return lane[0];
#endif
  }
  MFD_INLINE T largest(V v) {
#if defined(__SSE2__)
#if MFD_AVX512
    const __m256 low8 = _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 0);
    const __m256 eight = _mm256_max_ps(_mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 1), low8);
    const __m128 quad = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#elif MFD_AVX2
    const __m256 eight = (__m256)v;
    const __m128 quad = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
    const __m128 quad = (__m128)v;
#endif
    const __m128 pair = _mm_max_ps(quad, _mm_movehl_ps(quad, quad));
    return pair[0] > pair[1] ? pair[0] : pair[1];
#else
    T lane[kLanes];
    __builtin_memcpy(lane, &v, sizeof(V));
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
    return lane[0];
#endif
  }

  MFD_INLINE V from_bfloat(const uint16_t* p) {
    VecH h;
    __builtin_memcpy(&h, p, sizeof(h));
    return (V)(__builtin_convertvector(h, VecU) << 16);
  }
  // Round to nearest even; a NaN keeps its sign and becomes quiet.
  MFD_INLINE void to_bfloat(uint16_t* p, V v) {
    const VecU bits = (VecU)v;
    const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const VecU nan = (bits >> 16) | 0x40u;
    const VecH h = __builtin_convertvector((v == v) ? rounded : nan, VecH);
    __builtin_memcpy(p, &h, sizeof(h));
  }
  MFD_INLINE V from_half(const uint16_t* p) {
#if MFD_AVX512
    return (V)_mm512_maskz_cvtph_ps(kAllLanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif MFD_AVX2
    return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    V v;
    for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i]);
    return v;
#endif
  }
  MFD_INLINE void to_half(uint16_t* p, V v) {
#if MFD_AVX512
    const __m256i half = _mm512_maskz_cvtps_ph(kAllLanes, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
#elif MFD_AVX2
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(v[i]);
#endif
  }

  // exp.h and log.h have the definitions, and say where they hold.
  MFD_INLINE V exp_of(V x);
  MFD_INLINE V expm1_of(V x);
  MFD_INLINE V expm1_below(V x);
  MFD_INLINE V log1p_above(V x);
  MFD_INLINE V log_of(V x);
  MFD_INLINE V tanh_of(V x);

  MFD_INLINE V load(const BFloat16* p) { return from_bfloat(&p->bits); }
  MFD_INLINE V load(const Float16* p) { return from_half(&p->bits); }
  MFD_INLINE void store(BFloat16* p, V v) { to_bfloat(&p->bits, v); }
  MFD_INLINE void store(Float16* p, V v) { to_half(&p->bits, v); }
  template <class E>
  MFD_INLINE V load_first(const E* p, int64_t n, T) {
    E some[kLanes] = {};
    __builtin_memcpy(some, p, static_cast<size_t>(n) * sizeof(E));
    return load(some);
  }
  template <class E>
  MFD_INLINE void store_first(E* p, V v, int64_t n) {
    E some[kLanes];
    store(some, v);
    __builtin_memcpy(p, some, static_cast<size_t>(n) * sizeof(E));
  }
};

// One float64 value: the same algorithms, for float64 logits.
struct F64 {
  typedef double T;
  typedef double V;
  static constexpr int kWidth = 1;
  static constexpr double kLowest = -__DBL_MAX__;
  static constexpr double kLeast = __DBL_MIN__;

  MFD_INLINE V splat(T v) { return v; }
  MFD_INLINE V load(const T* p) { return *p; }
  MFD_INLINE void store(T* p, V v) { *p = v; }
  MFD_INLINE V select(bool mask, V a, V b) { return mask ? a : b; }
  MFD_INLINE V load_first(const T* p, int64_t, T) { return *p; }
  MFD_INLINE void store_first(T* p, V v, int64_t) { *p = v; }
  MFD_INLINE void stream(T* p, V v) { *p = v; }
  MFD_INLINE V max(V a, V b) { return a > b ? a : b; }
  MFD_INLINE V min(V a, V b) { return a < b ? a : b; }
  MFD_INLINE V fma(V a, V b, V c) { return a * b + c; }
  MFD_INLINE V fused(V a, V b, V c) { return a * b + c; }
  MFD_INLINE T sum(V v) { return v; }
  MFD_INLINE T largest(V v) { return v; }
  MFD_INLINE V exp_of(V x) { return ::exp(x); }
  MFD_INLINE V expm1_of(V x) { return ::expm1(x); }
  MFD_INLINE V expm1_below(V x) { return ::expm1(x); }
  MFD_INLINE V log1p_above(V x) { return ::log1p(x); }
  MFD_INLINE V log_of(V x) { return ::log(max(kLeast, x)); }
  MFD_INLINE V tanh_of(V x) { return ::tanh(x); }
};

// The vector at p of which `left` >= 1 elements exist; the others are `pad`. The branch is cheaper than a
// mask.
template <class S>
MFD_INLINE typename S::V load_or_pad(const typename S::T* p, int64_t left, typename S::T pad) {
  return left >= S::kWidth ? S::load(p) : S::load_first(p, left, pad);
}

}  // namespace
}  // namespace mfd::MFD_ISA
