// Rows in and out of memory: conversion, logit transform and its derivative, zero columns.
#pragma once

#include "common/rows/row_math.h"
#include "cpu/simd/exp.h"
#include "cpu/simd/vec.h"

namespace mfd::MFD_ISA {
namespace {

template <class S>
struct Block {
  const typename S::T* x;  // kBlock transformed logits, or fewer at the end of the row
  const char* raw;         // where they come from
};

MFD_INLINE int64_t dtype_size(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

template <class S>
MFD_INLINE bool is_direct(const Side& side) {
  return side.dtype == (sizeof(typename S::T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32) &&
         side.scale == 1.0 && !(side.softcap > 0);
}

static void convert_in(const void* source, Dtype dtype, int64_t n, float* out) {
  if (dtype == Dtype::kFloat32) {
    __builtin_memcpy(out, source, static_cast<size_t>(n) * 4);
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(source);
  int64_t i = 0;
  if (dtype == Dtype::kBFloat16) {
    for (; i + kLanes <= n; i += kLanes) F32::store(out + i, F32::from_bfloat(p + i));
    for (; i < n; ++i) out[i] = bfloat_to_float(p[i]);
  } else {
    for (; i + kLanes <= n; i += kLanes) F32::store(out + i, F32::from_half(p + i));
    for (; i < n; ++i) out[i] = half_to_float(p[i]);
  }
}

static void convert_in(const void* source, Dtype dtype, int64_t n, double* out) {
  for (int64_t i = 0; i < n; ++i) {
    switch (dtype) {
      case Dtype::kFloat64:
        out[i] = static_cast<const double*>(source)[i];
        break;
      case Dtype::kFloat32:
        out[i] = static_cast<const float*>(source)[i];
        break;
      case Dtype::kBFloat16:
        out[i] = bfloat_to_float(static_cast<const uint16_t*>(source)[i]);
        break;
      case Dtype::kFloat16:
        out[i] = half_to_float(static_cast<const uint16_t*>(source)[i]);
        break;
    }
  }
}

// Buffers hold kBlock elements, a multiple of the lanes, so whole vectors are transformed.
template <class S>
static void transform(const Side& side, int64_t n, typename S::T* x) {
  typedef typename S::T T;
  const typename S::V scale = S::splat(static_cast<T>(side.scale));
  const typename S::V cap = S::splat(static_cast<T>(side.softcap));
  for (int64_t i = 0; i < n; i += S::kWidth) {
    typename S::V v = S::load(x + i);
    if (side.scale != 1.0) v = v * scale;
    if (side.softcap > 0) v = cap * S::tanh_of(v / cap);
    S::store(x + i, v);
  }
}

// One row of one side.
struct View {
  const Side* side;
  int64_t offset;
  int64_t excluded;  // the excluded class: it reads as -inf; -1 for none
  Centre centre;
};

// (x - mean)*inverse
template <class S>
static void standardize(const Centre& centre, int64_t n, typename S::T* x) {
  typedef typename S::T T;
  const typename S::V mean = S::splat(static_cast<T>(centre.mean)),
                      inverse = S::splat(static_cast<T>(centre.inverse));
  for (int64_t i = 0; i < n; i += S::kWidth) S::store(x + i, (S::load(x + i) - mean) * inverse);
}

// Logits [start, start + n) of a row after scale and softcap: in place when nothing changes them, else in
// `buffer`.
template <class S>
MFD_INLINE Block<S> load_unstandardized(const View& view, int64_t start, int64_t n, typename S::T* buffer) {
  const Side& side = *view.side;
  const char* raw = static_cast<const char*>(side.data) + (view.offset + start) * dtype_size(side.dtype);
  if (is_direct<S>(side)) return {reinterpret_cast<const typename S::T*>(raw), raw};
  convert_in(raw, side.dtype, n, buffer);
  if (side.scale != 1.0 || side.softcap > 0) transform<S>(side, n, buffer);
  return {buffer, raw};
}

// Transformed logits [start, start + n) of a row.
template <class S>
MFD_INLINE Block<S> load_block(const View& view, int64_t start, int64_t n, typename S::T* buffer) {
  Block<S> block = load_unstandardized<S>(view, start, n, buffer);
  const int64_t decoupled = view.excluded - start;
  const bool holds_excluded = decoupled >= 0 && decoupled < n;
  if ((view.side->standardize || holds_excluded) && block.x != buffer) {
    int64_t i = 0;
    for (; i + S::kWidth <= n; i += S::kWidth) S::store(buffer + i, S::load(block.x + i));
    for (; i < n; ++i) buffer[i] = block.x[i];
    block.x = buffer;
  }
  if (view.side->standardize) standardize<S>(view.centre, n, buffer);
  if (holds_excluded) buffer[decoupled] = static_cast<typename S::T>(-kInf);
  return block;
}

// sum (x - shift)^kPower
template <class S, int kPower>
static double row_moment(const View& view, int64_t classes, double shift, typename S::T* buffer) {
  typedef typename S::T T;
  typedef typename S::V V;
  const T pad = static_cast<T>(shift);
  const V m = S::splat(pad);
  double total = 0;
  for (int64_t start = 0; start < classes; start += kBlock) {
    const int64_t n = classes - start < kBlock ? classes - start : kBlock;
    const T* x = load_unstandardized<S>(view, start, n, buffer).x;
    V sum{};
    for (int64_t i = 0; i < n; i += S::kWidth) {
      const V d = S::load_first(x + i, n - i < S::kWidth ? n - i : S::kWidth, pad) - m;
      sum = sum + (kPower == 2 ? d * d : d);
    }
    total += S::sum(sum);
  }
  return total;
}

// Mean and unbiased deviation of a row. Sun et al., arXiv:2403.01427.
template <class S>
static Centre row_centre(const View& view, int64_t classes, typename S::T* buffer) {
  constexpr double kEpsilon = 1e-7;
  typedef typename S::T T;
  const double count = static_cast<double>(classes), degrees = classes > 1 ? count - 1 : 1.0;
  const double first = load_unstandardized<S>(view, 0, 1, buffer).x[0];
  const double mean = first + row_moment<S, 1>(view, classes, first, buffer) / count;
  const double rounded = static_cast<T>(mean), square = count * (rounded - mean) * (rounded - mean);
  const double moment = row_moment<S, 2>(view, classes, rounded, buffer) - square;
  const double deviation = moment > 0 ? sqrt(moment / degrees) : moment * 0;
  const double s = deviation + kEpsilon;
  return {mean, 1.0 / s, deviation == 0 ? 0.0 : s / (deviation * degrees)};
}

// Whether the gradient of the raw logits differs from that of the transformed ones.
MFD_INLINE bool changes_gradient(const Side& side) {
  return side.scale != 1.0 || side.softcap > 0 || side.standardize;
}

// gradient -> gradient of the raw logits; z the transformed logits of the block, `dot` sum gradient*z over
// the row.
//   standardised: (g - mean g)/s - (sum g z)/s*(x - mean)/((C - 1)*deviation), mean g = 0 as no loss changes
//   with a common shift;
//   scale*(1 - (x/softcap)^2).
template <class S>
static void transform_backward(const View& view, const typename S::T* z, int64_t n, double dot,
                               typename S::T* gradient) {
  typedef typename S::T T;
  typedef typename S::V V;
  const Side& side = *view.side;
  const V scale = S::splat(static_cast<T>(side.scale)), cap = S::splat(static_cast<T>(side.softcap));
  const V inverse = S::splat(static_cast<T>(view.centre.inverse)),
          mean = S::splat(static_cast<T>(view.centre.mean));
  const V deviation = S::splat(static_cast<T>(1.0 / view.centre.inverse));
  const V fold = S::splat(static_cast<T>(dot * view.centre.fold)),
          shift = S::splat(static_cast<T>(drift<T>(view.centre)));
  for (int64_t i = 0; i < n; i += S::kWidth) {
    V g = S::load(gradient + i), x = S::load_first(z + i, n - i < S::kWidth ? n - i : S::kWidth, T(0));
    if (side.standardize) {
      g = (g - fold * (x + shift)) * inverse;
      x = S::fma(x, deviation, mean);
    }
    g = g * scale;
    if (side.softcap > 0) {
      const V tanh_x = x / cap;
      g = g * ((S::splat(T(1)) - tanh_x) * (S::splat(T(1)) + tanh_x));
    }
    S::store(gradient + i, g);
  }
}

// Bytes past the caches; the ends that do not fill a vector go the usual way.
static void stream_bytes(char* out, const char* in, int64_t bytes) {
  constexpr int64_t kBytes = static_cast<int64_t>(sizeof(VecF));
  int64_t head = -static_cast<int64_t>(reinterpret_cast<uintptr_t>(out)) & (kBytes - 1);
  if (head > bytes) head = bytes;
  __builtin_memcpy(out, in, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + kBytes <= bytes; i += kBytes) {
    VecF v;
    __builtin_memcpy(&v, in + i, sizeof(v));
    F32::stream(reinterpret_cast<float*>(out + i), v);
  }
  __builtin_memcpy(out + i, in + i, static_cast<size_t>(bytes - i));
}

static void write_bytes(char* out, const char* in, int64_t bytes, bool stream) {
  if (stream) return stream_bytes(out, in, bytes);
  __builtin_memcpy(out, in, static_cast<size_t>(bytes));
}

// Writes n <= kBlock values in a dtype of 16 bits or in the compute dtype.
static void convert_out(const float* in, int64_t n, Dtype dtype, bool stream, char* out) {
  if (dtype == Dtype::kFloat32) return write_bytes(out, reinterpret_cast<const char*>(in), n * 4, stream);
  alignas(64) uint16_t buffer[kBlock];
  uint16_t* p = stream ? buffer : reinterpret_cast<uint16_t*>(out);
  int64_t i = 0;
  if (dtype == Dtype::kBFloat16) {
    for (; i + kLanes <= n; i += kLanes) F32::to_bfloat(p + i, F32::load(in + i));
    for (; i < n; ++i) p[i] = float_to_bfloat(in[i]);
  } else {
    for (; i + kLanes <= n; i += kLanes) F32::to_half(p + i, F32::load(in + i));
    for (; i < n; ++i) p[i] = float_to_half(in[i]);
  }
  if (stream) stream_bytes(out, reinterpret_cast<const char*>(buffer), n * 2);
}

static void convert_out(const double* in, int64_t n, Dtype dtype, bool, char* out) {
  for (int64_t i = 0; i < n; ++i) {
    switch (dtype) {
      case Dtype::kFloat64:
        reinterpret_cast<double*>(out)[i] = in[i];
        break;
      case Dtype::kFloat32:
        reinterpret_cast<float*>(out)[i] = static_cast<float>(in[i]);
        break;
      case Dtype::kBFloat16:
        reinterpret_cast<uint16_t*>(out)[i] = float_to_bfloat(static_cast<float>(in[i]));
        break;
      case Dtype::kFloat16:
        reinterpret_cast<uint16_t*>(out)[i] = float_to_half(static_cast<float>(in[i]));
        break;
    }
  }
}

static void write_zeros(char* out, int64_t bytes, bool stream) {
  if (!stream) {
    __builtin_memset(out, 0, static_cast<size_t>(bytes));
    return;
  }
  alignas(64) static const char zeros[4096] = {};
  for (int64_t i = 0; i < bytes; i += 4096) stream_bytes(out + i, zeros, bytes - i < 4096 ? bytes - i : 4096);
}

// A value per row; null where it is not wanted.
template <class T>
MFD_INLINE void put(void* out, int64_t row, double value) {
  if (out) static_cast<T*>(out)[row] = static_cast<T>(value);
}

}  // namespace
}  // namespace mfd::MFD_ISA
