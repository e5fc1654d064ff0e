#include "cpu/runtime/workers.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>

namespace mfd {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kSerialElements = 32768;

// A forked child has none of its parent's OpenMP threads and would wait for them for ever: it stays serial.
std::atomic<bool> forked{false};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

int usable_threads(int threads, int64_t elements) {
  (void)fork_handler;
  if (forked || elements < kSerialElements || omp_in_parallel()) return 1;
  return std::max(threads, 1);
}

}  // namespace mfd
