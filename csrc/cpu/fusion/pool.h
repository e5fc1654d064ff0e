// Attention over modalities: forward, with what is compared to the pooled row, and backward.
#pragma once

#include "cpu/distill/sums.h"
#include "cpu/fusion/feature.h"
#include "cpu/rows/matrix_rows.h"
#include "cpu/runtime/kernels.h"
#include "cpu/simd/row_ends.h"

namespace mfd::MFD_ISA {
namespace {

// The modalities of one row that exist. E: the features' elements, or what they are converted to.
template <class E>
struct Present {
  int count = 0;
  int index[kMaxModalities];
  const E* x[kMaxModalities];

  Present(const PoolProblem& p, int64_t row, int64_t end, const FusionScratch& scratch) {
    if (p.rows && !is_counted(*p.rows, row)) return;
    const unsigned char* present = p.present ? p.present + row * p.modalities : nullptr;
    for (int m = 0; m < p.modalities; ++m) {
      if (present && !present[m]) continue;
      prefetch(p.features[m], row + 1, end, p.width);
      x[count] = row_in(p.features[m], row, p.width, static_cast<E*>(scratch.in[count]));
      index[count++] = m;
    }
  }
};

// sums[k] = <y, x[k]> for kRows rows that share the reading of y.
template <class S, int kRows, class E>
static void dots_of(const E* const* x, const typename S::T* y, int64_t n, double* sums) {
  typedef typename S::V V;
  constexpr int64_t W = S::kWidth;
  constexpr int kParts = 4;
  V acc[kRows][kParts] = {};
  const auto step = [&](int part, int64_t i, int64_t left) __attribute__((always_inline)) {
    const V b = load_upto<S>(y + i, left);
    for (int k = 0; k < kRows; ++k) acc[k][part] = S::fma(load_upto<S>(x[k] + i, left), b, acc[k][part]);
  };
  int64_t i = 0;
  for (; i + kParts * W <= n; i += kParts * W)
    for (int part = 0; part < kParts; ++part) step(part, i + part * W, W);
  for (int part = 0; i < n; i += W, ++part) step(part, i, n - i < W ? n - i : W);
  for (int k = 0; k < kRows; ++k) sums[k] = S::sum((acc[k][0] + acc[k][1]) + (acc[k][2] + acc[k][3]));
}

template <class S, class E>
static void dots(int count, const E* const* x, const typename S::T* y, int64_t n, double* sums) {
  int k = 0;
  for (; k + 2 <= count; k += 2) dots_of<S, 2>(x + k, y, n, sums + k);
  if (k < count) dots_of<S, 1>(x + k, y, n, sums + k);
}

// out = sum_k a[k]*x[k]; kCount 0: any number of them.
template <class S, int kCount, class E>
static void weighted_rows(const E* const* x, const typename S::T* a, int any, int64_t n, typename S::T* out) {
  typedef typename S::V V;
  const int count = kCount ? kCount : any;
  V factors[kCount ? kCount : kMaxModalities];
  for (int k = 0; k < count; ++k) factors[k] = S::splat(a[k]);
  over_vectors<S>(
      n, MFD_STEP {
        V sum{};
        for (int k = 0; k < count; ++k) sum = S::fma(factors[k], load_upto<S>(x[k] + i, left), sum);
        store_upto<S>(out + i, sum, left);
      });
}

template <class S, class E>
static void weighted_rows_of(int count, const E* const* x, const typename S::T* a, int64_t n,
                             typename S::T* out) {
  switch (count) {
    case 1:
      return weighted_rows<S, 1>(x, a, count, n, out);
    case 2:
      return weighted_rows<S, 2>(x, a, count, n, out);
    case 3:
      return weighted_rows<S, 3>(x, a, count, n, out);
    case 4:
      return weighted_rows<S, 4>(x, a, count, n, out);
    default:
      return weighted_rows<S, 0>(x, a, count, n, out);
  }
}

// a[k], the softmax over the present modalities, in double precision. A NaN score makes all of them NaN.
// log_a: their logarithms, finite where a[k] is 0; null: not wanted.
template <class S, class E>
static void pool_softmax(const PoolProblem& p, int64_t row, const Present<E>& in, double* a, double* log_a) {
  typedef typename S::T T;
  const T* bias = static_cast<const T*>(p.bias);
  const double temperature = at<T>(p.temperature, row);
  double largest = -kInf, sum = 0;
  if (p.query) dots<S>(in.count, in.x, static_cast<const T*>(p.query), p.width, a);
  for (int k = 0; k < in.count; ++k) {
    double score = 0;
    if (p.query) {
      score = p.scale * a[k];
    } else if (p.scores) {
      score = static_cast<const T*>(p.scores)[row * p.modalities + in.index[k]];
    }
    if (bias) score += bias[in.index[k]];
    a[k] = score;
    if (score > largest) largest = score;
  }
  for (int k = 0; k < in.count; ++k) {
    const double exponent = (a[k] - largest) / temperature;
    if (log_a) log_a[k] = exponent;
    a[k] = exp(exponent);
    sum += a[k];
  }
  for (int k = 0; k < in.count; ++k) a[k] /= sum;
  if (!log_a) return;
  const double log_sum = log(sum);
  for (int k = 0; k < in.count; ++k) log_a[k] -= log_sum;
}

// KL(target || a) over the modalities.
template <class T, class E>
static double pool_divergence(const T* target, const Present<E>& in, const double* log_a, int modalities) {
  double kl = 0;
  for (int m = 0, k = 0; m < modalities; ++m) {
    const bool on = k < in.count && in.index[k] == m;
    kl += pool_kl_term(target[m], on ? log_a[k++] : -kInf);
  }
  return kl < 0 ? 0.0 : kl;
}

template <class S, class E>
static void pool_forward_of(const PoolForward& f, int64_t begin, int64_t end, const FusionScratch& scratch) {
  typedef typename S::T T;
  const PoolProblem& p = *f.pool;
  const int64_t bytes = p.width * dtype_size(f.pooled_dtype);
  for (int64_t row = begin; row < end; ++row) {
    const Present<E> in(p, row, end, scratch);
    double exact[kMaxModalities], log_a[kMaxModalities];
    T a[kMaxModalities];
    pool_softmax<S>(p, row, in, exact, f.pool_kl ? log_a : nullptr);
    T* weights = static_cast<T*>(f.weights) + row * p.modalities;
    for (int m = 0; m < p.modalities; ++m) weights[m] = T(0);
    for (int k = 0; k < in.count; ++k) weights[in.index[k]] = a[k] = static_cast<T>(exact[k]);
    char* pooled = static_cast<char*>(f.pooled) + row * bytes;
    T* y = row_target(f.pooled_dtype, f.stream, pooled, static_cast<T*>(scratch.pooled));
    weighted_rows_of<S>(in.count, in.x, a, p.width, y);
    const bool counted = !p.rows || is_counted(*p.rows, row);
    if (f.feature) {
      f.feature[row] = FeatureRow{};
      if (counted) {
        const T* target = row_in(f.target, row, p.width, static_cast<T*>(scratch.target));
        f.feature[row] = feature_row_of<S>(f.kind, y, target, p.width);
      }
    }
    if (f.pool_kl) {
      const T* target = static_cast<const T*>(f.pool_target) + row * p.modalities;
      f.pool_kl[row] = counted ? pool_divergence(target, in, log_a, p.modalities) : 0.0;
    }
    row_out(y, p.width, f.pooled_dtype, f.stream, pooled);
  }
}

// Coefficients of one row's backward: dx_k = a[k]*dy + c[k]*query, dquery += c[k]*x_k.
template <class T, class E>
struct RowGradient {
  T a[kMaxModalities], c[kMaxModalities];
  E* dx[kMaxModalities];  // null: not wanted
};

template <class S, int kCount, bool kQuery, class E>
static void pool_row_gradient(const Present<E>& in, const RowGradient<typename S::T, E>& g,
                              const typename S::T* dy, const typename S::T* query, int64_t n,
                              typename S::T* d_query) {
  typedef typename S::V V;
  const int count = kCount ? kCount : in.count;
  V a[kCount ? kCount : kMaxModalities], c[kCount ? kCount : kMaxModalities];
  for (int k = 0; k < count; ++k) {
    a[k] = S::splat(g.a[k]);
    c[k] = S::splat(g.c[k]);
  }
  over_vectors<S>(
      n, MFD_STEP {
        const V up = dy ? load_upto<S>(dy + i, left) : V{};
        const V q = kQuery ? load_upto<S>(query + i, left) : V{};
        V sum = kQuery && d_query ? load_upto<S>(d_query + i, left) : V{};
        for (int k = 0; k < count; ++k) {
          V dx = a[k] * up;
          if (kQuery) {
            dx = S::fma(c[k], q, dx);
            if (d_query) sum = S::fma(c[k], load_upto<S>(in.x[k] + i, left), sum);
          }
          if (g.dx[k]) store_upto<S>(g.dx[k] + i, dx, left);
        }
        if (kQuery && d_query) store_upto<S>(d_query + i, sum, left);
      });
}

template <class S, int kCount, class E>
static void pool_row_gradient_of(const Present<E>& in, const RowGradient<typename S::T, E>& g,
                                 const typename S::T* dy, const typename S::T* query, int64_t n,
                                 typename S::T* d_query) {
  query ? pool_row_gradient<S, kCount, true>(in, g, dy, query, n, d_query)
        : pool_row_gradient<S, kCount, false>(in, g, dy, query, n, d_query);
}

// sum += block; block = 0.
template <class S>
static void flush(void* sum, void* block, int64_t n) {
  typedef typename S::T T;
  T *total = static_cast<T*>(sum), *part = static_cast<T*>(block);
  over_vectors<S>(
      n, MFD_STEP {
        store_upto<S>(total + i, load_upto<S>(total + i, left) + load_upto<S>(part + i, left), left);
        store_upto<S>(part + i, typename S::V{}, left);
      });
}

// dy of one row: the upstream gradient and the feature term's; null where it is 0.
template <class S>
static const typename S::T* row_upstream(const PoolBackward& g, int64_t row, const FusionScratch& scratch) {
  typedef typename S::T T;
  const int64_t n = g.pool->width;
  const T* dy = nullptr;
  if (g.d_pooled.data) dy = row_in(g.d_pooled, row, n, static_cast<T*>(scratch.upstream));
  if (!g.feature) return dy;
  const double factor = at<T>(g.weight, row) * g.feature_factor;
  const T* y = static_cast<const T*>(g.pooled) + row * n;
  const T* t = row_in(g.target, row, n, static_cast<T*>(scratch.target));
  T* sum = static_cast<T*>(scratch.upstream);
  feature_gradient_of<S>(g.kind, y, t, n, factors_of_student(g.feature[row], factor), dy, sum);
  return sum;
}

// ds[k] = d loss/d s_k*temperature.
template <class S, class E>
static void score_gradients(const PoolBackward& g, int64_t row, const Present<E>& in, const typename S::T* dy,
                            double* a, double* ds) {
  typedef typename S::T T;
  const PoolProblem& p = *g.pool;
  const int64_t first = row * p.modalities;
  const T* d_weights = static_cast<const T*>(g.d_weights);
  double mean = 0, mass = 0;
  const T* target = static_cast<const T*>(g.pool_target);
  const double pool = target ? at<T>(g.weight, row) * g.pool_factor : 0.0;
  for (int k = 0; k < in.count; ++k) ds[k] = 0;
  if (dy) dots<S>(in.count, in.x, dy, p.width, ds);
  for (int k = 0; k < in.count; ++k) {
    a[k] = static_cast<const T*>(g.weights)[first + in.index[k]];
    if (d_weights) ds[k] += d_weights[first + in.index[k]];
    mean += a[k] * ds[k];
    if (target) mass += target[first + in.index[k]];
  }
  for (int k = 0; k < in.count; ++k) {
    ds[k] = score_gradient(a[k], ds[k], mean);
    if (target) ds[k] += pool * pool_kl_gradient(a[k], mass, target[first + in.index[k]]);
  }
}

template <class S, class E>
static void pool_backward_row(const PoolBackward& g, int64_t row, int64_t end, const FusionScratch& scratch,
                              PoolPartial& partial) {
  typedef typename S::T T;
  const PoolProblem& p = *g.pool;
  const int64_t n = p.width;
  T* d_scores = g.d_scores ? static_cast<T*>(g.d_scores) + row * p.modalities : nullptr;
  for (int m = 0; d_scores && m < p.modalities; ++m) d_scores[m] = T(0);
  const Present<E> in(p, row, end, scratch);
  const T* dy = in.count ? row_upstream<S>(g, row, scratch) : nullptr;
  double a[kMaxModalities], ds[kMaxModalities];
  score_gradients<S>(g, row, in, dy, a, ds);

  const double temperature = at<T>(p.temperature, row);
  RowGradient<T, E> r;
  char* out[kMaxModalities];
  double d_temperature = 0;
  int next = 0;
  for (int m = 0; m < p.modalities; ++m) {
    const int64_t size = dtype_size(p.features[m].dtype);
    char* dx = g.d_features[m] ? static_cast<char*>(g.d_features[m]) + row * g.d_row_stride * size : nullptr;
    const int k = next;
    if (k >= in.count || in.index[k] != m) {
      if (dx) write_zeros(dx, n * size, g.stream);
      continue;
    }
    ++next;
    const double of_score = ds[k] / temperature;
    if (partial.wants_temperature) d_temperature += temperature_term(a[k], of_score);
    if (partial.bias) partial.bias[m] += of_score;
    if (d_scores) d_scores[m] = static_cast<T>(of_score);
    r.a[k] = static_cast<T>(a[k]);
    r.c[k] = static_cast<T>(of_score * p.scale);
    out[k] = dx;
    r.dx[k] = dx ? row_target(p.features[m].dtype, g.stream, dx, static_cast<E*>(scratch.out[k])) : nullptr;
  }
  partial.temperature += d_temperature;
  put<T>(g.d_row_temperature, row, d_temperature);
  const T* query = static_cast<const T*>(p.query);
  T* d_query = static_cast<T*>(partial.query_block);
  switch (in.count) {
    case 0:
      return;
    case 1:
      pool_row_gradient_of<S, 1>(in, r, dy, query, n, d_query);
      break;
    case 2:
      pool_row_gradient_of<S, 2>(in, r, dy, query, n, d_query);
      break;
    case 3:
      pool_row_gradient_of<S, 3>(in, r, dy, query, n, d_query);
      break;
    case 4:
      pool_row_gradient_of<S, 4>(in, r, dy, query, n, d_query);
      break;
    default:
      pool_row_gradient_of<S, 0>(in, r, dy, query, n, d_query);
  }
  for (int k = 0; k < in.count; ++k)
    if (r.dx[k]) row_out(r.dx[k], n, p.features[in.index[k]].dtype, g.stream, out[k]);
}

template <class S, class E>
static void pool_backward_of(const PoolBackward& g, int64_t begin, int64_t end, const FusionScratch& scratch,
                             PoolPartial& partial) {
  typedef typename S::T T;
  for (int64_t row = begin; row < end; ++row) {
    pool_backward_row<S, E>(g, row, end, scratch, partial);
    if (partial.logits_block) {
      const T* dz = static_cast<const T*>(g.d_logits) + row * g.classes;
      T* sum = static_cast<T*>(partial.logits_block);
      over_vectors<S>(
          g.classes, MFD_STEP {
            store_upto<S>(sum + i, load_upto<S>(sum + i, left) + load_upto<S>(dz + i, left), left);
          });
    }
    if ((row + 1 - begin) % kSumRows && row + 1 < end) continue;
    if (partial.query_block) flush<S>(partial.query, partial.query_block, g.pool->width);
    if (partial.logits_block) flush<S>(partial.logits, partial.logits_block, g.classes);
  }
}

template <class T>
static void add_parts_of(const T* parts, int64_t chunks, int64_t stride, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = parts[i];
  for (int64_t chunk = 1; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < n; ++i) out[i] += parts[chunk * stride + i];
}

// First index of the maximum, a NaN above all: as torch.argmax.
template <class S>
static int64_t argmax(const typename S::T* x, int64_t n) {
  typedef typename S::T T;
  const T largest = block_max<S>(x, n);
  typename S::V odd{};  // NaN where a value is not finite
  for (int64_t i = 0; i < n; i += S::kWidth) odd = odd + load_upto<S>(x + i, n - i) * typename S::V{};
  int64_t best = 0;
  if (S::sum(odd) == T(0) && largest > S::kLowest) {
    while (x[best] < largest) ++best;
    return best;
  }
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] != x[i]) return i;
    if (x[i] > x[best]) best = i;
  }
  return best;
}

template <class S>
static void predict_rows_of(const RowProblem& p, int64_t begin, int64_t end, int64_t* out) {
  typedef typename S::T T;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.student.data) + row_offset(p.student, row);
    out[row] = is_counted(p, row) ? argmax<S>(x, p.classes) : -1;
  }
}

}  // namespace
}  // namespace mfd::MFD_ISA
