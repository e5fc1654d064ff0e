// feature_loss: any number of taps of unequal shapes in one launch; a warp or a block per row, by the width
// of the tap. kParked: both rows of a pair are copied to shared memory at once and read there twice; else the
// second reading finds them in the caches. A masked row is not read.
#pragma once

#include "cuda/distill/launch.cuh"
#include "cuda/features/rows.cuh"
#include "cuda/rows/team.cuh"

namespace mfd {
namespace device {

constexpr int kMaxTaps = 16;  // the kernel's parameters hold them: at most 4 KB

// The blocks [first_block, first_block + blocks) work on it.
struct FeatureTap {
  Tap tap;
  const void* weight;    // in the compute dtype, or null: tap.weight
  const int64_t* count;  // how many rows exist; null: each block counts the mask for itself
  bool whole;            // a block per row
  int first_block, blocks;
};

struct FeatureLaunch {
  FeatureTap taps[kMaxTaps];
  int count;
  FeatureKind kind;
  bool mean;
  int parking_at, group_bytes;  // dynamic shared memory, in bytes
  // The scalar loss, null for per-row outputs. Each block has a partial sum; the one that takes the last
  // ticket adds them up, to the loss of an earlier launch where `adds`, and resets the ticket.
  void* loss;
  bool adds;
  double* partial;
  unsigned* ticket;
};
static_assert(sizeof(FeatureLaunch) <= 4096, "kernels take 4 KB of parameters on every driver");

// How many bytes are not 0, of a mask whose bytes are 0 or 1.
MFD_INLINE double counted_rows(const Team& block, const unsigned char* mask, int64_t n) {
  const int64_t whole = is_aligned(mask) ? n & ~int64_t{15} : 0;
  double count[1] = {0};
  for (int64_t k = int64_t{block.rank()} * 16; k < whole; k += int64_t{block.threads()} * 16) {
    const uint4 w = *reinterpret_cast<const uint4*>(mask + k);
    // Each byte of the sum is at most 4, their total at most 16.
    count[0] += static_cast<double>((w.x + w.y + w.z + w.w) * 0x01010101u >> 24);
  }
  for (int64_t k = whole + block.rank(); k < n; k += block.threads()) count[0] += mask[k] != 0;
  block.reduce<Sum>(count);
  return count[0];
}

// What a distance of the tap counts for in the loss.
template <class T>
MFD_INLINE double share_of(const FeatureLaunch& launch, const FeatureTap& of, const Team& block) {
  const Tap& tap = of.tap;
  double share = of.weight ? static_cast<double>(*static_cast<const T*>(of.weight)) : tap.weight;
  if (launch.mean) {
    double rows = static_cast<double>(tap.n_rows);
    if (of.count) {
      rows = static_cast<double>(*of.count);
    } else if (tap.mask) {
      rows = counted_rows(block, tap.mask, tap.n_rows);
    }
    share = share / (rows < 1 ? 1.0 : rows);
  } else if (launch.kind != kCosine) {
    share = share * static_cast<double>(tap.width);
  }
  return share;
}

template <class S, bool kParked>
struct TapRow {
  typedef typename S::T T;
  static constexpr int N = VectorOf<S>::kColumns;
  const FeatureLaunch& launch;
  const Tap& tap;
  const Team& team;
  int64_t row;

  MFD_DEVICE unsigned char* output(void* gradient, Dtype dtype) const {
    return static_cast<unsigned char*>(gradient) + row * tap.width * size_of(dtype);
  }

  MFD_DEVICE void skip() const {
    const T zeros[N] = {};
    over_columns<S>(team, tap.width, [&](int64_t start) {
      const Dtype s = tap.student.dtype, t = tap.teacher.dtype;
      if (tap.d_student) store_columns<S>(output(tap.d_student, s), s, start, tap.width, zeros);
      if (tap.d_teacher) store_columns<S>(output(tap.d_teacher, t), t, start, tap.width, zeros);
    });
    if (tap.distances && team.rank() == 0) static_cast<T*>(tap.distances)[row] = T(0);
  }

  // The distance; writes the gradients of factor*distance.
  MFD_DEVICE double run(double factor, unsigned char* parking) const {
    Source s = source_of<S>(tap.student, row), t = source_of<S>(tap.teacher, row);
    if (kParked) {
      s = park_row(team, s, tap.width, parking);
      t = park_row(team, t, tap.width, parking + parked_row_bytes(tap.width, size_of(s.dtype)));
      await_copies();
      team.sync();
    }
    const FeatureRow f = feature_distance<S, kParked>(team, launch.kind, s, t, tap.width);
    if (tap.distances && team.rank() == 0) static_cast<T*>(tap.distances)[row] = static_cast<T>(f.value);
    if (tap.d_student || tap.d_teacher) {
      const T a = static_cast<T>(factor * f.a), b = static_cast<T>(factor * f.b),
              c = static_cast<T>(factor * f.c);
      over_columns<S>(team, tap.width, [&](int64_t start) {
        T x[N], y[N], g[N];
        load_columns<S, kParked>(s, start, tap.width, x);
        load_columns<S, kParked>(t, start, tap.width, y);
        if (tap.d_student) {
          feature_gradient<S>(launch.kind, x, y, a, b, f.of_student, f.of_teacher, g);
          store_columns<S>(output(tap.d_student, s.dtype), s.dtype, start, tap.width, g);
        }
        if (tap.d_teacher) {
          feature_gradient<S>(launch.kind, y, x, a, c, f.of_teacher, f.of_student, g);
          store_columns<S>(output(tap.d_teacher, t.dtype), t.dtype, start, tap.width, g);
        }
      });
    }
    // The next row takes the place of this one.
    team.sync();
    return f.value;
  }
};

// Adds up the blocks' partial losses, in their order, in the block that arrives last.
template <class T>
MFD_INLINE void finish_taps(const FeatureLaunch& launch, const Team& block, double own) {
  unsigned* last = reinterpret_cast<unsigned*>(dynamic_shared() + launch.parking_at);
  __syncthreads();
  if (threadIdx.x == 0) {
    launch.partial[blockIdx.x] = own;
    __threadfence();
    *last = atomicAdd(launch.ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!*last) return;
  __threadfence();
  double sum[1] = {sum_of_partials(launch.partial, gridDim.x)};
  block.reduce<Sum>(sum);
  if (threadIdx.x != 0) return;
  T* loss = static_cast<T*>(launch.loss);
  *loss = static_cast<T>(launch.adds ? static_cast<double>(*loss) + sum[0] : sum[0]);
  *launch.ticket = 0;
}

MFD_INLINE const FeatureTap& tap_of_block(const FeatureLaunch& launch) {
  int k = 0;
  while (k + 1 < launch.count && static_cast<int>(blockIdx.x) >= launch.taps[k + 1].first_block) ++k;
  return launch.taps[k];
}

template <class S, bool kParked>
__global__ void __launch_bounds__(256, 2) match_taps(const __grid_constant__ FeatureLaunch launch) {
  typedef typename S::T T;
  const int block_index = static_cast<int>(blockIdx.x);
  const FeatureTap& of = tap_of_block(launch);
  const Tap& tap = of.tap;
  Team::Shared* const shared = reinterpret_cast<Team::Shared*>(dynamic_shared());
  const Team team(shared, of.whole), block(shared, true);
  unsigned char* parking = dynamic_shared() + launch.parking_at + team.index_in_block() * launch.group_bytes;
  const double share = launch.loss ? share_of<T>(launch, of, block) : 0.0;
  const int64_t step = int64_t{of.blocks} * team.in_block();
  double loss[1] = {0};
  for (int64_t row = int64_t{block_index - of.first_block} * team.in_block() + team.index_in_block();
       row < tap.n_rows; row += step) {
    const TapRow<S, kParked> of_row{launch, tap, team, row};
    if (tap.mask && !tap.mask[row]) {
      of_row.skip();
    } else {
      const double value = of_row.run(launch.loss ? share : at<T>(tap.grad_rows, row), parking);
      if (team.rank() == 0) loss[0] += share * value;
    }
  }
  if (!launch.loss) return;
  block.template reduce<Sum>(loss);
  finish_taps<T>(launch, block, loss[0]);
}

}  // namespace device
}  // namespace mfd
