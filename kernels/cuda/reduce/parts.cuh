// The parts of a loss from what its launch has left of every row: both terms and both entropies, summed over
// the rows with their weights in a fixed order, and divided.
#pragma once

#include "cuda/distill/launch.cuh"
#include "cuda/reduce/kinds.cuh"

namespace mfd {
namespace device {

struct PartsLaunch {
  RowProblem problem;        // of which the logits are not read
  const void* rows[kParts];  // [N] in the compute dtype; null for zeros
  RowScalar weight;
  Scalar divisor, hard_divisor;  // where `count_rows` is not set
  bool count_rows;
  // [kPartSums, blocks]; the block that takes the last ticket adds them up and resets the ticket.
  double* partial;
  unsigned* ticket;
  void* parts;  // [kParts]
};

template <class T>
__global__ void __launch_bounds__(256) reduce_parts(const __grid_constant__ PartsLaunch launch) {
  double* scratch = reinterpret_cast<double*>(dynamic_shared());
  unsigned* last = reinterpret_cast<unsigned*>(scratch + 32);
  const RowProblem& p = launch.problem;
  const int64_t blocks = gridDim.x, threads = blockDim.x;
  double sums[kPartSums] = {};
  for (int64_t row = blockIdx.x * threads + threadIdx.x; row < p.n_rows; row += blocks * threads) {
    if (!is_counted(p, row)) continue;
    const double weight = at<T>(launch.weight, row);
#pragma unroll
    for (int k = 0; k < kParts; ++k)
      if (launch.rows[k]) sums[k] += weight * static_cast<double>(static_cast<const T*>(launch.rows[k])[row]);
    sums[kParts] += 1;
    sums[kParts + 1] += is_labelled(p, row);
  }
#pragma unroll
  for (int k = 0; k < kPartSums; ++k) {
    const double sum = over_block<Sum>(sums[k], scratch);
    if (threadIdx.x == 0) launch.partial[k * blocks + blockIdx.x] = sum;
  }
  if (threadIdx.x == 0) {
    __threadfence();
    *last = atomicAdd(launch.ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!*last) return;
  __threadfence();
#pragma unroll
  for (int k = 0; k < kPartSums; ++k) {
    double sum = 0;
    for (int64_t block = threadIdx.x; block < blocks; block += threads)
      sum += reinterpret_cast<const volatile double*>(launch.partial)[k * blocks + block];
    sums[k] = over_block<Sum>(sum, scratch);
  }
  if (threadIdx.x != 0) return;
  double soft = value_of<T>(launch.divisor), hard = value_of<T>(launch.hard_divisor);
  if (launch.count_rows) {
    soft = sums[kParts] < 1 ? 1.0 : sums[kParts];
    hard = !p.keeps_ignored ? soft : sums[kParts + 1] < 1 ? 1.0 : sums[kParts + 1];
  }
#pragma unroll
  for (int k = 0; k < kParts; ++k)
    static_cast<T*>(launch.parts)[k] = static_cast<T>(sums[k] / (k == 1 ? hard : soft));
  *launch.ticket = 0;
}

}  // namespace device
}  // namespace mfd
