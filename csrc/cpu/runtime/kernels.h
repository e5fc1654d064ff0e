// What an instruction set's kernels offer to those who spread rows over threads, and the memory they get.
#pragma once

#include "common/problems/fusion.h"
#include "common/problems/rows.h"

namespace mfd {

// Memory of one worker; sized for one row.
struct Scratch {
  // Padded rows of the compute dtype; exp_h, capped and difference may be null.
  void *exp_s, *exp_t, *exp_h, *capped, *difference;
  void *block_x, *block_y, *block_out, *to_u, *to_v;  // kBlock elements each
  BlockSums* sums;                                    // one per block, at least kBlock/kRowAlign
  void* mixture;                                      // log p of several teachers, padded; null for one
  TeacherRow* teachers;  // one per teacher, for each of the rows that share this scratch
  // For sparse teachers: arrays of the listed classes, kBlock elements each; the listed classes in the order
  // of their blocks, their positions, and where each block's begin.
  void* listed[7];
  int64_t *columns, *slots, *first;
};

// Sums of one chunk of rows.
struct PoolPartial {
  void *query, *query_block;  // [width]: the chunk's, and that of the last kSumRows rows
  void *logits, *logits_block;
  double* bias;  // [M]
  bool wants_temperature;
  double temperature;
};

// Memory of one worker: rows of the compute dtype.
struct FusionScratch {
  void* in[kMaxModalities];
  void* out[kMaxModalities];
  void *upstream, *target, *pooled;
};

// out[i, j] = sum_k a(i, k)*b(k, j) + bias[j], out [rows, columns] contiguous. Element (i, k) of a lies at
// i*a_row + k*a_depth, (k, j) of b at k*b_depth + j*b_column; b_column = 1 or b_depth = 1.
struct Product {
  int64_t rows, columns, depth;
  const float *a, *b, *bias;
  int64_t a_row, a_depth, b_depth, b_column;
  float* out;
};

// Rows [begin, end) of the columns from `column`, a multiple of the kernel's width, to the next multiple.
typedef void (*ProductKernel)(const Product&, int64_t begin, int64_t end, int64_t column);

// One instruction set's fusion kernels.
struct FusionKernels {
  void (*pool_forward)(const PoolForward&, int64_t begin, int64_t end, const FusionScratch&);
  void (*pool_backward)(const PoolBackward&, int64_t begin, int64_t end, const FusionScratch&, PoolPartial&);
  // out[i] = sum over chunks of parts[chunk*stride + i], in their order.
  void (*add_parts)(const void* parts, int64_t chunks, int64_t stride, int64_t n, bool is_double, void* out);
  void (*tap_rows)(const Tap&, FeatureKind kind, bool is_double, int64_t begin, int64_t end,
                   const FusionScratch&, double* values);
  // First index of each row's maximum, as torch.argmax; -1 on rows that are not counted.
  void (*predict)(const RowProblem&, int64_t begin, int64_t end, int64_t* out);
  int64_t (*product_columns)();
  ProductKernel product;
};

// One instruction set's kernels. Rows and blocks not covered by [begin, end) are left alone.
struct Kernels {
  const char* name;
  int lanes;
  void (*forward_rows)(const Forward&, int64_t begin, int64_t end, const Scratch&);
  // The same for one row whose blocks are shared between workers: sums, points and outputs, with barriers
  // between them.
  void (*forward_sums)(const Forward&, int64_t row, int64_t begin, int64_t end, const Scratch&);
  void (*forward_points)(const Forward&, int64_t row, int64_t begin, int64_t end, const Scratch&);
  void (*forward_outputs)(const Forward&, int64_t row, int64_t begin, int64_t end, const Scratch&);
  void (*backward_rows)(const Backward&, int64_t begin, int64_t end, const Scratch&);
  void (*topk_rows)(const TopKPass&, int64_t begin, int64_t end, const Scratch&);
  void (*add)(const float* a, const float* b, float* out, int64_t n);  // a streaming ceiling for benchmarks
  const FusionKernels* fusion;
};

}  // namespace mfd
