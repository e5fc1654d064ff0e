// modal_pool of at most four modalities of one dtype whose rows begin where 16 bytes do: a warp per row,
// which holds the features in registers. Everything else is modal_pool.cuh's.
#pragma once

#include "cuda/pool/modal_pool.cuh"
#include "cuda/rows/packed.cuh"

namespace mfd {
namespace device {

constexpr int kPoolVectors = 4;  // of a lane, at most: 1024 columns
constexpr int kLeanPoolThreads = 128;

// This lane's columns of a vector of the row's width: those from 8*(lane + 32*v).
template <Dtype kDtype>
struct LanePack {
  typedef Packed<kDtype> Pack;
  Pack of[kPoolVectors];

  static MFD_DEVICE int column(int v) { return 8 * (lane_of() + 32 * v); }

  MFD_DEVICE void clear() {
#pragma unroll
    for (int v = 0; v < kPoolVectors; ++v) of[v] = Pack{};
  }
  // 0 beyond the width. kOnce: nobody reads it again.
  template <bool kOnce>
  MFD_DEVICE void load(const unsigned char* row, int width) {
    clear();
#pragma unroll
    for (int v = 0; v < kPoolVectors; ++v) {
      const unsigned char* const at = row + column(v) * Pack::kBytes;
      if (column(v) < width) of[v] = kOnce ? Pack::load_once(at) : Pack::load(at);
    }
  }
  MFD_DEVICE void load_singly(const unsigned char* row, int width) {
    clear();
#pragma unroll
    for (int v = 0; v < kPoolVectors; ++v) {
      if (column(v) >= width) continue;
      float x[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) x[k] = load_one<float>(row + (column(v) + k) * Pack::kBytes, kDtype);
      of[v] = Pack::of(x);
    }
  }
};

template <Dtype kDtype>
MFD_INLINE void store_columns(unsigned char* row, int v, const float (&x)[8]) {
  unsigned char* const to = row + LanePack<kDtype>::column(v) * Packed<kDtype>::kBytes;
  if (is_aligned(row)) return Packed<kDtype>::of(x).store_once(to);
#pragma unroll
  for (int k = 0; k < 8; ++k) store_one<float>(to + k * Packed<kDtype>::kBytes, kDtype, x[k]);
}

// The features of one row; 0 where a modality is absent.
template <Dtype kDtype>
struct LeanPoolRow {
  typedef Packed<kDtype> Pack;
  int width;
  PoolRow<F32, false> of;
  LanePack<kDtype> x[kTogether];

  MFD_DEVICE LeanPoolRow(const PoolProblem& p, int64_t row)
      : width(static_cast<int>(p.width)), of(p, row, true, nullptr, 0) {}

  MFD_DEVICE void load() {
#pragma unroll
    for (int m = 0; m < kTogether; ++m) {
      x[m].clear();
      if (!of.has(m)) continue;
      const RowMatrix& f = of.pool.features[m];
      x[m].template load<true>(
          static_cast<const unsigned char*>(f.data) + matrix_offset(f, of.row) * Pack::kBytes, width);
    }
  }

  // In lane m: <y, x_m>.
  MFD_DEVICE double dots(const LanePack<kDtype>& y) const {
    float sums[kTogether] = {};
#pragma unroll
    for (int v = 0; v < kPoolVectors; ++v) {
      float b[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) b[k] = y.of[v].value(k);
#pragma unroll
      for (int m = 0; m < kTogether; ++m) {
        float a[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) a[k] = x[m].of[v].value(k);
        sums[m] = sums[m] + dot_of<F32>(a, b);
      }
    }
    double mine = 0;
#pragma unroll
    for (int m = 0; m < kTogether; ++m) {
      const double whole = over_warp<Sum>(static_cast<double>(sums[m]));
      if (lane_of() == m) mine = whole;
    }
    return mine;
  }

  // act(v, sum) with sum = sum_m of[m]*x_m for this lane's vectors.
  template <class Act>
  MFD_DEVICE void weighted(const float (&by)[kTogether], const Act& act) const {
#pragma unroll
    for (int v = 0; v < kPoolVectors; ++v) {
      if (LanePack<kDtype>::column(v) >= width) continue;
      float sum[8] = {};
#pragma unroll
      for (int m = 0; m < kTogether; ++m) {
#pragma unroll
        for (int k = 0; k < 8; ++k) sum[k] = fmaf(by[m], x[m].of[v].value(k), sum[k]);
      }
      act(v, sum);
    }
  }
};

// What lane m has, for all lanes.
MFD_INLINE void share_by_lane(float mine, float (&all)[kTogether]) {
#pragma unroll
  for (int m = 0; m < kTogether; ++m) all[m] = __shfl_sync(kAllLanes, mine, m);
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kLeanPoolThreads, kDtype == Dtype::kFloat32 ? 2 : 4)
    lean_pool_forward(const __grid_constant__ PoolForwardLaunch launch) {
  const PoolProblem& p = launch.common.pool;
  const int64_t rows = static_cast<int64_t>(gridDim.x) * Warp::in_block();
  LanePack<kDtype> query;
  query.clear();
  if (p.query)
    query.template load<false>(static_cast<const unsigned char*>(p.query), static_cast<int>(p.width));
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * Warp::in_block() + warp_of(); row < p.n_rows;
       row += rows) {
    LeanPoolRow<kDtype> x(p, row);
    x.load();
    const double dots = p.query ? x.dots(query) : 0.0;
    const float weight =
        weight_of_dots<F32>(x.of, dots, launch.common.types, launch.common.fast, false, nullptr);
    if (lane_of() < p.modalities)
      static_cast<float*>(launch.weights)[row * p.modalities + lane_of()] = weight;
    float a[kTogether];
    share_by_lane(weight, a);
    unsigned char* const out =
        static_cast<unsigned char*>(launch.pooled) + row * p.width * Packed<kDtype>::kBytes;
    x.weighted(a, [&](int v, const float (&sum)[8]) { store_columns<kDtype>(out, v, sum); });
  }
}

// dx_m = a_m*dy + c_m*query, and sum_m c_m*x_m over the rows of a warp.
template <Dtype kDtype>
__global__ void __launch_bounds__(kLeanPoolThreads, kDtype == Dtype::kFloat32 ? 2 : 3)
    lean_pool_backward(const __grid_constant__ PoolBackwardLaunch launch) {
  typedef Packed<kDtype> Pack;
  const PoolProblem& p = launch.common.pool;
  const PoolTypes& types = launch.common.types;
  const int64_t rows = static_cast<int64_t>(gridDim.x) * Warp::in_block();
  const int lane = lane_of(), width = static_cast<int>(p.width);
  const bool wants_query = launch.query_partial != nullptr;
  const bool wants_scores = p.query || launch.d_scores || launch.shared_partial || launch.d_row_temperature;
  const unsigned char* const query = static_cast<const unsigned char*>(p.query);
  float d_query[kPoolVectors][8] = {};
  double d_bias = 0, d_temperature = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * Warp::in_block() + warp_of(); row < p.n_rows;
       row += rows) {
    LeanPoolRow<kDtype> x(p, row);
    if (wants_scores) x.load();
    const RowMatrix& up = launch.d_pooled;
    LanePack<kDtype> dy;
    dy.clear();
    const bool has_dy = up.data && x.of.present;
    if (has_dy) {
      const unsigned char* const from =
          static_cast<const unsigned char*>(up.data) + matrix_offset(up, row) * Pack::kBytes;
      if (is_aligned(from)) {
        dy.template load<true>(from, width);
      } else {
        dy.load_singly(from, width);
      }
    }
    const int64_t at_weights = row * p.modalities + lane;
    const bool on = x.of.has(lane);
    const float a = on ? static_cast<const float*>(launch.weights)[at_weights] : 0.0f;
    double ds = 0;
    if (wants_scores) {
      double g = has_dy ? x.dots(dy) : 0.0;
      if (on && launch.d_weights)
        g += static_cast<double>(static_cast<const float*>(launch.d_weights)[at_weights]);
      ds = pool_score_gradient(static_cast<double>(a), g, at<float>(p.temperature, row), on, 0.0);
    }
    d_bias += ds;
    double term = 0;
    if (launch.wants_temperature) {
      term = over_warp<Sum>(temperature_term(static_cast<double>(a), ds));
      d_temperature += term;
    }
    if (launch.d_scores && lane < p.modalities)
      store_one<double>(static_cast<unsigned char*>(launch.d_scores) + at_weights * size_of(types.scores),
                        types.scores, ds);
    if (lane == 0 && launch.d_row_temperature)
      static_cast<float*>(launch.d_row_temperature)[row] = static_cast<float>(term);
    float by_dy[kTogether], by_query[kTogether];
    share_by_lane(a, by_dy);
    share_by_lane(static_cast<float>(ds * p.scale), by_query);
    if (wants_query)
      x.weighted(by_query, [&](int v, const float (&sum)[8]) {
#pragma unroll
        for (int k = 0; k < 8; ++k) d_query[v][k] = d_query[v][k] + sum[k];
      });
#pragma unroll
    for (int v = 0; v < kPoolVectors; ++v) {
      const int first = LanePack<kDtype>::column(v);
      if (first >= width) continue;
      Pack q{};
      if (query) q = Pack::load(query + first * Pack::kBytes);
#pragma unroll
      for (int m = 0; m < kTogether; ++m) {
        if (m >= p.modalities || !launch.d_features[m]) continue;
        float dx[8];
#pragma unroll
        for (int k = 0; k < 8; ++k)
          dx[k] = x.of.has(m) ? fmaf(by_query[m], q.value(k), by_dy[m] * dy.of[v].value(k)) : 0.0f;
        store_columns<kDtype>(
            static_cast<unsigned char*>(launch.d_features[m]) + row * launch.d_row_stride * Pack::kBytes, v,
            dx);
      }
    }
  }
  if (!wants_query && !launch.shared_partial) return;
  // The sums of this block's warps, in their order; the last warps of the grid may have had no row.
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * Warp::in_block(), left = p.n_rows - begin;
  const int members = left < Warp::in_block() ? static_cast<int>(left) : Warp::in_block();
  float* const of_warp = reinterpret_cast<float*>(dynamic_shared());
  if (wants_query) {
#pragma unroll
    for (int v = 0; v < kPoolVectors; ++v) {
      const int first = LanePack<kDtype>::column(v);
      if (first < width)
        store_wide(reinterpret_cast<unsigned char*>(of_warp + warp_of() * width + first), Dtype::kFloat32,
                   d_query[v]);
    }
    __syncthreads();
    float* const out = static_cast<float*>(launch.query_partial) + static_cast<int64_t>(blockIdx.x) * width;
    for (int k = static_cast<int>(threadIdx.x); k < width; k += static_cast<int>(blockDim.x)) {
      double total = 0;
      for (int g = 0; g < members; ++g) total += static_cast<double>(of_warp[g * width + k]);
      out[k] = static_cast<float>(total);
    }
  }
  if (launch.shared_partial) {
    __syncthreads();
    add_shared_partials(launch, warp_of(), lane == 0, members, d_bias, d_temperature);
  }
}

}  // namespace device
}  // namespace mfd
