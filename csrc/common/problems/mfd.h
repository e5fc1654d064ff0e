// Plain data of the single pass of mfd_loss on a GPU. Strides in elements.
#pragma once

#include "common/problems/fusion.h"

namespace mfd {

// Rows of one block: the least that tensor cores take.
constexpr int kMfdRows = 16;
// Blocks whose partial sums are added up together.
constexpr int kMfdGroup = 16;
// loss, soft, hard, feature
constexpr int kMfdTerms = 4;

// Of `forward` what the terms of the logits need; the logits never leave the block. A RowScalar without a
// stride is one number for all rows. Arithmetic is float32.
struct MfdPass {
  Forward forward;
  RowScalar soft_weight, hard_weight, feature_weight, pool_weight, divisor;
  bool count_rows;  // the divisor is the number of counted rows, at least 1
  PoolProblem pool;
  PoolTypes types;
  RowMatrix target;  // [N, width]; null without the feature term
  FeatureKind kind;
  const float* pool_target;  // [N, M]; null without the pool term
  // [classes, width], float32 or bfloat16; its rows begin on 16 bytes and have zeros up to a multiple of 8
  // columns.
  const void* head;
  Dtype operand;  // the head's, y's and dz's
  int64_t head_stride;
  const void* head_bias;  // [classes]
  Dtype head_bias_dtype;
  float* weights;        // [N, M]
  int64_t* predictions;  // [N]
  // Gradients; null where they are not wanted.
  bool wants_logits, wants_pooled;   // d loss/d logits, d loss/d pooled
  void *y, *dz;                      // the operands of the head weight's gradient: [N, width], [N, dz_stride]
  int64_t dz_stride;                 // a multiple of 8
  void* d_features[kMaxModalities];  // the features' dtypes; row i at element i*d_row_stride
  int64_t d_row_stride;
  void *d_query, *d_bias, *d_head_bias;  // in the dtypes of their tensors
  float* terms[kMfdTerms];               // 0-d
  double* partial;                       // [blocks, kMfdTerms + elements of the last three]
  unsigned* tickets;                     // 1 + ceil(blocks/kMfdGroup) zeros; zeros again afterwards
};

}  // namespace mfd
