// modal_pool: a warp or a block per row, by its width. kParked: the row's features are copied to shared
// memory at once, all of them on their way together, and read there twice, for the scores and for the sum;
// else the second reading finds them in the caches. An absent modality is not read.
#pragma once

#include "cuda/pool/rows.cuh"
#include "cuda/rows/team.cuh"

namespace mfd {
namespace device {

// What both directions need. Dynamic shared memory, in bytes: the team's own, and for each group its scratch,
// its parked rows `pitch` bytes apart, and its sum for the query's gradient.
struct PoolLaunch {
  PoolProblem pool;
  PoolTypes types;
  bool fast;   // features and scores of 16 bits
  bool whole;  // a block per row
  int scratch_at, group_bytes, parking_at, pitch, sum_at;
};

struct PoolForwardLaunch {
  PoolLaunch common;
  void* pooled;  // [N, width]
  Dtype pooled_dtype;
  void* weights;  // [N, M]
};

struct PoolBackwardLaunch {
  PoolLaunch common;
  const void* weights;  // [N, M]
  RowMatrix d_pooled;
  const void* d_weights;
  void* d_features[kMaxModalities];  // row i at element i*d_row_stride
  int64_t d_row_stride;
  void *d_scores, *d_row_temperature;
  // Sums over the rows of each block: [blocks, width], and [blocks, M + 1] for bias and temperature.
  void* query_partial;
  double* shared_partial;
  bool wants_temperature;
};

// Sums of the partial sums, in their order.
struct PoolSums {
  const void* query_partial;
  const double* shared_partial;
  int64_t partials, width;
  int modalities;
  void *d_query, *d_bias, *d_temperature;  // null where not wanted
  Dtype query_dtype, bias_dtype;
};

// A group's place in the grid and in shared memory.
template <class T>
struct PoolPlace {
  Team team;
  int index;
  int64_t first, groups;  // its first row, and how far apart its rows are
  PoolScratch<T>* scratch;
  unsigned char *parked, *sum;

  MFD_DEVICE explicit PoolPlace(const PoolLaunch& launch)
      : team(reinterpret_cast<Team::Shared*>(dynamic_shared()), launch.whole) {
    index = team.index_in_block();
    groups = static_cast<int64_t>(gridDim.x) * team.in_block();
    first = static_cast<int64_t>(blockIdx.x) * team.in_block() + index;
    unsigned char* own = dynamic_shared() + launch.scratch_at + index * launch.group_bytes;
    scratch = reinterpret_cast<PoolScratch<T>*>(own);
    parked = own + launch.parking_at;
    sum = own + launch.sum_at;
  }
};

template <class S, bool kParked>
__global__ void __launch_bounds__(256, 2) pool_forward(const __grid_constant__ PoolForwardLaunch launch) {
  typedef typename S::T T;
  const PoolProblem& p = launch.common.pool;
  const PoolPlace<T> place(launch.common);
  const Team& team = place.team;
  const int lane = lane_of();
  for (int64_t row = place.first; row < p.n_rows; row += place.groups) {
    const PoolRow<S, kParked> x(p, row, true, place.parked, launch.common.pitch);
    if (kParked) {
      x.park(team);
      await_copies();
      team.sync();
    }
    const T weight = pool_weight(team, x, launch.common.types, launch.common.fast, false, nullptr);
    if (team.rank() < p.modalities) {
      static_cast<T*>(launch.weights)[row * p.modalities + lane] = weight;
      place.scratch->a[lane] = weight;
    }
    team.sync();
    unsigned char* out =
        static_cast<unsigned char*>(launch.pooled) + row * p.width * size_of(launch.pooled_dtype);
    pool_sum(team, x, place.scratch->a, [&](int64_t start, const T(&sum)[VectorOf<S>::kColumns]) {
      store_columns<S>(out, launch.pooled_dtype, start, p.width, sum);
    });
    // The next row takes the place of this one.
    team.sync();
  }
}

// What the groups of a block have of the gradients of bias (in lane m) and temperature, into shared memory
// (33 doubles of each, over all else that is there) and in their order to the block's partial sums.
MFD_INLINE void add_shared_partials(const PoolBackwardLaunch& launch, int group, bool is_first, int members,
                                    double d_bias, double d_temperature) {
  const int modalities = launch.common.pool.modalities, columns = modalities + 1, lane = lane_of();
  double* const all = reinterpret_cast<double*>(dynamic_shared());
  double* const of_group = all + group * (kMaxModalities + 1);
  if (lane < modalities) of_group[lane] = d_bias;
  if (is_first) of_group[modalities] = d_temperature;
  __syncthreads();
  for (int k = static_cast<int>(threadIdx.x); k < columns; k += static_cast<int>(blockDim.x)) {
    double total = 0;
    for (int g = 0; g < members; ++g) total += all[g * (kMaxModalities + 1) + k];
    launch.shared_partial[static_cast<int64_t>(blockIdx.x) * columns + k] = total;
  }
}

template <class S, bool kParked>
__global__ void __launch_bounds__(256, kParked ? 2 : 1)
    pool_backward(const __grid_constant__ PoolBackwardLaunch launch) {
  typedef typename S::T T;
  constexpr int N = VectorOf<S>::kColumns;
  constexpr Dtype kDtype = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;
  const PoolProblem& p = launch.common.pool;
  const PoolPlace<T> place(launch.common);
  const Team& team = place.team;
  const int lane = lane_of();
  const PoolTypes& types = launch.common.types;
  const bool wants_query = launch.query_partial != nullptr;
  const bool wants_scores = p.query || launch.d_scores || launch.shared_partial || launch.d_row_temperature;
  const int64_t sum_width = kParked ? (p.width + N - 1) / N * N : p.width;
  unsigned char* sum_row = kParked ? place.sum
                                   : static_cast<unsigned char*>(launch.query_partial) +
                                         static_cast<int64_t>(blockIdx.x) * p.width * sizeof(T);
  const Source query = source_at<S>(p.query, types.query);
  double d_bias = 0, d_temperature = 0;
  for (int64_t row = place.first; row < p.n_rows; row += place.groups) {
    const PoolRow<S, kParked> x(p, row, true, place.parked, launch.common.pitch);
    const int64_t at_weights = row * p.modalities + lane;
    Source dy{nullptr, Dtype::kFloat32, false};
    if (launch.d_pooled.data && x.present) dy = source_of<S>(launch.d_pooled, row);
    if (kParked) {
      if (wants_scores) x.park(team);
      if (dy.data) dy = park_row(team, dy, p.width, place.parked + p.modalities * launch.common.pitch);
      await_copies();
      team.sync();
    }
    const bool on = x.has(lane);
    const T a = on ? static_cast<const T*>(launch.weights)[at_weights] : T(0);
    double ds = 0;
    if (wants_scores) {
      double g = dy.data ? pool_dots<S, kParked, kParked>(team, x, dy) : 0.0;
      if (on && launch.d_weights)
        g += static_cast<double>(static_cast<const T*>(launch.d_weights)[at_weights]);
      ds = pool_score_gradient(static_cast<double>(a), g, at<T>(p.temperature, row), on, 0.0);
    }
    d_bias += ds;
    double term = 0;
    if (launch.wants_temperature) {
      term = over_warp<Sum>(temperature_term(static_cast<double>(a), ds));
      d_temperature += term;
    }
    if (team.rank() < p.modalities) {
      place.scratch->a[lane] = a;
      place.scratch->c[lane] = static_cast<T>(ds * p.scale);
      if (launch.d_scores)
        store_one<double>(static_cast<unsigned char*>(launch.d_scores) + at_weights * size_of(types.scores),
                          types.scores, ds);
    }
    if (team.rank() == 0 && launch.d_row_temperature)
      static_cast<T*>(launch.d_row_temperature)[row] = static_cast<T>(term);
    team.sync();
    const bool starts = row == place.first;
    pool_gradients(team, x, *place.scratch, dy, query, launch.d_features, launch.d_row_stride, wants_query,
                   [&](int64_t start, T(&sum)[N]) {
                     if (!starts) {
                       T before[N];
                       load_columns<S, kParked>(source_at<S>(sum_row, kDtype), start, sum_width, before);
#pragma unroll
                       for (int i = 0; i < N; ++i) sum[i] = before[i] + sum[i];
                     }
                     store_columns<S>(sum_row, kDtype, start, sum_width, sum);
                   });
    team.sync();
  }
  if (!wants_query && !launch.shared_partial) return;
  // The sums of this block's groups, in their order; the last groups of the grid may have had no row.
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * team.in_block(), left = p.n_rows - begin;
  const int members = left < team.in_block() ? static_cast<int>(left) : team.in_block();
  const unsigned char* all = dynamic_shared() + launch.common.scratch_at;
  __syncthreads();
  if (kParked && wants_query) {
    T* out = static_cast<T*>(launch.query_partial) + static_cast<int64_t>(blockIdx.x) * p.width;
    for (int64_t k = threadIdx.x; k < p.width; k += blockDim.x) {
      double total = 0;
      for (int g = 0; g < members; ++g)
        total += static_cast<double>(
            reinterpret_cast<const T*>(all + g * launch.common.group_bytes + launch.common.sum_at)[k]);
      out[k] = static_cast<T>(total);
    }
  }
  if (!launch.shared_partial) return;
  __syncthreads();
  add_shared_partials(launch, place.index, team.rank() == 0, members, d_bias, d_temperature);
}

// sum over k of partial[k*width + column], 32 columns of a block, every 8th k in one of its 8 warps; the
// total is in the first warp.
template <class T>
MFD_INLINE double column_sum(const T* partial, int64_t partials, int64_t width, int64_t column) {
  double* of_warp = reinterpret_cast<double*>(dynamic_shared());
  double total = 0;
  if (column < width)
    for (int64_t k = warp_of(); k < partials; k += 8)
      total += static_cast<double>(partial[k * width + column]);
  of_warp[threadIdx.x] = total;
  __syncthreads();
  total = 0;
  for (int w = 0; w < 8; ++w) total += of_warp[w * 32 + lane_of()];
  return total;
}

template <class S>
__global__ void __launch_bounds__(256) pool_sums(const __grid_constant__ PoolSums sums) {
  typedef typename S::T T;
  const int64_t query_blocks = sums.d_query ? (sums.width + 31) / 32 : 0;
  const int64_t block = static_cast<int64_t>(blockIdx.x) - query_blocks;
  if (block < 0) {
    const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane_of();
    const double total =
        column_sum(static_cast<const T*>(sums.query_partial), sums.partials, sums.width, column);
    if (warp_of() == 0 && column < sums.width)
      store_one<double>(static_cast<unsigned char*>(sums.d_query) + column * size_of(sums.query_dtype),
                        sums.query_dtype, total);
    return;
  }
  const int64_t column = block * 32 + lane_of(), columns = sums.modalities + 1;
  const double total = column_sum(sums.shared_partial, sums.partials, columns, column);
  if (warp_of() != 0) return;
  if (sums.d_bias && column < sums.modalities)
    store_one<double>(static_cast<unsigned char*>(sums.d_bias) + column * size_of(sums.bias_dtype),
                      sums.bias_dtype, total);
  if (sums.d_temperature && column == sums.modalities)
    *static_cast<T*>(sums.d_temperature) = static_cast<T>(total);
}

}  // namespace device
}  // namespace mfd
