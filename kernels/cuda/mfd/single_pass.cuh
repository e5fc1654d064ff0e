// mfd_loss in one launch: a block owns kMfdRows rows, from the features to the gradients of the features.
// Their pooled rows y and logits z stay in shared memory as float32; d loss/dz takes the place of z, d
// loss/dy that of y. The phases, with a barrier between them:
//   a, y = pool(x)            distance of y to the teacher's features
//   z = y W^T + b             tiles of products.cuh
//   loss of z, dz             the rows of distill/forward.cuh, a warp per row; argmax
//   dy = dz W + feature part
//   ds, dx_m, sums for dquery the backward pass of pool/rows.cuh, a warp per row
//   totals                    partial sums of the blocks, added up in a fixed order by the last blocks to
//   arrive
// A row that is not counted has no modalities and no logits: nothing of it is read, its gradients are 0.
#pragma once

#include "common/problems/mfd.h"
#include "cuda/distill/forward.cuh"
#include "cuda/features/rows.cuh"
#include "cuda/mfd/products.cuh"
#include "cuda/pool/rows.cuh"

namespace mfd {
namespace device {

#if defined(MFD_CUDA_EMULATOR)
#define MFD_APART static __attribute__((noinline))
#else
#define MFD_APART static __device__ __noinline__
#endif

constexpr int kMfdThreads = 256, kMfdWarps = kMfdThreads / 32;

// What the phases of one row hand over.
struct MfdRow {
  RowState state;
  FeatureRow feature;
  double terms[kMfdTerms];
  double share;  // weight/divisor
  PoolScratch<float> pool;
  bool counted;
};

// What all rows share: the terms of the logits, of which row `first` of the problem is row 0 of the block.
struct MfdShared {
  Forward logits;
  Factors factors;                                          // soft and hard weight/divisor
  double divisor, hard_ratio, feature_weight, pool_weight;  // hard_ratio: divisor/that of the hard term
  float soft[kMfdRows], hard[kMfdRows];
  MfdRow rows[kMfdRows];
};

struct MfdLaunch {
  MfdPass pass;
  ForwardLaunch logits;                     // its factors, divisor and counting
  bool fast;                                // features of 16 bits
  bool lean;                                // as distill/forward.cuh has it
  int y_stride, z_stride, z_at, shared_at;  // shared memory: floats; bytes
};

// A block's partial sums, and where they begin in it.
struct MfdPartials {
  int64_t query, bias, head_bias, length;
};
MFD_HOST_DEVICE inline MfdPartials mfd_partials(const MfdPass& p) {
  MfdPartials s;
  s.query = kMfdTerms;
  s.bias = s.query + (p.d_query ? p.pool.width : 0);
  s.head_bias = s.bias + (p.d_bias ? p.pool.modalities : 0);
  s.length = s.head_bias + (p.d_head_bias ? p.forward.problem.classes : 0);
  return s;
}

// As torch.argmax: the first largest, a NaN above all.
MFD_INLINE int64_t first_argmax(const Warp& warp, const float* x, int64_t classes) {
  double v[2] = {-kInf, -kInf};  // the largest; minus the column of the first NaN
  for (int64_t k = warp.rank(); k < classes; k += warp.threads()) {
    v[0] = Max::of(v[0], static_cast<double>(x[k]));
    if (x[k] != x[k]) v[1] = Max::of(v[1], -static_cast<double>(k));
  }
  warp.reduce<Max>(v);
  double at[1] = {v[1]};
  if (v[1] == -kInf) {
    for (int64_t k = warp.rank(); k < classes; k += warp.threads())
      if (static_cast<double>(x[k]) == v[0]) at[0] = Max::of(at[0], -static_cast<double>(k));
  }
  warp.reduce<Max>(at);
  return static_cast<int64_t>(-at[0]);
}

MFD_APART double pool_gradient_row_of(const MfdLaunch& launch, int k);

struct MfdBlock {
  static constexpr int N = VectorOf<F32>::kColumns;

  const MfdLaunch& launch;
  const MfdPass& p;
  const RowProblem& problem;
  const Warp warp;
  Parked y, z;
  MfdShared& shared;
  int64_t first;  // row
  int members;    // rows

  MFD_DEVICE explicit MfdBlock(const MfdLaunch& l)
      : launch(l),
        p(l.pass),
        problem(l.pass.forward.problem),
        warp(nullptr),
        y{reinterpret_cast<float*>(dynamic_shared()), l.y_stride},
        z{reinterpret_cast<float*>(dynamic_shared() + l.z_at), l.z_stride},
        shared(*reinterpret_cast<MfdShared*>(dynamic_shared() + l.shared_at)),
        first(static_cast<int64_t>(blockIdx.x) * kMfdRows) {
    const int64_t left = problem.n_rows - first;
    members = left < kMfdRows ? static_cast<int>(left) : kMfdRows;
  }

  static MFD_DEVICE Source source_of_parked(const float* row) { return source_at<F32>(row, Dtype::kFloat32); }

  MFD_DEVICE Head head() const {
    const int classes = static_cast<int>(problem.classes), width = static_cast<int>(p.pool.width);
    return {p.head, p.head_stride, classes, (width + N - 1) / N * N};
  }

  template <bool kColumns, class Put>
  MFD_DEVICE void product(const Parked& left, const Put& put) const {
    if (p.operand == Dtype::kBFloat16) {
      multiply<TensorProduct, kColumns>(left, head(), put);
    } else {
      multiply<ExactProduct, kColumns>(left, head(), put);
    }
  }

  MFD_DEVICE void write_zeros(float* row, int64_t begin, int end) const {
    for (int64_t k = begin + warp.rank(); k < end; k += warp.threads()) row[k] = 0;
  }

  // Copies a parked row to a matrix in device memory.
  MFD_DEVICE void write_row(const float* row, void* out, int64_t at, int64_t stride, int64_t width) const {
    unsigned char* to = static_cast<unsigned char*>(out) + at * stride * size_of(p.operand);
    over_columns<F32>(warp, width, [&](int64_t start) {
      float x[N];
      load_floats(row + start, x);
      store_columns<F32>(to, p.operand, start, width, x);
    });
  }

  // What all rows share; ends with a barrier.
  MFD_DEVICE void begin() const {
    const Divisors by = find_divisors<float>(launch.logits);
    if (threadIdx.x == 0) {
      Forward& f = shared.logits;
      f = launch.logits.forward;
      f.problem.student.data = z.data - first * z.stride;
      if (p.wants_logits) f.grad = z.data - first * z.stride;
      f.soft = shared.soft - first;
      f.hard = shared.hard - first;
      shared.factors = {value_of<float>(launch.logits.soft_weight) / by.soft,
                        value_of<float>(launch.logits.hard_weight) / by.hard};
      shared.divisor = by.soft;
      shared.hard_ratio = by.soft == by.hard ? 1.0 : by.soft / by.hard;
      shared.feature_weight = at<float>(p.feature_weight, 0);
      shared.pool_weight = at<float>(p.pool_weight, 0);
    }
    __syncthreads();
  }

  // The weights, y and what is compared to them; the terms beside those of the logits.
  MFD_DEVICE void pool_row(int k) const {
    MfdRow& own = shared.rows[k];
    const int64_t row = first + k, width = p.pool.width;
    float* of_y = y.data + k * y.stride;
    const bool counted = k < members && is_counted(problem, row);
    if (warp.rank() == 0) own.counted = counted;
    if (k >= members) return write_zeros(of_y, 0, y.stride);
    const int m = lane_of();
    const PoolRow<F32, false> x(p.pool, row, counted, nullptr, 0);
    double log_a = 0;
    const float a = pool_weight(warp, x, p.types, launch.fast, p.pool_target != nullptr, &log_a);
    own.pool.a[m] = a;
    if (m < p.pool.modalities) p.weights[row * p.pool.modalities + m] = a;
    warp.sync();
    pool_sum(warp, x, own.pool.a,
             [&](int64_t start, const float (&sum)[N]) { store_floats(of_y + start, sum); });
    write_zeros(of_y, (width + N - 1) / N * N, y.stride);
    warp.sync();
    if (p.y) write_row(of_y, p.y, row, width, width);
    FeatureRow feature{};
    if (p.target.data && counted)
      feature = feature_distance<F32, false>(warp, p.kind, source_of_parked(of_y),
                                             source_of<F32>(p.target, row), width);
    double kl = 0;
    if (p.pool_target && counted) {
      const double term =
          m < p.pool.modalities
              ? pool_kl_term(static_cast<double>(p.pool_target[row * p.pool.modalities + m]), log_a)
              : 0.0;
      kl = over_warp<Sum>(term);
      if (kl < 0) kl = 0;
    }
    if (warp.rank() != 0) return;
    own.feature = feature;
    own.share = counted ? at<float>(p.forward.weight, row) / shared.divisor : 0.0;
    own.terms[0] = own.terms[3] = 0;
    if (p.target.data && counted) {
      own.terms[3] = own.share * feature.value;
      own.terms[0] = shared.feature_weight * own.terms[3];
    }
    if (p.pool_target && counted) own.terms[0] += shared.pool_weight * (own.share * kl);
  }

  // z = y W^T + b.
  MFD_DEVICE void find_logits() const {
    const Source bias = source_at<F32>(p.head_bias, p.head_bias_dtype);
    product<true>(y, [&](int row, int column, const float (&x)[N], bool add) {
      float* out = z.data + row * z.stride + column;
      float sum[N] = {};
      if (add) {
        load_floats(out, sum);
      } else if (bias.data) {
        load_columns<F32, false>(bias, column, problem.classes, sum);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] = sum[i] + x[i];
      store_floats(out, sum);
    });
  }

  // The terms of the logits and their gradient, in the place of the logits.
  template <bool kLean>
  MFD_DEVICE void logit_row(int k) const {
    MfdRow& own = shared.rows[k];
    const int64_t row = first + k;
    float* of_z = z.data + k * z.stride;
    if (k >= members) return write_zeros(of_z, 0, z.stride);
    ForwardRow<F32, Warp, false, kLean> of_row(shared.logits, warp, &own.state, row);
    const int64_t found = own.counted ? first_argmax(warp, of_z, problem.classes) : -1;
    if (warp.rank() == 0) p.predictions[row] = found;
    double loss = 0;
    if (own.counted) {
      loss = of_row.run(shared.factors, nullptr, 0);
    } else {
      of_row.skip();
      warp.sync();
    }
    if (warp.rank() == 0) {
      own.terms[0] += loss;
      own.terms[1] =
          own.counted && p.forward.use_soft ? own.share * static_cast<double>(shared.soft[k]) : 0.0;
      own.terms[2] = own.counted && p.forward.use_hard
                         ? own.share * shared.hard_ratio * static_cast<double>(shared.hard[k])
                         : 0.0;
    }
    if (p.dz) write_row(of_z, p.dz, row, p.dz_stride, p.dz_stride);
  }

  // dy = dz W + the gradient of the features' distance, in the place of y.
  MFD_DEVICE void find_pooled_gradient() const {
    product<false>(z, [&](int row, int column, const float (&x)[N], bool add) {
      float* out = y.data + row * y.stride + column;
      const MfdRow& own = shared.rows[row];
      float sum[N] = {};
      if (add) {
        load_floats(out, sum);
      } else if (p.target.data && own.counted) {
        float s[N], t[N];
        load_floats(out, s);
        load_columns<F32, false>(source_of<F32>(p.target, first + row), column, p.pool.width, t);
        const double factor = shared.feature_weight * own.share;
        feature_gradient<F32>(p.kind, s, t, static_cast<float>(factor * own.feature.a),
                              static_cast<float>(factor * own.feature.b), own.feature.of_student,
                              own.feature.of_teacher, sum);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] = sum[i] + x[i];
      store_floats(out, sum);
    });
  }

  // Gradients of the features; the row's part of dquery, in the place of dy. Returns, in lane m, ds_m.
  MFD_DEVICE double pool_gradient_row(int k) const {
    MfdRow& own = shared.rows[k];
    const int64_t row = first + k;
    float* of_y = y.data + k * y.stride;
    const int m = lane_of();
    const PoolRow<F32, false> x(p.pool, row, own.counted, nullptr, 0);
    const bool on = x.has(m);
    const Source dy = source_of_parked(of_y), query = source_at<F32>(p.pool.query, p.types.query);
    const double a = on ? static_cast<double>(own.pool.a[m]) : 0.0;
    double rest_shift = 0;
    if (p.pool_target && own.counted) {
      const double target = on ? static_cast<double>(p.pool_target[row * p.pool.modalities + m]) : 0.0;
      rest_shift = shared.pool_weight * own.share * pool_kl_gradient(a, over_warp<Sum>(target), target);
    }
    const double g = pool_dots<F32, false, false>(warp, x, dy);
    const double ds = pool_score_gradient(a, g, at<float>(p.pool.temperature, row), on, rest_shift);
    own.pool.c[m] = static_cast<float>(ds * p.pool.scale);
    warp.sync();
    pool_gradients(warp, x, own.pool, dy, query, p.d_features, p.d_row_stride, p.d_query != nullptr,
                   [&](int64_t start, const float (&sum)[N]) { store_floats(of_y + start, sum); });
    return ds;
  }

  // sum over the block's rows of a parked column.
  MFD_DEVICE double column_total(const Parked& matrix, int64_t column) const {
    double total = 0;
    for (int k = 0; k < members; ++k) total += static_cast<double>(matrix.data[k * matrix.stride + column]);
    return total;
  }

  // Gradients to the features and the head's bias, from the rows' slopes.
  MFD_DEVICE void find_gradients(double* partial) const {
    const MfdPartials at_sums = mfd_partials(p);
    const int thread = static_cast<int>(threadIdx.x);
    if (p.d_head_bias) {
      for (int64_t c = thread; c < problem.classes; c += kMfdThreads)
        partial[at_sums.head_bias + c] = column_total(z, c);
    }
    if (!p.wants_pooled) return;
    find_pooled_gradient();
    double d_bias = 0;
#pragma unroll 1
    for (int k = warp_of(); k < members; k += kMfdWarps) d_bias += pool_gradient_row_of(launch, k);
    double* of_warp = reinterpret_cast<double*>(z.data);
    of_warp[thread] = d_bias;
    __syncthreads();
    if (p.d_query) {
      for (int64_t c = thread; c < p.pool.width; c += kMfdThreads)
        partial[at_sums.query + c] = column_total(y, c);
    }
    if (p.d_bias && thread < p.pool.modalities) {
      double total = 0;
      for (int w = 0; w < kMfdWarps; ++w) total += of_warp[32 * w + thread];
      partial[at_sums.bias + thread] = total;
    }
  }
};

// Calls, so that no phase is short of registers for what another one keeps.
MFD_APART void pool_row_of(const MfdLaunch& launch, int k) {
  MfdBlock(launch).pool_row(k);
}
MFD_APART void logit_row_of(const MfdLaunch& launch, int k) {
  if (launch.lean) {
    MfdBlock(launch).logit_row<true>(k);
  } else {
    MfdBlock(launch).logit_row<false>(k);
  }
}
MFD_APART double pool_gradient_row_of(const MfdLaunch& launch, int k) {
  return MfdBlock(launch).pool_gradient_row(k);
}

// Whether this block is the last of `expected` ones; the ticket is 0 again then.
MFD_DEVICE bool arrives_last(unsigned* ticket, unsigned expected, unsigned* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *flag = atomicAdd(ticket, 1u) == expected - 1;
    if (*flag) *ticket = 0;
  }
  __syncthreads();
  const bool last = *flag != 0;
  if (last) __threadfence();
  return last;
}

// put(i, sum over k < count of partial[k*step][i]).
template <class Put>
MFD_INLINE void add_partials(const double* partial, int64_t step, int count, int64_t length, const Put& put) {
  for (int64_t i = threadIdx.x; i < length; i += kMfdThreads) {
    double total = 0;
    for (int k = 0; k < count; ++k) total += reinterpret_cast<const volatile double*>(partial)[k * step + i];
    put(i, total);
  }
}

// The last block of every group of blocks adds up the group's partial sums in their order, and the last of
// those what they come to.
MFD_DEVICE void finish_sums(const MfdPass& p, unsigned* flag) {
  const MfdPartials at = mfd_partials(p);
  const int64_t blocks = gridDim.x, group = blockIdx.x / kMfdGroup, begin = group * kMfdGroup;
  const int64_t groups = (blocks + kMfdGroup - 1) / kMfdGroup;
  const int members = static_cast<int>(blocks - begin < kMfdGroup ? blocks - begin : kMfdGroup);
  if (!arrives_last(p.tickets + 1 + group, static_cast<unsigned>(members), flag)) return;
  const auto finish = [&](int64_t i, double total) {
    if (i < at.query) {
      *p.terms[i] = static_cast<float>(total);
    } else if (i < at.bias) {
      store_one(static_cast<unsigned char*>(p.d_query) + (i - at.query) * size_of(p.types.query),
                p.types.query, total);
    } else if (i < at.head_bias) {
      store_one(static_cast<unsigned char*>(p.d_bias) + (i - at.bias) * size_of(p.types.bias), p.types.bias,
                total);
    } else {
      store_one(static_cast<unsigned char*>(p.d_head_bias) + (i - at.head_bias) * size_of(p.head_bias_dtype),
                p.head_bias_dtype, total);
    }
  };
  if (groups == 1) return add_partials(p.partial, at.length, members, at.length, finish);
  double* own = p.partial + begin * at.length;
  add_partials(own, at.length, members, at.length, [&](int64_t i, double total) { own[i] = total; });
  if (!arrives_last(p.tickets, static_cast<unsigned>(groups), flag)) return;
  add_partials(p.partial, kMfdGroup * at.length, static_cast<int>(groups), at.length, finish);
}

// One kernel for all calls: whatever they need, a processor has registers for one block.
template <int kUnused = 0>
__global__ void __launch_bounds__(kMfdThreads, 1) mfd_single_pass(const __grid_constant__ MfdLaunch launch) {
  const MfdPass& p = launch.pass;
  const MfdBlock block(launch);
  block.begin();
#pragma unroll 1
  for (int k = warp_of(); k < kMfdRows; k += kMfdWarps) pool_row_of(launch, k);
  __syncthreads();
  block.find_logits();
#pragma unroll 1
  for (int k = warp_of(); k < kMfdRows; k += kMfdWarps) logit_row_of(launch, k);
  __syncthreads();
  double* partial = p.partial + static_cast<int64_t>(blockIdx.x) * mfd_partials(p).length;
  if (threadIdx.x < kMfdTerms) {
    double total = 0;
    for (int k = 0; k < block.members; ++k) total += block.shared.rows[k].terms[threadIdx.x];
    partial[threadIdx.x] = total;
  }
  if (p.wants_logits) block.find_gradients(partial);
  finish_sums(p, reinterpret_cast<unsigned*>(&block.shared));
}

}  // namespace device
}  // namespace mfd
