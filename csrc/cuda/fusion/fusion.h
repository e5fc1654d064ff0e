// Launchers of the fusion kernels. Nothing here waits for the device; every address is one of the device's.
#pragma once

#include "common/problems/fusion.h"
#include "cuda/distill/distill.h"

namespace mfd {
namespace cuda {

// How the device shares the rows of a pool.
struct PoolPlan {
  bool lean;           // the kernels of one dtype
  bool parked, whole;  // in shared memory; a block per row
  int threads;         // per block
  int64_t blocks;
};

// `backward` shares the rows so that few partial sums have to be added up; then d_pooled's dtype counts too.
PoolPlan pool_plan(const PoolProblem& pool, const PoolTypes& types, bool backward, Dtype d_pooled,
                   int device);

// Of PoolForward only what modal_pool itself needs is used: pool, pooled, pooled_dtype, weights.
void pool_forward(const PoolForward& f, const PoolTypes& types, const Where& where);

// Partial sums of each of the plan's blocks: [blocks, width] in the compute dtype where d_query is wanted,
// and [blocks, M + 1] where d_bias or d_temperature is. Of PoolBackward what modal_pool itself needs is used;
// d_query, d_scores and d_bias are written in the dtypes of `types`.
struct PoolPartials {
  void* query;
  double* shared;
};
void pool_backward(const PoolBackward& g, const PoolTypes& types, const PoolPartials& partials,
                   const Where& where);

// Taps that have rows.
struct FeatureTaps {
  const Tap* taps;
  const void* const* weights;    // of each tap, in device memory; null where tap.weight holds it
  const int64_t* const* counts;  // of each tap, how many rows exist; null where blocks count for themselves
  int64_t count;
  FeatureKind kind;
  bool is_double;
};

struct FeatureScalarLoss {
  bool mean;
  ScalarWorkspace* workspace;  // its `counts` are not used
  void* loss;                  // 0-d, compute dtype
};

// With `loss` the weighted loss and its gradients, else distances, or gradients of the rows times grad_rows:
// in one launch for every 16 taps.
void match_taps(const FeatureTaps& taps, const FeatureScalarLoss* loss, const Where& where);

// Each gradient of n elements *= *factor, of the dtype `factor_dtype`; nothing is touched where the factor
// is 1. One launch for every 64.
struct Scaled {
  void* grad;
  Dtype dtype;
  int64_t n;
};
void scale_all(const Scaled* gradients, int64_t count, const void* factor, Dtype factor_dtype,
               const Where& where);

}  // namespace cuda
}  // namespace mfd
