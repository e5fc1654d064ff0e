// How many threads work on a call, and the memory that they keep between calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace mfd {

// Threads to use for `elements` elements of which every one is read once.
int usable_threads(int threads, int64_t elements);

constexpr size_t kAlign = 64;

// Memory that a thread keeps between calls.
class Arena {
 public:
  ~Arena() { free(data_); }

  char* reserve(size_t bytes) {
    if (bytes > size_) {
      free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = static_cast<char*>(aligned_alloc(kAlign, size_));
      if (!data_) size_ = 0;
    }
    return data_;
  }
  void trim() {
    if (size_ <= kKept) return;
    free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  // An arena larger than this is given back after the call.
  static constexpr size_t kKept = size_t{8} << 20;
  char* data_ = nullptr;
  size_t size_ = 0;
};

// Carves arrays out of an arena; with no memory it only counts the bytes.
class ArenaLayout {
 public:
  explicit ArenaLayout(char* base) : base_(base) {}
  void* take(size_t bytes) {
    char* p = base_ ? base_ + used_ : nullptr;
    // The odd number of lines keeps equal indices of two arrays in different cache sets.
    used_ += (bytes + kAlign - 1) / kAlign * kAlign + kAlign * 5;
    return p;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace mfd
