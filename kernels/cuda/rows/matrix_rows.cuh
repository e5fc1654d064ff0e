// Rows of matrices in and out of memory, and their copies in shared memory.
#pragma once

#include "common/rows/fusion_math.h"
#include "cuda/rows/rows.cuh"

namespace mfd {
namespace device {

// A row of a matrix or a vector, in global or in shared memory.
struct Source {
  const unsigned char* data;
  Dtype dtype;
  bool wide;  // whole vectors may be loaded where they end within the row
};

template <class S>
MFD_INLINE Source source_at(const void* data, Dtype dtype) {
  const bool narrow = sizeof(typename S::T) == 4 && dtype != Dtype::kFloat64;
  return {static_cast<const unsigned char*>(data), dtype, narrow && is_aligned(data)};
}

template <class S>
MFD_INLINE Source source_of(const RowMatrix& m, int64_t row) {
  return source_at<S>(static_cast<const unsigned char*>(m.data) + matrix_offset(m, row) * size_of(m.dtype),
                      m.dtype);
}

// The columns that a thread handles together, as they come from memory. They are converted when `get` is
// called, so that those of several rows are on their way at a time. Columns beyond the row are 0. kPadded:
// zeros follow the row up to a whole vector.
template <class S>
struct Columns;

template <>
struct Columns<F32> {
  static constexpr int N = VectorOf<F32>::kColumns;
  uint4 low, high;
  bool packed;  // 16 bits each, in `low`

  template <bool kPadded>
  MFD_DEVICE void load(const Source& row, int64_t start, int64_t width) {
    const unsigned char* p = row.data + start * size_of(row.dtype);
    if constexpr (kPadded) {
      load_whole(p, row.dtype);
    } else if (row.wide && start + N <= width) {
      load_whole(p, row.dtype);
    } else {
      load_singly(p, row.dtype, width - start);
    }
  }

  MFD_DEVICE void load_whole(const unsigned char* p, Dtype dtype) {
    const uint4* words = reinterpret_cast<const uint4*>(p);
    packed = dtype != Dtype::kFloat32;
    low = words[0];
    high = packed ? uint4{0, 0, 0, 0} : words[1];
  }

  MFD_DEVICE void load_singly(const unsigned char* p, Dtype dtype, int64_t left) {
    const int size = size_of(dtype);
    uint32_t x[N];
#pragma unroll
    for (int k = 0; k < N; ++k)
      x[k] = bits_as<uint32_t>(k < left ? load_one<float>(p + k * size, dtype) : 0.0f);
    packed = false;
    low = {x[0], x[1], x[2], x[3]};
    high = {x[4], x[5], x[6], x[7]};
  }

  MFD_DEVICE void get(Dtype dtype, float (&x)[N]) const {
    if (packed) {
      const bool bfloat = dtype == Dtype::kBFloat16;
      unpack(low.x, bfloat, x), unpack(low.y, bfloat, x + 2), unpack(low.z, bfloat, x + 4),
          unpack(low.w, bfloat, x + 6);
      return;
    }
    x[0] = bits_as<float>(low.x), x[1] = bits_as<float>(low.y), x[2] = bits_as<float>(low.z),
    x[3] = bits_as<float>(low.w);
    x[4] = bits_as<float>(high.x), x[5] = bits_as<float>(high.y), x[6] = bits_as<float>(high.z),
    x[7] = bits_as<float>(high.w);
  }
};

template <>
struct Columns<F64> {
  static constexpr int N = VectorOf<F64>::kColumns;
  double value;

  template <bool kPadded>
  MFD_DEVICE void load(const Source& row, int64_t start, int64_t width) {
    value = start < width ? load_one<double>(row.data + start * size_of(row.dtype), row.dtype) : 0.0;
  }
  MFD_DEVICE void get(Dtype, double (&x)[N]) const { x[0] = value; }
};

template <class S, bool kPadded>
MFD_INLINE void load_columns(const Source& row, int64_t start, int64_t width,
                             typename S::T (&x)[VectorOf<S>::kColumns]) {
  Columns<S> columns;
  columns.template load<kPadded>(row, start, width);
  columns.get(row.dtype, x);
}

// Writes columns; those beyond the row are dropped.
template <class S>
MFD_INLINE void store_columns(void* row, Dtype dtype, int64_t start, int64_t width,
                              const typename S::T (&x)[VectorOf<S>::kColumns]) {
  const bool wide = sizeof(typename S::T) == 4 && dtype != Dtype::kFloat64 && is_aligned(row);
  store_gradient<S>(static_cast<unsigned char*>(row), dtype, start, width, wide, x);
}

// act(start) for every thread's columns of a row.
template <class S, class Group, class Act>
MFD_INLINE void over_columns(const Group& group, int64_t width, const Act& act) {
  constexpr int N = VectorOf<S>::kColumns;
  for (int64_t start = int64_t{group.rank()} * N; start < width; start += int64_t{group.threads()} * N)
    act(start);
}

// By halves: short sums round less.
template <class S, int K>
MFD_INLINE typename S::T total_of(typename S::T (&x)[K]) {
#pragma unroll
  for (int half = K / 2; half > 0; half /= 2)
#pragma unroll
    for (int k = 0; k < half; ++k) x[k] = x[k] + x[k + half];
  return x[0];
}

template <class S>
MFD_INLINE typename S::T dot_of(const typename S::T (&a)[VectorOf<S>::kColumns],
                                const typename S::T (&b)[VectorOf<S>::kColumns]) {
  constexpr int N = VectorOf<S>::kColumns;
  if constexpr (N == 1) {
    return a[0] * b[0];
  } else {
    typename S::T pair[N / 2];
#pragma unroll
    for (int k = 0; k < N / 2; ++k) pair[k] = S::fma(a[2 * k + 1], b[2 * k + 1], a[2 * k] * b[2 * k]);
    return total_of<S>(pair);
  }
}

// Bytes of a parked row.
MFD_ROW_FN int64_t parked_row_bytes(int64_t width, int size) {
  constexpr int64_t N = VectorOf<F32>::kColumns;
  return (width + N - 1) / N * N * size;
}

// Starts the copy of a row to shared memory, by 16 bytes where the row is aligned; zeros follow it up to a
// whole vector. await_copies() and the group's sync() end it.
template <class Group>
MFD_INLINE Source park_row(const Group& group, const Source& row, int64_t width, unsigned char* shared) {
  const int size = size_of(row.dtype);
  const int64_t bytes = width * size, whole = is_aligned(row.data) ? bytes & ~int64_t{15} : 0;
  const int64_t end = parked_row_bytes(width, size);
  for (int64_t at = group.rank() * int64_t{16}; at < whole; at += group.threads() * int64_t{16})
    copy_16_bytes(shared + at, row.data + at);
  for (int64_t at = whole + group.rank() * size; at < end; at += group.threads() * size) {
    if (size == 2) {
      *reinterpret_cast<uint16_t*>(shared + at) =
          at < bytes ? *reinterpret_cast<const uint16_t*>(row.data + at) : uint16_t{0};
    } else {
      *reinterpret_cast<uint32_t*>(shared + at) =
          at < bytes ? *reinterpret_cast<const uint32_t*>(row.data + at) : 0u;
    }
  }
  return {shared, row.dtype, true};
}

}  // namespace device
}  // namespace mfd
