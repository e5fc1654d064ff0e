// Launchers of the row kernels. Nothing here waits for the device; every address is one of the device's.
#pragma once

#include "common/problems/rows.h"
#include "cuda/rows/scalar.cuh"
#include "cuda/rows/teachers.cuh"

namespace mfd {
namespace cuda {

// Device number and cudaStream_t of the caller.
struct Where {
  int device;
  void* stream;
};

// How the threads of the device share rows of one kind.
enum class Rung : int { kWarp = 0, kBlock = 1, kCluster = 2, kStream = 3 };

struct Plan {
  Rung rung;
  int cluster;  // blocks per row
  int threads;  // per block
};

// Groups of threads in one grid, at most.
constexpr int64_t kMaxGroups = 8192;

// Scratch memory of the scalar loss, for one launch at a time: zeros at first; the ticket is 0 again after
// each.
struct ScalarWorkspace {
  double partial[kMaxGroups];
  int64_t counts[256];  // of at most 128 blocks: rows, then labels
  unsigned ticket;
};

struct ScalarLoss {
  Scalar soft_weight, hard_weight, divisor;
  bool count_rows;  // the divisor is the number of counted rows
  ScalarWorkspace* workspace;
  void* loss;  // 0-d, compute dtype
};

Plan plan_of(const RowProblem& problem, bool use_soft, int device);

// `scalar` is null for per-row outputs.
void forward(const Forward& f, const ScalarLoss* scalar, const Where& where);

void backward(const Backward& g, const Where& where);

// The same of several teachers, RowProblem::mixture; `scratch` is that many bytes of device memory.
int64_t mixture_scratch(const RowProblem& problem, bool backward, int device);
void mixture_forward(const Forward& f, const ScalarLoss* scalar, void* scratch, const Where& where);
void mixture_backward(const Backward& g, void* scratch, const Where& where);

// Of a sparse teacher: the terms, the scalar loss, or any of the gradients, always from the logits.
Plan topk_plan(const RowProblem& problem, const TopK& topk, int device);
int64_t topk_scratch(const RowProblem& problem, const TopK& topk, int device);
void topk_rows(const TopKPass& pass, const ScalarLoss* scalar, void* scratch, const Where& where);

// grad *= *factor, of the dtype `factor_dtype`; nothing is touched where the factor is 1.
void scale_in_place(void* grad, Dtype dtype, int64_t n, const void* factor, Dtype factor_dtype,
                    const Where& where);

}  // namespace cuda
}  // namespace mfd
