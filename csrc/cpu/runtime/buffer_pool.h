// Recycled memory for large gradients. Touching fresh pages costs several times what writing the gradient
// does.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mfd {

// Page-aligned memory; `capacity` is what was mapped.
struct Buffer {
  void* data = nullptr;
  size_t capacity = 0;
};

struct PoolStats {
  size_t limit, idle_bytes, live_bytes, idle_buffers, live_buffers;
  uint64_t reused, mapped;
};

// All functions may be called from any thread, and in a forked child. A buffer belongs to its taker until it
// is given back, so two takers never share one. At most `limit` bytes lie idle; the longest idle are unmapped
// first.
Buffer pool_take(size_t bytes);  // data is null when the pool is off or memory is short
void pool_give_back(Buffer buffer);
void pool_set_limit(size_t bytes);  // 0 turns the pool off
void pool_clear();
PoolStats pool_stats();

}  // namespace mfd
