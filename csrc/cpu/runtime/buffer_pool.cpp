#include "cpu/runtime/buffer_pool.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <list>
#include <mutex>

namespace mfd {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kDefaultLimit = size_t{1} << 30;

struct BufferPool {
  std::mutex mutex;
  std::list<Buffer> idle;  // longest idle first
  PoolStats stats{};
};

// Never destroyed: tensors may outlive the module's static objects.
BufferPool& pool() {
  static BufferPool* const instance = [] {
    auto* p = new BufferPool;
    const size_t ram =
        static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGE_SIZE));
    p->stats.limit = std::min(kDefaultLimit, ram / 8);
    if (const char* megabytes = getenv("MFD_FAST_GRAD_POOL_MB")) {
      char* end = nullptr;
      const double value = strtod(megabytes, &end);
      if (end != megabytes && *end == '\0' && value >= 0 && value < 1e9)
        p->stats.limit = static_cast<size_t>(value * 1048576.0);
    }
    // A fork must not copy a mutex that another thread holds.
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
    return p;
  }();
  return *instance;
}

// Aligned to huge pages, and advised to be made of them before the first touch.
Buffer map(size_t bytes) {
  const size_t capacity = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* raw = mmap(nullptr, capacity + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return {};
  char* const start = static_cast<char*>(raw);
  const size_t skip = (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
  if (skip) munmap(start, skip);
  munmap(start + skip + capacity, kHugePage - skip);
#if defined(MADV_HUGEPAGE)
  madvise(start + skip, capacity, MADV_HUGEPAGE);
#endif
  return {start + skip, capacity};
}

// Buffers to unmap once the lock is released.
void evict(BufferPool& p, size_t limit, std::list<Buffer>& out) {
  while (p.stats.idle_bytes > limit) {
    p.stats.idle_bytes -= p.idle.front().capacity;
    out.splice(out.end(), p.idle, p.idle.begin());
  }
}

void unmap(const std::list<Buffer>& buffers) {
  for (const Buffer& b : buffers) munmap(b.data, b.capacity);
}

}  // namespace

Buffer pool_take(size_t bytes) {
  BufferPool& p = pool();
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    if (p.stats.limit == 0 || bytes == 0) return {};
    // Best fit, wasting at most a quarter.
    auto best = p.idle.end();
    for (auto b = p.idle.begin(); b != p.idle.end(); ++b) {
      if (b->capacity < bytes || b->capacity > bytes + std::max(kHugePage, bytes / 4)) continue;
      if (best == p.idle.end() || b->capacity <= best->capacity) best = b;
    }
    if (best != p.idle.end()) {
      const Buffer found = *best;
      p.idle.erase(best);
      p.stats.idle_bytes -= found.capacity;
      p.stats.live_bytes += found.capacity;
      ++p.stats.live_buffers;
      ++p.stats.reused;
      return found;
    }
  }
  Buffer fresh = map(bytes);
  if (!fresh.data) {
    pool_clear();
    fresh = map(bytes);
    if (!fresh.data) return {};
  }
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.stats.live_bytes += fresh.capacity;
  ++p.stats.live_buffers;
  ++p.stats.mapped;
  return fresh;
}

void pool_give_back(Buffer buffer) {
  BufferPool& p = pool();
  std::list<Buffer> evicted;
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.stats.live_bytes -= buffer.capacity;
    --p.stats.live_buffers;
    p.idle.push_back(buffer);
    p.stats.idle_bytes += buffer.capacity;
    evict(p, p.stats.limit, evicted);
  }
  unmap(evicted);
}

void pool_set_limit(size_t bytes) {
  BufferPool& p = pool();
  std::list<Buffer> evicted;
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.stats.limit = bytes;
    evict(p, bytes, evicted);
  }
  unmap(evicted);
}

void pool_clear() {
  BufferPool& p = pool();
  std::list<Buffer> evicted;
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    evict(p, 0, evicted);
  }
  unmap(evicted);
}

PoolStats pool_stats() {
  BufferPool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  PoolStats stats = p.stats;
  stats.idle_buffers = p.idle.size();
  return stats;
}

}  // namespace mfd
