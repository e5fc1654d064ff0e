// Rows in and out of memory, kVector columns of one thread at a time: conversion, logit transform and its
// derivative.
#pragma once

#include "cuda/rows/group.cuh"
#include "cuda/rows/real.cuh"

namespace mfd {
namespace device {

// Columns that a thread handles together: 16 bytes of the narrowest logits.
template <class S>
struct VectorOf {
  static constexpr int kColumns = sizeof(typename S::T) == 4 ? 8 : 1;
};

MFD_INLINE int size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

MFD_INLINE bool is_aligned(const void* address) {
  return (reinterpret_cast<uintptr_t>(address) & 15u) == 0;
}

template <class T>
MFD_INLINE T load_one(const unsigned char* p, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return static_cast<T>(*reinterpret_cast<const float*>(p));
  if (dtype == Dtype::kFloat64) return static_cast<T>(*reinterpret_cast<const double*>(p));
  const uint16_t bits = *reinterpret_cast<const uint16_t*>(p);
  return static_cast<T>(dtype == Dtype::kBFloat16 ? bfloat_to_float(bits) : half_to_float(bits));
}

template <class T>
MFD_INLINE void store_one(unsigned char* p, Dtype dtype, T value) {
  if (dtype == Dtype::kFloat32) {
    *reinterpret_cast<float*>(p) = static_cast<float>(value);
  } else if (dtype == Dtype::kFloat64) {
    *reinterpret_cast<double*>(p) = static_cast<double>(value);
  } else {
    const float single = static_cast<float>(value);
    *reinterpret_cast<uint16_t*>(p) =
        dtype == Dtype::kBFloat16 ? float_to_bfloat(single) : float_to_half(single);
  }
}

MFD_INLINE void unpack(uint32_t word, bool bfloat, float* x) {
  const uint16_t low = static_cast<uint16_t>(word & 0xffffu), high = static_cast<uint16_t>(word >> 16);
  x[0] = bfloat ? bfloat_to_float(low) : half_to_float(low);
  x[1] = bfloat ? bfloat_to_float(high) : half_to_float(high);
}

MFD_INLINE uint32_t pack(bool bfloat, const float* x) {
  const uint32_t low = bfloat ? float_to_bfloat(x[0]) : float_to_half(x[0]);
  const uint32_t high = bfloat ? float_to_bfloat(x[1]) : float_to_half(x[1]);
  return low | high << 16;
}

// Eight float32 values by loads and stores of 16 bytes.
MFD_INLINE void load_wide(const unsigned char* p, Dtype dtype, float (&x)[8]) {
  const uint4* words = reinterpret_cast<const uint4*>(p);
  const uint4 a = words[0];
  if (dtype == Dtype::kFloat32) {
    const uint4 b = words[1];
    x[0] = bits_as<float>(a.x), x[1] = bits_as<float>(a.y), x[2] = bits_as<float>(a.z),
    x[3] = bits_as<float>(a.w);
    x[4] = bits_as<float>(b.x), x[5] = bits_as<float>(b.y), x[6] = bits_as<float>(b.z),
    x[7] = bits_as<float>(b.w);
    return;
  }
  const bool bfloat = dtype == Dtype::kBFloat16;
  unpack(a.x, bfloat, x), unpack(a.y, bfloat, x + 2), unpack(a.z, bfloat, x + 4), unpack(a.w, bfloat, x + 6);
}

MFD_INLINE void store_wide(unsigned char* p, Dtype dtype, const float (&x)[8]) {
  uint4* words = reinterpret_cast<uint4*>(p);
  if (dtype == Dtype::kFloat32) {
    words[0] = {bits_as<uint32_t>(x[0]), bits_as<uint32_t>(x[1]), bits_as<uint32_t>(x[2]),
                bits_as<uint32_t>(x[3])};
    words[1] = {bits_as<uint32_t>(x[4]), bits_as<uint32_t>(x[5]), bits_as<uint32_t>(x[6]),
                bits_as<uint32_t>(x[7])};
    return;
  }
  const bool bfloat = dtype == Dtype::kBFloat16;
  words[0] = {pack(bfloat, x), pack(bfloat, x + 2), pack(bfloat, x + 4), pack(bfloat, x + 6)};
}

// float64 goes one by one.
MFD_INLINE void load_wide(const unsigned char* p, Dtype dtype, double (&x)[1]) {
  x[0] = load_one<double>(p, dtype);
}
MFD_INLINE void store_wide(unsigned char* p, Dtype dtype, const double (&x)[1]) {
  store_one<double>(p, dtype, x[0]);
}

// The logits of one side of a row; `data` is where column 0 lies, or would lie if it had been parked too.
struct View {
  const Side* side;
  const unsigned char* data;
  bool wide;         // whole vectors may be loaded
  int64_t excluded;  // the excluded class: it reads as -inf; -1 for none
  Centre centre;
};

template <class S>
MFD_INLINE View view_of(const Side& side, int64_t row, int64_t decoupled) {
  View v;
  v.side = &side;
  v.data = static_cast<const unsigned char*>(side.data) + row_offset(side, row) * size_of(side.dtype);
  v.wide = sizeof(typename S::T) == 4 && is_aligned(v.data);
  v.excluded = decoupled;
  v.centre = {0.0, 1.0, 0.0};
  return v;
}

template <class S>
MFD_INLINE typename S::T transformed(const View& v, typename S::T x, bool standardize) {
  typedef typename S::T T;
  const Side& side = *v.side;
  if (side.scale != 1.0) x = x * static_cast<T>(side.scale);
  if (side.softcap > 0) {
    const T cap = static_cast<T>(side.softcap);
    x = cap * tanh_of(x / cap);
  }
  if (standardize && side.standardize)
    x = (x - static_cast<T>(v.centre.mean)) * static_cast<T>(v.centre.inverse);
  return x;
}

// Transformed logits of columns [start, start + kColumns); -inf beyond the last class, or `pad` where that is
// given. A parked row has room for whole vectors. kPlain: nothing
// transforms the logits.
template <class S, bool kParked, bool kPlain = false>
MFD_INLINE void load_logits(const View& v, int64_t start, int64_t classes,
                            typename S::T (&x)[VectorOf<S>::kColumns], bool standardize = true,
                            typename S::T pad = static_cast<typename S::T>(-kInf)) {
  constexpr int N = VectorOf<S>::kColumns;
  const Side& side = *v.side;
  const int size = size_of(side.dtype);
  const unsigned char* p = v.data + start * size;
  if (kParked || (v.wide && start + N <= classes)) {
    load_wide(p, side.dtype, x);
    if (start + N > classes) {
#pragma unroll
      for (int k = 0; k < N; ++k) x[k] = start + k < classes ? x[k] : pad;
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k)
      x[k] = start + k < classes ? load_one<typename S::T>(p + k * size, side.dtype) : pad;
  }
  if (kPlain) return;
  if (side.scale != 1.0 || side.softcap > 0 || side.standardize) {
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (start + k < classes) x[k] = transformed<S>(v, x[k], standardize);
  }
  if (standardize && v.excluded >= start && v.excluded < start + N) {
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (start + k == v.excluded) x[k] = static_cast<typename S::T>(-kInf);
  }
}

// Transformed value of one logit, also of the excluded class, from global memory.
template <class S>
MFD_INLINE double logit_at(const View& v, const unsigned char* global, int64_t column) {
  const Side& side = *v.side;
  return static_cast<double>(
      transformed<S>(v, load_one<typename S::T>(global + column * size_of(side.dtype), side.dtype), true));
}

MFD_INLINE bool changes_gradient(const Side& side) {
  return side.scale != 1.0 || side.softcap > 0 || side.standardize;
}

// What the drift of a standardised row takes from all of its gradients.
template <class S>
MFD_INLINE double drift_gradient(const View& v, double dot) {
  return v.side->standardize ? dot * v.centre.fold * drift<typename S::T>(v.centre) : 0.0;
}

// Gradient of the transformed logit z -> gradient of the raw one; `dot` = sum gradient*z over a standardised
// row.
//   standardised: (g - mean g)/s - (sum g z)/s*(x - mean)/((C - 1)*deviation), mean g = 0 as no loss changes
//   with a common shift;  scale*(1 - (x/softcap)^2).
//   kShifted: g is already less drift_gradient.
template <class S, bool kShifted = false>
MFD_INLINE typename S::T raw_gradient(const View& v, typename S::T g, typename S::T z, double dot) {
  typedef typename S::T T;
  const Side& side = *v.side;
  if (side.standardize) {
    if (!kShifted) z = z + static_cast<T>(drift<T>(v.centre));
    g = (g - static_cast<T>(dot * v.centre.fold) * z) * static_cast<T>(v.centre.inverse);
    z = S::fma(z, static_cast<T>(1.0 / v.centre.inverse), static_cast<T>(v.centre.mean));
  }
  g = g * static_cast<T>(side.scale);
  if (side.softcap > 0) {
    const T t = z / static_cast<T>(side.softcap);
    g = g * ((T(1) - t) * (T(1) + t));
  }
  return g;
}

// Writes a vector of gradients; columns from `classes` to `width` become 0.
template <class S>
MFD_INLINE void store_gradient(unsigned char* row, Dtype dtype, int64_t start, int64_t width, bool wide,
                               const typename S::T (&g)[VectorOf<S>::kColumns]) {
  constexpr int N = VectorOf<S>::kColumns;
  const int size = size_of(dtype);
  unsigned char* p = row + start * size;
  if (wide && start + N <= width) {
    store_wide(p, dtype, g);
    return;
  }
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (start + k < width) store_one<typename S::T>(p + k * size, dtype, g[k]);
}

// Vectors [begin, end) of a row belong to this block, every threads()-th of them to this thread.
struct Span {
  int64_t begin, end;
};

template <class S, class Group>
MFD_INLINE Span span_of(const Group& group, int64_t classes) {
  constexpr int N = VectorOf<S>::kColumns;
  const int64_t vectors = (classes + N - 1) / N, each = (vectors + group.parts() - 1) / group.parts();
  const int64_t begin = each * group.part() < vectors ? each * group.part() : vectors;
  return {begin, begin + each < vectors ? begin + each : vectors};
}

template <class S, class Group, class Act>
MFD_INLINE void over_vectors(const Group& group, const Span& span, const Act& act) {
  for (int64_t v = span.begin + group.rank(); v < span.end; v += group.threads())
    act(v * VectorOf<S>::kColumns);
}

// In pairs: the sum of a short row rounds less.
template <class T>
MFD_INLINE T sum_of(const T (&x)[8]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}
template <class T>
MFD_INLINE T sum_of(const T (&x)[1]) {
  return x[0];
}

template <class S>
MFD_INLINE typename S::T largest_of(const typename S::T (&x)[VectorOf<S>::kColumns], typename S::T least) {
  typename S::T m = least;
#pragma unroll
  for (int k = 0; k < VectorOf<S>::kColumns; ++k) m = S::max(x[k], m);
  return m;
}

// Copies this block's columns of a row into shared memory, by 16 bytes where the row is aligned.
template <class S, class Group>
MFD_INLINE void park(const Group& group, View& v, const Span& span, int64_t classes, unsigned char* shared) {
  const int size = size_of(v.side->dtype);
  const int64_t first = span.begin * VectorOf<S>::kColumns;
  int64_t last = span.end * VectorOf<S>::kColumns;
  if (last > classes) last = classes;
  const unsigned char* from = v.data + first * size;
  const int64_t bytes = (last - first) * size, whole = is_aligned(from) ? bytes & ~int64_t{15} : 0;
  for (int64_t at = group.rank() * int64_t{16}; at < whole; at += group.threads() * int64_t{16})
    copy_16_bytes(shared + at, from + at);
  for (int64_t at = whole + group.rank() * size; at < bytes; at += group.threads() * size) {
    if (size == 2) {
      *reinterpret_cast<uint16_t*>(shared + at) = *reinterpret_cast<const uint16_t*>(from + at);
    } else {
      *reinterpret_cast<uint32_t*>(shared + at) = *reinterpret_cast<const uint32_t*>(from + at);
    }
  }
  v.data = shared - first * size;
  v.wide = true;
}

// Mean and unbiased deviation of a row. Sun et al., arXiv:2403.01427.
template <class S, bool kParked, class Group>
MFD_INLINE void find_centre(const Group& group, View& v, const unsigned char* global, const Span& span,
                            int64_t classes) {
  constexpr int N = VectorOf<S>::kColumns;
  typedef typename S::T T;
  const double count = static_cast<double>(classes), degrees = classes > 1 ? count - 1 : 1.0;
  T mean = transformed<S>(v, load_one<T>(global, v.side->dtype), false);
  double moment[1], exact = 0;
  for (int power = 1; power <= 2; ++power) {
    moment[0] = 0;
    over_vectors<S>(group, span, [&](int64_t start) {
      T x[N];
      load_logits<S, kParked>(v, start, classes, x, false, mean);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const T d = x[k] - mean;
        moment[0] += static_cast<double>(power == 1 ? d : d * d);
      }
    });
    group.template reduce<Sum>(moment);
    if (power == 1) {
      exact = static_cast<double>(mean) + moment[0] / count;
      mean = static_cast<T>(exact);
    }
  }
  const double off = static_cast<double>(mean) - exact, square = moment[0] - count * off * off;
  const double deviation = square > 0 ? sqrt(square / degrees) : square * 0, s = deviation + 1e-7;
  v.centre = {exact, 1.0 / s, deviation == 0 ? 0.0 : s / (deviation * degrees)};
}

}  // namespace device
}  // namespace mfd
