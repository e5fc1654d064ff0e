// Plain data of the fusion kernels: attention over modalities and feature matching. Strides in elements.
#pragma once

#include "common/problems/rows.h"

namespace mfd {

constexpr int kMaxModalities = 32;

// Rows of a matrix with a dense last dimension: row i starts at element
// (i / inner)*outer_stride + (i % inner)*row_stride.
struct RowMatrix {
  const void* data;  // null: not there
  Dtype dtype;
  int64_t inner, outer_stride, row_stride;
};

// s_m = scale*<query, x_m> or scores[m], + bias[m]; a = softmax(s/temperature) over the present modalities.
// Pointers without a dtype of their own are contiguous in the compute dtype and may be null.
struct PoolProblem {
  int64_t n_rows, width;
  int modalities;
  bool is_double;
  RowMatrix features[kMaxModalities];  // [N, width] each
  const void* query;                   // [width]
  const void* scores;                  // [N, M]
  const void* bias;                    // [M]
  RowScalar temperature;
  double scale;
  const unsigned char* present;  // [N, M]
  const RowProblem* rows;        // rows it does not count have no modalities; null: all count
};

// Dtypes of the vectors, where they are not the compute dtype.
struct PoolTypes {
  Dtype query, scores, bias;
};

enum FeatureKind : int { kMse = 0, kSmoothL1 = 1, kCosine = 2 };

// Distance of one row pair (s, t), and what its gradient needs:
//   mse, smooth_l1: d/ds = a*h'(s - t);  cosine: d/ds = a*t + b*s, d/dt = a*s + c*t.
// Where the squares of s or t leave the range of their type, this is of 2^of_student*s and 2^of_teacher*t:
// their gradients times these powers are those of s and t.
struct FeatureRow {
  double value, a, b, c;
  int of_student, of_teacher;
};

struct PoolForward {
  const PoolProblem* pool;
  void* pooled;  // [N, width]
  Dtype pooled_dtype;
  void* weights;  // [N, M]
  bool stream;
  // Beside the pooled row: its distance to a target [N, width], and KL(pool_target || weights).
  RowMatrix target;
  FeatureKind kind;
  FeatureRow* feature;      // [N], null without target
  const void* pool_target;  // [N, M]
  double* pool_kl;          // [N], null without pool_target
};

struct PoolBackward {
  const PoolProblem* pool;
  const void* weights;  // [N, M]
  RowMatrix d_pooled;   // [N, width]
  const void* d_weights;
  void* d_features[kMaxModalities];  // the features' dtypes; row i at element i*d_row_stride
  int64_t d_row_stride;
  bool stream;
  // Sums over the rows; null where they are not wanted.
  void *d_query, *d_bias, *d_temperature;  // [width], [M], [1]
  void *d_scores, *d_row_temperature;      // [N, M], [N]
  // The terms of PoolForward in the loss, times weight[row].
  const void* pooled;  // [N, width]
  RowMatrix target;
  FeatureKind kind;
  const FeatureRow* feature;
  double feature_factor;
  const void* pool_target;
  double pool_factor;
  RowScalar weight;
  // Column sums of a matrix [N, classes] on the way: the gradient of a head's bias.
  const void* d_logits;
  int64_t classes;
  void* d_head_bias;  // [classes]
};

// Rows whose gradients are added up before they join a larger sum: short sums round less.
constexpr int64_t kSumRows = 32;

// One pair of features, [N, width] each.
struct Tap {
  int64_t n_rows, width;
  RowMatrix student, teacher;
  const unsigned char* mask;
  double weight;
  RowScalar grad_rows;          // upstream of `distances`, or one factor for all rows
  void *d_student, *d_teacher;  // the features' dtypes, contiguous; null when not wanted
  void* distances;              // [N] compute dtype; null when not wanted
  bool stream;
};

}  // namespace mfd
