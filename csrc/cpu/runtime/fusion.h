// Spreads the fusion kernels over threads. Every result is bitwise the same for any number of threads.
#pragma once

#include <vector>

#include "cpu/runtime/kernels.h"

namespace mfd {

void pool_forward(const PoolForward& f, int threads);
void pool_backward(const PoolBackward& g, int threads);

// Sum over taps of factor * the rows' distances, in a fixed order: factor = weight, divided by the number of
// existing rows ("mean") or times the width of mse and smooth_l1 ("sum"). The gradients' upstream is that
// factor, or grad_rows where `per_row`.
double tap_rows(std::vector<Tap>& taps, FeatureKind kind, bool is_double, bool per_row, bool mean,
                int threads);

// Every element is a sum in a fixed order, for any number of threads.
void product(const Product& p, int threads);
// The same of pairs of bfloat16 numbers; only where product_of_pairs() is there.
void pair_product(const Product& p, int threads);

// The rows of mfd_loss once its logits (problem.student) are known. `grad` may be the logits themselves.
struct MfdRows {
  RowProblem problem;
  bool use_soft, use_hard;
  RowScalar weight;
  double soft_factor, hard_factor, feature_factor, pool_factor;
  double divisor;  // of every sum but the hard term's
  double hard_divisor;
  const FeatureRow* feature;  // [N], null where the term is not used
  const double* pool_kl;      // [N], null where the term is not used
  void *soft, *hard;          // [N] room in the compute dtype
  void* grad;                 // [N, C] gradient of the loss to the logits; null when not wanted
  bool stream;
  int64_t* predictions;  // [N] first argmax of the logits, -1 on rows that are not counted
};

struct MfdSums {
  double loss, soft, hard, feature;
};

MfdSums mfd_rows(const MfdRows& m, int threads);

}  // namespace mfd
