// Products of matrices: tiles of rows by three vectors of columns in registers, over panels of b that stay in
// the L1 cache.
#pragma once

#include "cpu/runtime/kernels.h"
#include "cpu/simd/row_ends.h"

namespace mfd::MFD_ISA {
namespace {

constexpr int kTileRows = kLanes == 16 ? 8 : 4, kTileColumns = 3 * kLanes;

// Products that are summed one by one: short sums round less.
constexpr int64_t kTileDepth = 96;

// What one float of each operand stands for: a number,
struct Single {
  MFD_INLINE VecF splat(const float* a) { return F32::splat(*a); }
  MFD_INLINE VecF add_product(VecF a, VecF b, VecF sum) { return F32::fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
// or two bfloat16 numbers that follow each other along the depth: sum + a0*b0 + a1*b1.
struct BFloat16Pair {
  MFD_INLINE VecF splat(const float* a) {
    int32_t bits;
    __builtin_memcpy(&bits, a, 4);
    return (VecF)_mm512_set1_epi32(bits);
  }
  MFD_INLINE VecF add_product(VecF a, VecF b, VecF sum) {
    return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// A block of b: columns [column, column + width) of rows [start, start + depth), the missing columns 0.
struct Panel {
  int64_t column, width, start, depth;
  const float* b;  // [depth, kTileColumns]
};

// out[i, :] = sum_k a[i, k]*b[k, :] + bias over the panel's rows, added to what is there from the second
// block of rows on.
template <class Element, int kRows, int kVectors>
static void product_tile(const Product& p, const Panel& panel, int64_t row) {
  const float* a = p.a + row * p.a_row + panel.start * p.a_depth;
  VecF acc[kRows][kVectors] = {};
  for (int64_t k = 0; k < panel.depth; ++k) {
    VecF right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = F32::load(panel.b + k * kTileColumns + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const VecF one = Element::splat(a + r * p.a_row + k * p.a_depth);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Element::add_product(one, right[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t column = panel.column + v * kLanes, left = panel.width - v * kLanes;
      float* out = p.out + (row + r) * p.columns + column;
      VecF sum = acc[r][v];
      if (panel.start) sum = sum + load_upto<F32>(out, left);
      if (p.bias && !panel.start) sum = sum + load_upto<F32>(p.bias + column, left);
      store_upto<F32>(out, sum, left);
    }
}

template <class Element, int kRows, int kVectors>
static void product_rows(const Product& p, const Panel& panel, int64_t row, int64_t end) {
  for (; row + kRows <= end; row += kRows) product_tile<Element, kRows, kVectors>(p, panel, row);
  if constexpr (kRows > 1) product_rows<Element, kRows / 2, kVectors>(p, panel, row, end);
}

// to[k, c] = from[c, k] of a block [columns, depth] with rows `stride` apart.
static void transpose(const float* from, int64_t stride, int64_t columns, int64_t depth, float* to) {
  int64_t c = 0;
#if defined(__SSE2__)
  for (; c + 4 <= columns; c += 4) {
    const float* x = from + c * stride;
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4) {
      __m128 r0 = _mm_loadu_ps(x + k), r1 = _mm_loadu_ps(x + stride + k),
             r2 = _mm_loadu_ps(x + 2 * stride + k), r3 = _mm_loadu_ps(x + 3 * stride + k);
      _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
      _mm_storeu_ps(to + k * kTileColumns + c, r0);
      _mm_storeu_ps(to + (k + 1) * kTileColumns + c, r1);
      _mm_storeu_ps(to + (k + 2) * kTileColumns + c, r2);
      _mm_storeu_ps(to + (k + 3) * kTileColumns + c, r3);
    }
    for (; k < depth; ++k)
      for (int64_t i = 0; i < 4; ++i) to[k * kTileColumns + c + i] = x[i * stride + k];
  }
#endif
  for (; c < columns; ++c)
    for (int64_t k = 0; k < depth; ++k) to[k * kTileColumns + c] = from[c * stride + k];
}

static void copy_panel(const Product& p, const Panel& panel, float* to) {
  const float* from = p.b + panel.start * p.b_depth + panel.column * p.b_column;
  if (p.b_column == 1) {
    for (int64_t k = 0; k < panel.depth; ++k)
      for (int64_t i = 0; i < kTileColumns; i += kLanes) {
        const int64_t left = panel.width - i;
        F32::store(to + k * kTileColumns + i,
                   left > 0 ? load_upto<F32>(from + k * p.b_depth + i, left) : VecF{});
      }
    return;
  }
  transpose(from, p.b_column, panel.width, panel.depth, to);
  for (int64_t k = 0; k < panel.depth; ++k)
    for (int64_t i = panel.width; i < kTileColumns; ++i) to[k * kTileColumns + i] = 0;
}

// Rows [begin, end) of the columns from `column`, a multiple of kTileColumns, to the next multiple.
template <class Element>
static void product_of(const Product& p, int64_t begin, int64_t end, int64_t column) {
  alignas(64) float copy[kTileDepth * kTileColumns];
  const int64_t width = p.columns - column < kTileColumns ? p.columns - column : kTileColumns;
  for (int64_t start = 0; start == 0 || start < p.depth; start += kTileDepth) {
    const int64_t depth = p.depth - start < kTileDepth ? p.depth - start : kTileDepth;
    const Panel panel = {column, width, start, depth, copy};
    copy_panel(p, panel, copy);
    if (width > 2 * kLanes) {
      product_rows<Element, kTileRows, 3>(p, panel, begin, end);
    } else if (width > kLanes) {
      product_rows<Element, kTileRows, 2>(p, panel, begin, end);
    } else {
      product_rows<Element, kTileRows, 1>(p, panel, begin, end);
    }
  }
}

}  // namespace
}  // namespace mfd::MFD_ISA
