// Rows in and out of memory: conversion, logit transform and its derivative, zero columns.

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
    if (side.softcap > 0) v = cap * tanh_of(v / cap);
    S::store(x + i, v);
  }
}

// Transformed logits [start, start + n) of a row: in place when nothing changes them, else in `buffer`.
template <class S>
MFD_INLINE Block<S> load_block(const Side& side, int64_t offset, int64_t start, int64_t n,
                               typename S::T* buffer) {
  const char* raw = static_cast<const char*>(side.data) + (offset + start) * dtype_size(side.dtype);
  if (is_direct<S>(side)) return {reinterpret_cast<const typename S::T*>(raw), raw};
  convert_in(raw, side.dtype, n, buffer);
  if (side.scale != 1.0 || side.softcap > 0) transform<S>(side, n, buffer);
  return {buffer, raw};
}

// gradient *= scale*(1 - (x/softcap)^2), x the transformed logits.
template <class S>
static void transform_backward(const Side& side, const typename S::T* x, int64_t n, typename S::T* gradient) {
  typedef typename S::T T;
  const typename S::V scale = S::splat(static_cast<T>(side.scale));
  const typename S::V cap = S::splat(static_cast<T>(side.softcap));
  for (int64_t i = 0; i < n; i += S::kWidth) {
    typename S::V g = S::load(gradient + i) * scale;
    if (side.softcap > 0) {
      const typename S::V tanh_x = S::load_first(x + i, n - i < S::kWidth ? n - i : S::kWidth, T(0)) / cap;
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

// Writes n <= kBlock values in a dtype of 16 bits or in the compute dtype.
static void convert_out(const float* in, int64_t n, Dtype dtype, bool stream, char* out) {
  if (dtype == Dtype::kFloat32) {
    if (stream) {
      stream_bytes(out, reinterpret_cast<const char*>(in), n * 4);
    } else {
      __builtin_memcpy(out, in, static_cast<size_t>(n) * 4);
    }
    return;
  }
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
