// The threads that share a row: a warp, a block, or the blocks of a cluster; and their reductions. All
// threads of a group call every member together and receive the same result, in a fixed order of the
// additions.
#pragma once

#include "common/rows/row_math.h"
#include "cuda/rows/device.cuh"

namespace mfd {
namespace device {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxReduced = 10;  // values in one reduction

struct Sum {
  static MFD_DEVICE double identity() { return 0.0; }
  static MFD_DEVICE double of(double a, double b) { return a + b; }
};
// NaN counts as nothing.
struct Max {
  static MFD_DEVICE double identity() { return -kInf; }
  static MFD_DEVICE double of(double a, double b) { return fmax(a, b); }
};

template <class Op>
MFD_DEVICE double over_warp(double value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value = Op::of(value, __shfl_xor_sync(kAllLanes, value, lanes));
  return value;
}

MFD_DEVICE int lane_of() {
  return static_cast<int>(threadIdx.x) & 31;
}
MFD_DEVICE int warp_of() {
  return static_cast<int>(threadIdx.x) >> 5;
}

// Groups hold `Shared` at the start of dynamic shared memory; what follows is free for rows.
struct Warp {
  struct Shared {};
  static constexpr bool kSplitsRows = false;
  MFD_DEVICE explicit Warp(Shared*) {}
  static MFD_DEVICE int rank() { return lane_of(); }
  static MFD_DEVICE int threads() { return 32; }
  static MFD_DEVICE void sync() { __syncwarp(); }
  // Groups of this block, and which of them this is.
  static MFD_DEVICE int in_block() { return static_cast<int>(blockDim.x) / 32; }
  static MFD_DEVICE int index_in_block() { return warp_of(); }
  static MFD_DEVICE unsigned part() { return 0; }
  static MFD_DEVICE unsigned parts() { return 1; }
  static MFD_DEVICE void leave() {}

  template <class Op, int K>
  MFD_DEVICE void reduce(double (&values)[K]) const {
#pragma unroll
    for (int k = 0; k < K; ++k) values[k] = over_warp<Op>(values[k]);
  }
};

struct ThreadBlock {
  struct Shared {
    double of_warp[kMaxReduced][32];
    double total[2][kMaxReduced];
  };
  static constexpr bool kSplitsRows = false;
  Shared* shared;

  MFD_DEVICE explicit ThreadBlock(Shared* s) : shared(s) {}
  static MFD_DEVICE int rank() { return static_cast<int>(threadIdx.x); }
  static MFD_DEVICE int threads() { return static_cast<int>(blockDim.x); }
  static MFD_DEVICE void sync() { __syncthreads(); }
  static MFD_DEVICE int in_block() { return 1; }
  static MFD_DEVICE int index_in_block() { return 0; }
  static MFD_DEVICE unsigned part() { return 0; }
  static MFD_DEVICE unsigned parts() { return 1; }
  static MFD_DEVICE void leave() {}

  // Leaves the block's results in `total`, not yet visible to other threads.
  template <class Op, int K>
  MFD_DEVICE void reduce_into(double (&values)[K], double* total) const {
    static_assert(K <= kMaxReduced, "scratch is sized for kMaxReduced");
    const int warps = threads() / 32;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const double value = over_warp<Op>(values[k]);
      if (lane_of() == 0) shared->of_warp[k][warp_of()] = value;
    }
    __syncthreads();
    for (int k = warp_of(); k < K; k += warps) {
      const double value = over_warp<Op>(lane_of() < warps ? shared->of_warp[k][lane_of()] : Op::identity());
      if (lane_of() == 0) total[k] = value;
    }
  }

  template <class Op, int K>
  MFD_DEVICE void reduce(double (&values)[K]) const {
    reduce_into<Op>(values, shared->total[0]);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) values[k] = shared->total[0][k];
  }
};

struct Cluster : ThreadBlock {
  static constexpr bool kSplitsRows = true;
  // Blocks may still read one `total` while the next is written.
  mutable int turn = 0;

  MFD_DEVICE explicit Cluster(Shared* s) : ThreadBlock(s) {}
  static MFD_DEVICE unsigned part() { return cluster_rank(); }
  static MFD_DEVICE unsigned parts() { return cluster_size(); }
  // No block may leave while others read its shared memory.
  static MFD_DEVICE void leave() { cluster_barrier(); }

  template <class Op, int K>
  MFD_DEVICE void reduce(double (&values)[K]) const {
    double* total = shared->total[turn];
    turn ^= 1;
    reduce_into<Op>(values, total);
    cluster_barrier();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      double value = load_from_peer(total + k, 0);
      for (unsigned r = 1; r < parts(); ++r) value = Op::of(value, load_from_peer(total + k, r));
      values[k] = value;
    }
  }
};

// A block, or a cluster where there is one, in the same kernel.
struct Blocks : Cluster {
  static constexpr bool kSplitsRows = false;

  MFD_DEVICE explicit Blocks(Shared* s) : Cluster(s) {}
  static MFD_DEVICE void leave() {
    if (parts() > 1) Cluster::leave();
  }

  template <class Op, int K>
  MFD_DEVICE void reduce(double (&values)[K]) const {
    if (parts() > 1) {
      Cluster::reduce<Op>(values);
    } else {
      ThreadBlock::reduce<Op>(values);
    }
  }
};

}  // namespace device
}  // namespace mfd
