// Attention over the modalities of one row by a group of threads, forward and backward. S: F32 or F64.
#pragma once

#include "cuda/rows/matrix_rows.cuh"

namespace mfd {
namespace device {

constexpr int kTogether = 4;  // modalities that are worked on together

// What one group shares while it works on a row.
template <class T>
struct PoolScratch {
  T a[kMaxModalities];  // weights
  T c[kMaxModalities];  // d loss/d score*scale
};

// The features of one row. kParked: copies in shared memory, modality m at parked + m*pitch.
template <class S, bool kParked>
struct PoolRow {
  const PoolProblem& pool;
  int64_t row;
  unsigned present;  // bit m: modality m takes part
  unsigned char* parked;
  int pitch;

  // All lanes of a warp call it together.
  MFD_DEVICE PoolRow(const PoolProblem& p, int64_t r, bool counted, unsigned char* at, int bytes)
      : pool(p), row(r), parked(at), pitch(bytes) {
    const int m = lane_of();
    bool on = counted && m < p.modalities;
    if (on && p.present) on = p.present[r * p.modalities + m] != 0;
    present = __ballot_sync(kAllLanes, on);
  }

  MFD_DEVICE bool has(int m) const { return (present >> m & 1u) != 0; }

  MFD_DEVICE Source source(int m) const {
    if (kParked) return {parked + m * pitch, pool.features[m].dtype, true};
    return source_of<S>(pool.features[m], row);
  }

  // Starts the copies; await_copies() and the group's sync() end them.
  template <class Group>
  MFD_DEVICE void park(const Group& group) const {
    for (int m = 0; m < pool.modalities; ++m)
      if (has(m)) park_row(group, source_of<S>(pool.features[m], row), pool.width, parked + m * pitch);
  }
};

// In lane m: <y, x_m>, 0 where modality m is absent. kPaddedY: as Columns::load has it.
template <class S, bool kParked, bool kPaddedY, class Group>
MFD_INLINE double pool_dots(const Group& group, const PoolRow<S, kParked>& x, const Source& y) {
  typedef typename S::T T;
  constexpr int N = VectorOf<S>::kColumns;
  const int64_t width = x.pool.width;
  double mine = 0;
  for (int first = 0; first < x.pool.modalities; first += kTogether) {
    T sums[kTogether] = {};
    Source from[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k)
      if (x.has(first + k)) from[k] = x.source(first + k);
    over_columns<S>(group, width, [&](int64_t start) {
      Columns<S> columns[kTogether], other;
      other.template load<kPaddedY>(y, start, width);
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
        if (x.has(first + k)) columns[k].template load<kParked>(from[k], start, width);
      T b[N];
      other.get(y.dtype, b);
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (!x.has(first + k)) continue;
        T a[N];
        columns[k].get(from[k].dtype, a);
        sums[k] = sums[k] + dot_of<S>(a, b);
      }
    });
    double v[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) v[k] = static_cast<double>(sums[k]);
    group.template reduce<Sum>(v);
#pragma unroll
    for (int k = 0; k < kTogether; ++k)
      if (lane_of() == first + k) mine = v[k];
  }
  return mine;
}

// In lane m: softmax_m(s_m/temperature) over the present modalities, 0 where absent; `dot` is <query, x_m>. A
// NaN score makes all of them NaN. fast: as Exponent has it. log_weight, where wants_log: its logarithm,
// finite where it underflows, -inf where absent.
template <class S, bool kParked>
MFD_INLINE typename S::T weight_of_dots(const PoolRow<S, kParked>& x, double dot, const PoolTypes& types,
                                        bool fast, bool wants_log, double* log_weight) {
  typedef typename S::T T;
  const PoolProblem& p = x.pool;
  const int m = lane_of();
  const bool on = x.has(m);
  double score = p.query ? p.scale * dot : 0.0;
  if (on && p.scores) {
    const unsigned char* scores = static_cast<const unsigned char*>(p.scores);
    score = load_one<double>(scores + (x.row * p.modalities + m) * size_of(types.scores), types.scores);
  }
  if (on && p.bias)
    score +=
        load_one<double>(static_cast<const unsigned char*>(p.bias) + m * size_of(types.bias), types.bias);
  const double top = over_warp<Max>(on ? score : -kInf);
  const double temperature = at<T>(p.temperature, x.row);
  const Exponent<S> exponent(temperature, fast);
  const T part = on ? exponent(static_cast<T>(score - top)) : T(0);
  const double total = over_warp<Sum>(static_cast<double>(part));
  if (wants_log) *log_weight = on ? (score - top) / temperature - log(total) : -kInf;
  return on ? part / static_cast<T>(total) : T(0);
}

// The same, with the dots of the group's rows.
template <class S, bool kParked, class Group>
MFD_INLINE typename S::T pool_weight(const Group& group, const PoolRow<S, kParked>& x, const PoolTypes& types,
                                     bool fast, bool wants_log, double* log_weight) {
  const PoolProblem& p = x.pool;
  const double dot =
      p.query ? pool_dots<S, kParked, false>(group, x, source_at<S>(p.query, types.query)) : 0.0;
  return weight_of_dots<S>(x, dot, types, fast, wants_log, log_weight);
}

// act(start, y) with y = sum_m a[m]*x_m for this thread's columns; `a` in shared memory.
template <class S, bool kParked, class Group, class Act>
MFD_INLINE void pool_sum(const Group& group, const PoolRow<S, kParked>& x, const typename S::T* a,
                         const Act& act) {
  typedef typename S::T T;
  constexpr int N = VectorOf<S>::kColumns;
  const int64_t width = x.pool.width;
  over_columns<S>(group, width, [&](int64_t start) {
    T sum[N] = {};
    for (int first = 0; first < x.pool.modalities; first += kTogether) {
      Columns<S> columns[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
        if (x.has(first + k)) columns[k].template load<kParked>(x.source(first + k), start, width);
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (!x.has(first + k)) continue;
        T values[N];
        columns[k].get(x.pool.features[first + k].dtype, values);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] = S::fma(a[first + k], values[i], sum[i]);
      }
    }
    act(start, sum);
  });
}

// In lane m: d loss/d s_m; a, g: the weight and d loss/d a_m in lane m, `rest_shift` a further gradient of
// s_m/temperature (0 for none).
MFD_INLINE double pool_score_gradient(double a, double g, double temperature, bool on, double rest_shift) {
  const double mean = over_warp<Sum>(on ? a * g : 0.0);
  return on ? (score_gradient(a, g, mean) + rest_shift) / temperature : 0.0;
}

// Gradients of the features of one row, dx_m = a_m*dy + c_m*query, and this thread's columns of
// sum_m c_m*x_m: add(start, sum). dy.data null: 0; kPadded: whether dy is parked.
template <class S, bool kParked, class Group, class Add>
MFD_INLINE void pool_gradients(const Group& group, const PoolRow<S, kParked>& x,
                               const PoolScratch<typename S::T>& of, const Source& dy, const Source& query,
                               void* const (&d_features)[kMaxModalities], int64_t d_row_stride,
                               bool wants_query, const Add& add) {
  typedef typename S::T T;
  constexpr int N = VectorOf<S>::kColumns;
  const PoolProblem& p = x.pool;
  const int64_t width = p.width, offset = x.row * d_row_stride;
  over_columns<S>(group, width, [&](int64_t start) {
    T up[N] = {}, q[N] = {}, sum[N] = {};
    if (dy.data) load_columns<S, kParked>(dy, start, width, up);
    if (query.data) load_columns<S, false>(query, start, width, q);
    for (int m = 0; m < p.modalities; ++m) {
      const bool on = x.has(m);
      const T a = on ? of.a[m] : T(0), c = on ? of.c[m] : T(0);
      if (wants_query && on) {
        T values[N];
        load_columns<S, kParked>(x.source(m), start, width, values);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] = S::fma(c, values[i], sum[i]);
      }
      if (!d_features[m]) continue;
      T dx[N];
#pragma unroll
      for (int i = 0; i < N; ++i) dx[i] = on ? S::fma(c, q[i], a * up[i]) : T(0);
      const Dtype dtype = p.features[m].dtype;
      store_columns<S>(static_cast<unsigned char*>(d_features[m]) + offset * size_of(dtype), dtype, start,
                       width, dx);
    }
    if (wants_query) add(start, sum);
  });
}

}  // namespace device
}  // namespace mfd
