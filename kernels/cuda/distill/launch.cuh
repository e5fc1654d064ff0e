// What the row kernels get beside the problem, and the scalars that a grid has in common: the divisor of a
// mean, and the loss.
#pragma once

#include "common/rows/row_math.h"
#include "cuda/rows/group.cuh"
#include "cuda/rows/scalar.cuh"

namespace mfd {
namespace device {

// Threads of a block, at most, and blocks of the lean kernels that share a processor, at least. Lean kernels
// thus have 128 registers, those of a warp per row 168.
template <class Group>
struct Residency {
  static constexpr int kThreads = 256, kLeanBlocks = 2;
};
template <>
struct Residency<Warp> {
  static constexpr int kThreads = 128, kLeanBlocks = 3;
};

struct ForwardLaunch {
  Forward forward;  // its factors and row_loss are not used
  Scalar soft_weight, hard_weight;
  // loss = sum of the rows / divisor; with `count_rows` the number of counted rows, at least 1, from `counts`
  // or, where that is null, counted by each block for itself. Where ignored rows count the hard term has its
  // own count, of the labels.
  Scalar divisor;
  bool count_rows;
  const int64_t* counts;
  int n_counts;
  // Loss: one partial sum per group; the block that takes the last ticket adds them up and resets the ticket.
  double* partial;
  unsigned* ticket;
  void* loss;
  // Dynamic shared memory, in bytes: the groups' states, their parked rows and, in those, the teacher's row.
  int states_at, parking_at, parking_bytes, teacher_at;
};

struct Factors {
  double soft, hard;
};

template <class T>
MFD_DEVICE double value_of(const Scalar& scalar) {
  return scalar.address ? static_cast<double>(*static_cast<const T*>(scalar.address)) : scalar.value;
}

// Sum over the block, in a fixed order; needs no shared memory of its own that outlives the call.
template <class Op>
MFD_DEVICE double over_block(double value, double* of_warp) {
  value = over_warp<Op>(value);
  if (lane_of() == 0) of_warp[warp_of()] = value;
  __syncthreads();
  const int warps = static_cast<int>(blockDim.x) / 32;
  value = over_warp<Op>(lane_of() < warps ? of_warp[lane_of()] : Op::identity());
  __syncthreads();
  return value;
}

// What the terms' sums are divided by.
struct Divisors {
  double soft, hard;
};

// The number that all threads of a block have counted, at least 1.
MFD_DEVICE double over_block_count(int64_t counted, double* scratch) {
  const double total = over_block<Sum>(static_cast<double>(counted), scratch);
  return total < 1 ? 1.0 : total;
}

// Uses the shared memory of the states.
template <class T>
MFD_DEVICE Divisors find_divisors(const ForwardLaunch& launch) {
  const RowProblem& p = launch.forward.problem;
  const double divisor = value_of<T>(launch.divisor);
  if (!launch.count_rows) return {divisor, divisor};
  int64_t counted = 0, labelled = 0;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  if (launch.counts) {
    for (int k = thread; k < launch.n_counts; k += threads) {
      counted += launch.counts[k];
      labelled += launch.counts[launch.n_counts + k];
    }
  } else {
    // Loads of several rows are on their way together.
    constexpr int kBatch = 8;
    for (int64_t row = thread; row < p.n_rows; row += kBatch * threads) {
      int64_t labels[kBatch];
      bool on[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int64_t at = row + k * threads;
        on[k] = at < p.n_rows && (!p.mask || p.mask[at]);
        labels[k] = p.labels && at < p.n_rows ? p.labels[at] : p.ignore_index + 1;
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const bool labels_it = labels[k] != p.ignore_index;
        counted += on[k] && (p.keeps_ignored || labels_it);
        labelled += on[k] && labels_it && p.labels;
      }
    }
  }
  double* scratch = reinterpret_cast<double*>(dynamic_shared() + launch.states_at);
  const double soft = over_block_count(counted, scratch);
  return {soft, p.keeps_ignored ? over_block_count(labelled, scratch) : soft};
}

// The weights of the two terms, divided.
template <class T>
MFD_DEVICE Factors find_factors(const ForwardLaunch& launch) {
  const Divisors by = find_divisors<T>(launch);
  return {value_of<T>(launch.soft_weight) / by.soft, value_of<T>(launch.hard_weight) / by.hard};
}

// This thread's part of the sum of what all blocks have written; loads of several are on their way together.
MFD_DEVICE double sum_of_partials(const double* partial, int64_t count) {
  constexpr int kBatch = 8;
  const int64_t step = blockDim.x;
  double sum = 0;
  for (int64_t k = threadIdx.x; k < count; k += kBatch * step) {
    double of[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      of[i] = k + i * step < count ? load_shared_by_all(partial + k + i * step) : 0.0;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) sum += of[i];
  }
  return sum;
}

// The last block to arrive adds up the partial losses in their order.
template <class T>
MFD_DEVICE void finish_loss(const ForwardLaunch& launch, int64_t partials) {
  double* scratch = reinterpret_cast<double*>(dynamic_shared() + launch.states_at);
  unsigned* last = reinterpret_cast<unsigned*>(scratch + 32);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *last = atomicAdd(launch.ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!*last) return;
  __threadfence();
  const double sum = over_block<Sum>(sum_of_partials(launch.partial, partials), scratch);
  if (threadIdx.x == 0) {
    *static_cast<T*>(launch.loss) = static_cast<T>(sum);
    *launch.ticket = 0;
  }
}

// Partial counts of the counted rows, one per block, and of those that have a label behind them.
template <int kUnused = 0>
__global__ void count_rows(const __grid_constant__ RowProblem p, int64_t* counts) {
  double* scratch = reinterpret_cast<double*>(dynamic_shared());
  int64_t counted = 0, labelled = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; row < p.n_rows;
       row += step) {
    counted += is_counted(p, row);
    labelled += is_counted(p, row) && is_labelled(p, row);
  }
  const double total = over_block<Sum>(static_cast<double>(counted), scratch);
  const double of_labels = over_block<Sum>(static_cast<double>(labelled), scratch);
  if (threadIdx.x != 0) return;
  counts[blockIdx.x] = static_cast<int64_t>(total);
  counts[gridDim.x + blockIdx.x] = static_cast<int64_t>(of_labels);
}

}  // namespace device
}  // namespace mfd
