#include "cpu/runtime/distill.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "common/rows/row_math.h"
#include "cpu/runtime/isa.h"
#include "cpu/runtime/workers.h"

namespace mfd {
namespace {

constexpr int64_t kChunksPerThread = 8;

thread_local Arena worker_arena;
thread_local Arena caller_arena;

struct RowScratchSizes {
  int64_t row;  // elements of a scratch row
  bool own_exp, capped, difference;
  size_t element;
  bool listed = false;   // a sparse teacher's
  int64_t teachers = 0;  // several, with this many elements of a row
  int64_t mixture = 0;
};

void take_row(ArenaLayout& layout, const RowScratchSizes& needs, int64_t blocks, Scratch& s) {
  const size_t bytes = static_cast<size_t>(needs.row) * needs.element;
  s.exp_s = layout.take(bytes);
  s.exp_t = layout.take(bytes);
  if (needs.own_exp) s.exp_h = layout.take(bytes);
  if (needs.capped) s.capped = layout.take(bytes);
  if (needs.difference) s.difference = layout.take(bytes);
  if (needs.teachers) {
    s.mixture = layout.take(static_cast<size_t>(needs.mixture) * needs.element);
    const size_t rows = static_cast<size_t>(needs.teachers * (kBlock / kRowAlign));
    s.teachers = static_cast<TeacherRow*>(layout.take(rows * sizeof(TeacherRow)));
  }
  const int64_t sums = std::max(blocks, kBlock / kRowAlign);
  s.sums = static_cast<BlockSums*>(layout.take(static_cast<size_t>(sums) * sizeof(BlockSums)));
}

void take_blocks(ArenaLayout& layout, const RowScratchSizes& needs, Scratch& s) {
  const size_t bytes = static_cast<size_t>(kBlock) * needs.element;
  s.block_x = layout.take(bytes);
  s.block_y = layout.take(bytes);
  s.block_out = layout.take(bytes);
  s.to_u = layout.take(bytes);
  s.to_v = layout.take(bytes);
  if (!needs.listed) return;
  for (void*& array : s.listed) array = layout.take(bytes);
  for (int64_t** array : {&s.columns, &s.slots})
    *array = static_cast<int64_t*>(layout.take(kBlock * sizeof(int64_t)));
  const size_t starts = static_cast<size_t>(needs.row / kBlock + 2) * sizeof(int64_t);
  s.first = static_cast<int64_t*>(layout.take(starts));
}

// Scratch for whole rows (or for blocks only), from this thread's arena; false without memory.
bool worker_scratch(const RowScratchSizes& needs, int64_t blocks, bool whole_rows, Scratch& s) {
  for (char* base = nullptr;;) {
    ArenaLayout layout(base);
    if (whole_rows) take_row(layout, needs, blocks, s);
    take_blocks(layout, needs, s);
    if (base) return true;
    base = worker_arena.reserve(layout.used());
    if (!base) return false;
  }
}

// Runs body(begin, end, scratch) over chunks of rows.
template <class Body>
void over_rows(int64_t n_rows, const RowScratchSizes& needs, int64_t blocks, int threads, const Body& body) {
  const int64_t chunk =
      std::max<int64_t>(1, (n_rows + threads * kChunksPerThread - 1) / (threads * kChunksPerThread));
  const int64_t chunks = (n_rows + chunk - 1) / chunk;
  std::atomic<bool> failed{false};
  const auto work = [&](int64_t first, int64_t last, Scratch& scratch) {
    for (int64_t k = first; k < last; ++k) body(k * chunk, std::min((k + 1) * chunk, n_rows), scratch);
  };
  if (threads == 1) {
    Scratch scratch{};
    if (!worker_scratch(needs, blocks, true, scratch)) throw std::bad_alloc();
    work(0, chunks, scratch);
    worker_arena.trim();
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch{};
    if (!worker_scratch(needs, blocks, true, scratch)) failed = true;
#pragma omp barrier
    if (!failed) {
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t k = 0; k < chunks; ++k) work(k, k + 1, scratch);
    }
    worker_arena.trim();
  }
  if (failed) throw std::bad_alloc();
}

// Few long rows: the blocks of each row are shared between the threads.
void forward_by_blocks(const Forward& f, const RowScratchSizes& needs, int64_t blocks, int threads,
                       char* base) {
  const Kernels& table = kernels();
  Scratch shared{};
  ArenaLayout layout(base);
  take_row(layout, needs, blocks, shared);
  std::atomic<bool> failed{false};
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch = shared;
    if (!worker_scratch(needs, blocks, false, scratch)) failed = true;
#pragma omp barrier
    if (!failed) {
      const int64_t workers = omp_get_num_threads(), worker = omp_get_thread_num();
      const int64_t begin = blocks * worker / workers, end = blocks * (worker + 1) / workers;
      for (int64_t row = 0; row < f.problem.n_rows; ++row) {
        table.forward_sums(f, row, begin, end, scratch);
#pragma omp barrier
        if (f.use_soft && is_pointwise(f.problem.divergence)) {
          table.forward_points(f, row, begin, end, scratch);
#pragma omp barrier
        }
        if (begin < end) table.forward_outputs(f, row, begin, end, scratch);
#pragma omp barrier
      }
    }
  }
  if (failed) throw std::bad_alloc();
}

RowScratchSizes needs_of(const RowProblem& p, bool own_exp, bool capped, bool difference, int64_t row) {
  RowScratchSizes needs = {row, own_exp, capped, difference, p.is_double ? sizeof(double) : sizeof(float)};
  if (p.mixture) {
    needs.teachers = p.mixture->count;
    needs.mixture = block_count(p.classes) * kBlock;
  }
  return needs;
}

}  // namespace

int64_t count_rows(const RowProblem& p) {
  if (!p.labels) {
    if (!p.mask) return p.n_rows;
    int64_t counted = 0;
    for (int64_t row = 0; row < p.n_rows; ++row) counted += p.mask[row] != 0;
    return counted;
  }
  int64_t counted = 0;
  for (int64_t row = 0; row < p.n_rows; ++row) {
    if (!is_counted(p, row)) continue;
    if (is_labelled(p, row) && (p.labels[row] < 0 || p.labels[row] >= p.classes)) return -1 - row;
    ++counted;
  }
  return counted;
}

int64_t count_labelled(const RowProblem& p) {
  int64_t labelled = 0;
  for (int64_t row = 0; row < p.n_rows; ++row) labelled += is_counted(p, row) && is_labelled(p, row);
  return labelled;
}

double forward(Forward f, bool wants_sum, int threads) {
  const RowProblem& p = f.problem;
  const int64_t blocks = block_count(p.classes);
  // Scratch rows are whole blocks, so that vectors may run past the last class.
  const bool exp_at_one = f.use_hard || (f.use_soft && p.divergence == Divergence::kNKD);
  const bool prepared = p.student.standardize || p.teacher.standardize || (f.use_soft && p.mixture);
  const RowScratchSizes needs = needs_of(p, exp_at_one, p.student.softcap > 0 || p.student.standardize,
                                         f.use_soft && is_pointwise(p.divergence), blocks * kBlock);
  threads = usable_threads(threads, p.n_rows * p.classes);
  // A standardised row and a mixture of teachers need sums over all of it before the first pass: not shared.
  const bool by_blocks =
      threads > 1 && p.n_rows < 4 * threads && p.n_rows % threads != 0 && blocks >= 4 * threads && !prepared;

  ArenaLayout measure(nullptr);
  Scratch unused{};
  if (by_blocks) take_row(measure, needs, blocks, unused);
  const size_t row_bytes = measure.used();
  char* base = nullptr;
  if (wants_sum || by_blocks) {
    base = caller_arena.reserve(row_bytes + static_cast<size_t>(p.n_rows + 1) * sizeof(double));
    if (!base) throw std::bad_alloc();
  }
  if (wants_sum) f.row_loss = reinterpret_cast<double*>(base + row_bytes);
  if (by_blocks) {
    forward_by_blocks(f, needs, blocks, threads, base);
  } else {
    const Kernels& table = kernels();
    over_rows(p.n_rows, needs, blocks, threads,
              [&](int64_t begin, int64_t end, const Scratch& s) { table.forward_rows(f, begin, end, s); });
  }
  double sum = 0;
  if (wants_sum)
    for (int64_t row = 0; row < p.n_rows; ++row) sum += f.row_loss[row];
  caller_arena.trim();
  return sum;
}

void backward(const Backward& g, int threads) {
  const RowProblem& p = g.problem;
  const Kernels& table = kernels();
  over_rows(p.n_rows, needs_of(p, p.labels != nullptr, false, false, kBlock), 1,
            usable_threads(threads, p.n_rows * p.classes),
            [&](int64_t begin, int64_t end, const Scratch& s) { table.backward_rows(g, begin, end, s); });
}

bool lists_are_valid(const RowProblem& p, const TopK& teacher, int threads) {
  const bool needs_label = decouples_target(p.divergence);
  std::atomic<bool> valid{true}, failed{false};
#pragma omp parallel num_threads(usable_threads(threads, p.n_rows* teacher.listed))
  try {
    const int64_t workers = omp_get_num_threads(), worker = omp_get_thread_num();
    // The last row that lists each class, modulo 255: nothing need be taken back after a row.
    std::vector<unsigned char> last(static_cast<size_t>(p.classes));
    unsigned char mark = 0;
    for (int64_t row = p.n_rows * worker / workers; row < p.n_rows * (worker + 1) / workers; ++row) {
      if (!is_counted(p, row)) continue;
      if (mark == 255) std::fill(last.begin(), last.end(), static_cast<unsigned char>(mark = 0));
      ++mark;
      const int64_t* indices = teacher.indices + row * teacher.listed;
      bool good = true;
      for (int64_t k = 0; k < teacher.listed; ++k) {
        const uint64_t column = static_cast<uint64_t>(indices[k]);
        if (column >= static_cast<uint64_t>(p.classes)) {
          good = false;
          break;
        }
        good = good && last[column] != mark;
        last[column] = mark;
      }
      if (needs_label && good) good = last[static_cast<size_t>(p.labels[row])] == mark;
      if (!good) valid = false;
    }
  } catch (const std::bad_alloc&) {
    failed = true;
  }
  if (failed) throw std::bad_alloc();
  return valid;
}

double topk(TopKPass pass, bool wants_sum, int threads) {
  Forward& f = pass.forward;
  const RowProblem& p = f.problem;
  const int64_t blocks = block_count(p.classes);
  const bool exp_at_one = f.use_hard || p.divergence == Divergence::kNKD;
  const bool capped = p.student.softcap > 0 || p.student.standardize;
  RowScratchSizes needs = needs_of(p, exp_at_one, capped, false, blocks * kBlock);
  needs.listed = true;
  if (wants_sum) {
    f.row_loss =
        reinterpret_cast<double*>(caller_arena.reserve(static_cast<size_t>(p.n_rows + 1) * sizeof(double)));
    if (!f.row_loss) throw std::bad_alloc();
  }
  const Kernels& table = kernels();
  over_rows(p.n_rows, needs, blocks, usable_threads(threads, p.n_rows * p.classes),
            [&](int64_t begin, int64_t end, const Scratch& s) { table.topk_rows(pass, begin, end, s); });
  double sum = 0;
  if (wants_sum)
    for (int64_t row = 0; row < p.n_rows; ++row) sum += f.row_loss[row];
  caller_arena.trim();
  return sum;
}

void stream_add(const float* a, const float* b, float* out, int64_t n, int threads) {
  const Kernels& table = kernels();
  constexpr int64_t kChunk = 16384;
  const int64_t chunks = (n + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(usable_threads(threads, n)) schedule(static)
  for (int64_t k = 0; k < chunks; ++k)
    table.add(a + k * kChunk, b + k * kChunk, out + k * kChunk, std::min(kChunk, n - k * kChunk));
}

}  // namespace mfd
