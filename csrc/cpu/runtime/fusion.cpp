#include "cpu/runtime/fusion.h"

#include <omp.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <new>

#include "common/rows/row_math.h"
#include "cpu/runtime/distill.h"
#include "cpu/runtime/isa.h"
#include "cpu/runtime/workers.h"

namespace mfd {
namespace {

thread_local Arena worker_arena;
thread_local Arena caller_arena;

// Chunks of rows have one size for any number of threads: sums over chunks are then the same.
constexpr int64_t kMaxChunks = 128;
constexpr int64_t kTapElements = 16384;

struct FusionScratchSizes {
  size_t row_bytes;
  int in, out;
};

bool worker_scratch(const FusionScratchSizes& needs, FusionScratch& s) {
  for (char* base = nullptr;;) {
    ArenaLayout layout(base);
    for (int m = 0; m < needs.in; ++m) s.in[m] = layout.take(needs.row_bytes);
    for (int m = 0; m < needs.out; ++m) s.out[m] = layout.take(needs.row_bytes);
    for (void** row : {&s.upstream, &s.target, &s.pooled}) *row = layout.take(needs.row_bytes);
    if (base) return true;
    base = worker_arena.reserve(layout.used());
    if (!base) return false;
  }
}

// Runs body(chunk, scratch) for every chunk.
template <class Body>
void over_chunks(int64_t chunks, const FusionScratchSizes& needs, int threads, const Body& body) {
  if (threads == 1) {
    FusionScratch scratch{};
    if (!worker_scratch(needs, scratch)) throw std::bad_alloc();
    for (int64_t k = 0; k < chunks; ++k) body(k, scratch);
    worker_arena.trim();
    return;
  }
  std::atomic<bool> failed{false};
#pragma omp parallel num_threads(threads)
  {
    FusionScratch scratch{};
    if (!worker_scratch(needs, scratch)) failed = true;
#pragma omp barrier
    if (!failed) {
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t k = 0; k < chunks; ++k) body(k, scratch);
    }
    worker_arena.trim();
  }
  if (failed) throw std::bad_alloc();
}

size_t element_size(bool is_double) {
  return is_double ? sizeof(double) : sizeof(float);
}

int64_t chunk_rows(int64_t n_rows) {
  const int64_t rows = (n_rows + kMaxChunks - 1) / kMaxChunks;
  return std::max((rows + kSumRows - 1) / kSumRows * kSumRows, kSumRows);
}

template <class T>
void store(void* out, int64_t i, double value) {
  static_cast<T*>(out)[i] = static_cast<T>(value);
}

}  // namespace

void pool_forward(const PoolForward& f, int threads) {
  const PoolProblem& p = *f.pool;
  const FusionKernels& table = *kernels().fusion;
  const int64_t rows = chunk_rows(p.n_rows), chunks = (p.n_rows + rows - 1) / rows;
  const FusionScratchSizes needs = {static_cast<size_t>(p.width) * element_size(p.is_double), p.modalities,
                                    0};
  over_chunks(chunks, needs, usable_threads(threads, p.n_rows * p.width * p.modalities),
              [&](int64_t k, const FusionScratch& s) {
                table.pool_forward(f, k * rows, std::min((k + 1) * rows, p.n_rows), s);
              });
}

void pool_backward(const PoolBackward& g, int threads) {
  const PoolProblem& p = *g.pool;
  const FusionKernels& table = *kernels().fusion;
  const size_t size = element_size(p.is_double);
  const int64_t rows = chunk_rows(p.n_rows), chunks = (p.n_rows + rows - 1) / rows;
  const int64_t query = g.d_query ? p.width : 0, logits = g.d_head_bias ? g.classes : 0;
  const int64_t modalities = p.modalities;
  char *queries = nullptr, *sums = nullptr;
  double* bias = nullptr;
  double* temperature = nullptr;
  for (char* base = nullptr;;) {
    ArenaLayout layout(base);
    queries = static_cast<char*>(layout.take(static_cast<size_t>(2 * chunks * query) * size));
    sums = static_cast<char*>(layout.take(static_cast<size_t>(2 * chunks * logits) * size));
    bias = static_cast<double*>(layout.take(static_cast<size_t>(chunks * modalities) * sizeof(double)));
    temperature = static_cast<double*>(layout.take(static_cast<size_t>(chunks) * sizeof(double)));
    if (base) break;
    base = caller_arena.reserve(layout.used());
    if (!base) throw std::bad_alloc();
  }
  const size_t query_bytes = static_cast<size_t>(query) * size;
  const size_t logits_bytes = static_cast<size_t>(logits) * size;
  const FusionScratchSizes needs = {static_cast<size_t>(p.width) * size, p.modalities, p.modalities};
  over_chunks(chunks, needs, usable_threads(threads, p.n_rows * p.width * p.modalities),
              [&](int64_t k, const FusionScratch& s) {
                PoolPartial partial{};
                if (query) {
                  partial.query = queries + 2 * static_cast<size_t>(k) * query_bytes;
                  partial.query_block = static_cast<char*>(partial.query) + query_bytes;
                  memset(partial.query, 0, 2 * query_bytes);
                }
                if (logits) {
                  partial.logits = sums + 2 * static_cast<size_t>(k) * logits_bytes;
                  partial.logits_block = static_cast<char*>(partial.logits) + logits_bytes;
                  memset(partial.logits, 0, 2 * logits_bytes);
                }
                partial.bias = bias + k * modalities;
                std::fill_n(partial.bias, modalities, 0.0);
                partial.wants_temperature = g.d_temperature || g.d_row_temperature;
                table.pool_backward(g, k * rows, std::min((k + 1) * rows, p.n_rows), s, partial);
                temperature[k] = partial.temperature;
              });
  const auto put = p.is_double ? store<double> : store<float>;
  if (query && chunks) table.add_parts(queries, chunks, 2 * query, query, p.is_double, g.d_query);
  if (logits && chunks) table.add_parts(sums, chunks, 2 * logits, logits, p.is_double, g.d_head_bias);
  if (query && !chunks) memset(g.d_query, 0, query_bytes);
  if (logits && !chunks) memset(g.d_head_bias, 0, logits_bytes);
  for (int64_t m = 0; g.d_bias && m < modalities; ++m) {
    double sum = 0;
    for (int64_t k = 0; k < chunks; ++k) sum += bias[k * modalities + m];
    put(g.d_bias, m, sum);
  }
  if (g.d_temperature) {
    double sum = 0;
    for (int64_t k = 0; k < chunks; ++k) sum += temperature[k];
    put(g.d_temperature, 0, sum);
  }
  caller_arena.trim();
}

double tap_rows(std::vector<Tap>& taps, FeatureKind kind, bool is_double, bool per_row, bool mean,
                int threads) {
  const FusionKernels& table = *kernels().fusion;
  struct Chunk {
    size_t tap;
    int64_t begin, end;
  };
  std::vector<Chunk> chunks;
  std::vector<double*> values;
  int64_t total_rows = 0, elements = 0, width = 1;
  for (size_t t = 0; t < taps.size(); ++t) {
    Tap& tap = taps[t];
    const int64_t rows = std::max<int64_t>(1, kTapElements / tap.width);
    for (int64_t row = 0; row < tap.n_rows; row += rows)
      chunks.push_back({t, row, std::min(row + rows, tap.n_rows)});
    total_rows += tap.n_rows;
    elements += tap.n_rows * tap.width;
    width = std::max(width, tap.width);
    if (per_row) continue;
    int64_t existing = tap.n_rows;
    if (tap.mask)
      existing = std::count_if(tap.mask, tap.mask + tap.n_rows, [](unsigned char b) { return b != 0; });
    const double each = kind == kCosine ? 1.0 : static_cast<double>(tap.width);
    tap.grad_rows = {
        nullptr, 0,
        mean ? tap.weight / static_cast<double>(std::max<int64_t>(existing, 1)) : tap.weight * each};
  }
  if (!per_row) {
    char* base = caller_arena.reserve(static_cast<size_t>(total_rows + 1) * sizeof(double));
    if (!base) throw std::bad_alloc();
    double* next = reinterpret_cast<double*>(base);
    for (const Tap& tap : taps) {
      values.push_back(next);
      next += tap.n_rows;
    }
  }
  const FusionScratchSizes needs = {static_cast<size_t>(width) * element_size(is_double), 1, 1};
  over_chunks(static_cast<int64_t>(chunks.size()), needs, usable_threads(threads, elements),
              [&](int64_t k, const FusionScratch& s) {
                const Chunk& c = chunks[static_cast<size_t>(k)];
                double* rows = per_row ? nullptr : values[c.tap];
                table.tap_rows(taps[c.tap], kind, is_double, c.begin, c.end, s, rows);
              });
  double total = 0;
  for (size_t t = 0; t < values.size(); ++t) {
    double sum = 0;
    for (int64_t row = 0; row < taps[t].n_rows; ++row) sum += values[t][row];
    total += taps[t].grad_rows.value * sum;
  }
  caller_arena.trim();
  return total;
}

namespace {

void product_by(ProductKernel kernel, const Product& p, int threads) {
  constexpr int64_t kRows = 256;
  const int64_t width = kernels().fusion->product_columns();
  const int64_t bands = (p.rows + kRows - 1) / kRows, panels = (p.columns + width - 1) / width;
#pragma omp parallel for num_threads(usable_threads(threads, p.rows* p.columns* p.depth / 16)) \
    schedule(dynamic, 1)
  for (int64_t k = 0; k < bands * panels; ++k) {
    const int64_t begin = k / panels * kRows;
    kernel(p, begin, std::min(begin + kRows, p.rows), k % panels * width);
  }
}

}  // namespace

void product(const Product& p, int threads) {
  product_by(kernels().fusion->product, p, threads);
}

void pair_product(const Product& p, int threads) {
  product_by(product_of_pairs(), p, threads);
}

namespace {

void predict(const RowProblem& p, int64_t* out, int threads) {
  const FusionKernels& table = *kernels().fusion;
  constexpr int64_t kRows = 16;
  const int64_t chunks = (p.n_rows + kRows - 1) / kRows;
#pragma omp parallel for num_threads(usable_threads(threads, p.n_rows* p.classes)) schedule(static)
  for (int64_t k = 0; k < chunks; ++k) table.predict(p, k * kRows, std::min((k + 1) * kRows, p.n_rows), out);
}

template <class T>
MfdSums weighted_sums(const MfdRows& m) {
  MfdSums sums{};
  const T *soft = static_cast<const T*>(m.soft), *hard = static_cast<const T*>(m.hard);
  for (int64_t row = 0; row < m.problem.n_rows; ++row) {
    if (!is_counted(m.problem, row)) continue;
    const double w = at<T>(m.weight, row);
    if (m.use_soft) sums.soft += w * soft[row];
    if (m.use_hard) sums.hard += w * hard[row];
    if (m.feature) sums.feature += w * m.feature[row].value;
    double rest = 0;
    if (m.feature) rest += m.feature_factor * m.feature[row].value;
    if (m.pool_kl) rest += m.pool_factor * m.pool_kl[row];
    sums.loss += w * rest;
  }
  return sums;
}

}  // namespace

MfdSums mfd_rows(const MfdRows& m, int threads) {
  predict(m.problem, m.predictions, threads);
  double rows = 0;
  if (m.use_soft || m.use_hard) {
    Forward f{};
    f.problem = m.problem;
    f.use_soft = m.use_soft;
    f.use_hard = m.use_hard;
    f.weight = m.weight;
    f.soft_factor = m.soft_factor / m.divisor;
    f.hard_factor = m.hard_factor / m.hard_divisor;
    f.soft = m.soft;
    f.hard = m.hard;
    f.grad = m.grad;
    f.stream = m.stream;
    rows = forward(f, true, threads);
  }
  MfdSums sums = m.problem.is_double ? weighted_sums<double>(m) : weighted_sums<float>(m);
  sums.loss = rows + sums.loss / m.divisor;
  sums.soft /= m.divisor;
  sums.hard /= m.hard_divisor;
  sums.feature /= m.divisor;
  return sums;
}

}  // namespace mfd
