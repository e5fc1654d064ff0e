// Whole rows of matrices in and out of the compute dtype.
#pragma once

#include <type_traits>

#include "common/rows/fusion_math.h"
#include "cpu/rows/rows.h"

namespace mfd::MFD_ISA {
namespace {

template <class E>
MFD_INLINE bool is_element(Dtype dtype) {
  if (std::is_same<E, double>::value) return dtype == Dtype::kFloat64;
  if (std::is_same<E, float>::value) return dtype == Dtype::kFloat32;
  return dtype == (std::is_same<E, BFloat16>::value ? Dtype::kBFloat16 : Dtype::kFloat16);
}

MFD_INLINE const char* row_address(const RowMatrix& m, int64_t row) {
  return static_cast<const char*>(m.data) + matrix_offset(m, row) * dtype_size(m.dtype);
}

// The row where it lies, or converted into `buffer`. To elements of 16 bits nothing is converted.
template <class E>
MFD_INLINE const E* row_in(const RowMatrix& m, int64_t row, int64_t n, E* buffer) {
  const char* raw = row_address(m, row);
  if constexpr (sizeof(E) > 2) {
    if (!is_element<E>(m.dtype)) {
      convert_in(raw, m.dtype, n, buffer);
      return buffer;
    }
  }
  return reinterpret_cast<const E*>(raw);
}

// Where to compute a row that goes to `out`: there, or in `buffer` on its way.
template <class E>
MFD_INLINE E* row_target(Dtype dtype, bool stream, char* out, E* buffer) {
  return is_element<E>(dtype) && !stream ? reinterpret_cast<E*>(out) : buffer;
}

template <class E>
MFD_INLINE void row_out(const E* in, int64_t n, Dtype dtype, bool stream, char* out) {
  if (reinterpret_cast<const char*>(in) == out) return;
  if constexpr (sizeof(E) > 2) {
    for (int64_t i = 0; i < n; i += kBlock)
      convert_out(in + i, n - i < kBlock ? n - i : kBlock, dtype, stream, out + i * dtype_size(dtype));
  } else {
    stream_bytes(out, reinterpret_cast<const char*>(in), n * dtype_size(dtype));
  }
}

// Asks for the row that comes next while this one is worked on: the hardware's own prefetching stops at the
// end of a page, and is slow to see a short row.
MFD_INLINE void prefetch(const RowMatrix& m, int64_t row, int64_t end, int64_t width) {
  if (row >= end) return;
  const char* next = row_address(m, row);
  const int64_t bytes = width * dtype_size(m.dtype);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i);
}

}  // namespace
}  // namespace mfd::MFD_ISA
