// Products of 16 rows, parked in shared memory, with a matrix in device memory that a block reads once. A
// warp has 64 columns of the result at a time; no two warps need the same element of the matrix, so it goes
// from the L2 cache straight into their registers, 16 bytes at a time.
#pragma once

#include "cuda/rows/rows.cuh"

namespace mfd {
namespace device {

constexpr int kTileRows = 16, kTileColumns = 64, kTileDepth = 32;

// Rows of float32, with zeros up to the next multiple of kTileDepth. The lanes of a load from eight rows hit
// different banks.
struct Parked {
  float* data;
  int stride;
};

MFD_INLINE void load_floats(const float* p, float (&x)[8]) {
  load_wide(reinterpret_cast<const unsigned char*>(p), Dtype::kFloat32, x);
}
MFD_INLINE void store_floats(float* p, const float (&x)[8]) {
  store_wide(reinterpret_cast<unsigned char*>(p), Dtype::kFloat32, x);
}

MFD_HOST_DEVICE inline int parked_stride(int64_t width) {
  return static_cast<int>((width + kTileDepth - 1) / kTileDepth * kTileDepth) + 4;
}

// A matrix of bfloat16 or float32, the weight of a linear layer: its rows begin on 16 bytes and have zeros up
// to the next multiple of 8 columns, of which `columns` is one.
struct Head {
  const void* data;
  int64_t stride;
  int rows, columns;
};

// c += a b of fragments of mma.m16n8k16 (PTX ISA). With g = lane/4 and t = lane%4 a thread has of a the rows
// g and g + 8 at the depths 2t, 2t + 1 (a[0], a[1]) and 2t + 8, 2t + 9 (a[2], a[3]), of b the column g at the
// same depths, of c the rows g (c[0], c[1]) and g + 8 at the columns 2t and 2t + 1.
#if defined(MFD_CUDA_EMULATOR)
MFD_DEVICE void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto from = [](uint32_t low, uint32_t high, int lane, float* at_0, float* at_1) {
    const uint64_t both = __shfl_sync(kAllLanes, low | static_cast<uint64_t>(high) << 32, lane);
    unpack(static_cast<uint32_t>(both), true, at_0);
    unpack(static_cast<uint32_t>(both >> 32), true, at_1);
  };
  const int group = lane_of() / 4, own = lane_of() % 4;
  float rows[2][16], columns[2][16];
  for (int t = 0; t < 4; ++t) {
    from(a[0], a[1], 4 * group + t, rows[0] + 2 * t, rows[1] + 2 * t);
    from(a[2], a[3], 4 * group + t, rows[0] + 2 * t + 8, rows[1] + 2 * t + 8);
    for (int n = 0; n < 2; ++n)
      from(b0, b1, 4 * (2 * own + n) + t, columns[n] + 2 * t, columns[n] + 2 * t + 8);
  }
  for (int r = 0; r < 2; ++r)
    for (int n = 0; n < 2; ++n)
      for (int k = 0; k < 16; ++k) c[2 * r + n] = F32::fma(rows[r][k], columns[n][k], c[2 * r + n]);
}
#else
MFD_DEVICE void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// A warp's tile of the result, as the fragments have it: with g and t as above sums[j][2r + h] is the element
// of row g + 8r in column 16t + 8h + j. So each thread has eight neighbouring columns four times.
struct Tile {
  float sums[8][4];
};

// The tile by tensor cores, from bfloat16 and float32 rounded to it. The order of the depths is free: a
// thread takes those from 8t, which lie in one load of 16 bytes, for the ones that the fragments name.
struct TensorProduct {
  static constexpr int kBlockSteps = 0;

  // Eight elements of a row, 0 outside the matrix.
  static MFD_DEVICE uint4 load_words(const Head& head, int row, int column) {
    const uint16_t* p = static_cast<const uint16_t*>(head.data) + row * head.stride + column;
    uint4 words = {0, 0, 0, 0};
    if (row < head.rows && column < head.columns) words = *reinterpret_cast<const uint4*>(p);
    return words;
  }

  // Element j of two vectors.
  static MFD_DEVICE uint32_t pair_of(const uint4& a, const uint4& b, int j) {
    const uint32_t low = j / 2 == 0 ? a.x : j / 2 == 1 ? a.y : j / 2 == 2 ? a.z : a.w;
    const uint32_t high = j / 2 == 0 ? b.x : j / 2 == 1 ? b.y : j / 2 == 2 ? b.z : b.w;
    return j % 2 ? (low >> 16 | (high & 0xffff0000u)) : ((low & 0xffffu) | high << 16);
  }

  // kColumns: the matrix holds the right side's columns as its rows.
  template <bool kColumns>
  static MFD_DEVICE void load(const Head& head, int first, int step, uint4 (&words)[8]) {
    const int group = lane_of() / 4, own = lane_of() % 4;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const int column = first + 8 * group, depth = step * kTileDepth + 8 * own;
      words[k] = kColumns ? load_words(head, column + k, depth) : load_words(head, depth + k, column);
    }
  }

  template <bool kColumns>
  static MFD_DEVICE void add(Tile& tile, const Parked& left, const Head& head, int first, int begin,
                             int end) {
    const float* upper = left.data + lane_of() / 4 * left.stride + 8 * (lane_of() % 4);
    const float* lower = upper + 8 * left.stride;
    uint4 next[8];
    load<kColumns>(head, first, begin, next);
#pragma unroll 1
    for (int step = begin; step < end; ++step) {
      uint4 words[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) words[k] = next[k];
      if (step + 1 < end) load<kColumns>(head, first, step + 1, next);
      float u[8], l[8];
      load_floats(upper + step * kTileDepth, u);
      load_floats(lower + step * kTileDepth, l);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float *x = u + 4 * half, *y = l + 4 * half;
        const uint32_t a[4] = {pack(true, x), pack(true, y), pack(true, x + 2), pack(true, y + 2)};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (kColumns) {
            multiply_fragments(tile.sums[j], a, half ? words[j].z : words[j].x,
                               half ? words[j].w : words[j].y);
          } else {
            const uint4* w = words + 4 * half;
            multiply_fragments(tile.sums[j], a, pair_of(w[0], w[1], j), pair_of(w[2], w[3], j));
          }
        }
      }
    }
  }
};

// The tile by exact products of float32.
struct ExactProduct {
  static constexpr int kBlockSteps = 3;

  // Four elements of a row, 0 outside the matrix.
  static MFD_DEVICE void load_values(const Head& head, int row, int column, float (&x)[4]) {
    const float* p = static_cast<const float*>(head.data) + row * head.stride + column;
    uint4 words = {0, 0, 0, 0};
    if (row < head.rows && column < head.columns) words = *reinterpret_cast<const uint4*>(p);
    x[0] = bits_as<float>(words.x), x[1] = bits_as<float>(words.y), x[2] = bits_as<float>(words.z),
    x[3] = bits_as<float>(words.w);
  }

  template <bool kColumns>
  static MFD_DEVICE void add(Tile& tile, const Parked& left, const Head& head, int first, int begin,
                             int end) {
    const float* upper = left.data + lane_of() / 4 * left.stride;
    const float* lower = upper + 8 * left.stride;
    const int column = first + 16 * (lane_of() % 4);
#pragma unroll 1
    for (int depth = begin * kTileDepth; depth < end * kTileDepth; depth += 4) {
      float u[4], l[4], x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        u[i] = upper[depth + i];
        l[i] = lower[depth + i];
      }
      // Sixteen columns of four depths each, or four depths of sixteen columns.
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        if (kColumns) {
          load_values(head, column + k, depth, x);
        } else {
          load_values(head, depth + k / 4, column + 4 * (k % 4), x);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = kColumns ? i : k / 4, own = kColumns ? k : 4 * (k % 4) + i;
          float (&sums)[4] = tile.sums[own % 8];
          sums[own / 8] = F32::fma(u[at], x[i], sums[own / 8]);
          sums[2 + own / 8] = F32::fma(l[at], x[i], sums[2 + own / 8]);
        }
      }
    }
  }
};

// The tile that begins at column `first`, summed over the steps [begin, end) of the depth; blocks of
// kBlockSteps are summed one by one, for short sums round less.
template <class Product, bool kColumns>
MFD_INLINE void find_tile(Tile& total, const Parked& left, const Head& head, int first, int begin, int end) {
  if constexpr (Product::kBlockSteps == 0) {
    Product::template add<kColumns>(total, left, head, first, begin, end);
  } else {
#pragma unroll 1
    for (int step = begin; step < end; step += Product::kBlockSteps) {
      const int last = step + Product::kBlockSteps;
      Tile block = {};
      Product::template add<kColumns>(block, left, head, first, step, last < end ? last : end);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) total.sums[j][k] = total.sums[j][k] + block.sums[j][k];
      }
    }
  }
}

// put(row, column, x, add) for every eight columns of left x right, by one thread each: `add` asks to add x
// to what an earlier call has put there. The right side is the matrix, or with kColumns its transpose. Where
// there are fewer tiles than warps, several warps share a tile's depth and put their parts one after the
// other. The whole block calls this, after a barrier; there is one at the end.
template <class Product, bool kColumns, class Put>
MFD_INLINE void multiply(const Parked& left, const Head& head, const Put& put) {
  const int columns = kColumns ? head.rows : head.columns, depth = kColumns ? head.columns : head.rows;
  const int tiles = (columns + kTileColumns - 1) / kTileColumns,
            steps = (depth + kTileDepth - 1) / kTileDepth;
  const int warps = static_cast<int>(blockDim.x) / 32;
  int parts = tiles < warps ? warps / tiles : 1;
  if (parts > steps) parts = steps;
  const int each = (steps + parts - 1) / parts, at_a_time = warps / parts;
  const int part = warp_of() % parts, begin = part * each;
  const int end = begin + each < steps ? begin + each : steps;
  const int row = lane_of() / 4, own = 16 * (lane_of() % 4);
#pragma unroll 1
  for (int start = 0; start < tiles; start += at_a_time) {
    const int mine = warp_of() / parts, first = (start + mine) * kTileColumns;
    const bool works = mine < at_a_time && start + mine < tiles;
    Tile tile = {};
    if (works) find_tile<Product, kColumns>(tile, left, head, first, begin, end);
    for (int turn = 0; turn < parts; ++turn) {
      if (works && turn == part) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          float x[8];
#pragma unroll
          for (int j = 0; j < 8; ++j) x[j] = tile.sums[j][k];
          const int column = first + own + 8 * (k % 2);
          if (column < columns) put(row + 8 * (k / 2), column, x, turn > 0);
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace device
}  // namespace mfd
