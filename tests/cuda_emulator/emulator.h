// What the emulated language needs of the machine below it: threads of a block, their barriers and exchanges.
#pragma once

namespace mfd_emulator {

constexpr size_t kMaxValue = 8;

struct Place {  // where in the sources a barrier stands
  const char* file;
  int line;
};

struct Values {
  unsigned char of_lane[32][kMaxValue];
};

struct Block;

struct Thread {
  dim3 index, block_index, block_size, grid_size;
  unsigned linear = 0;  // index in its block
  Block* block = nullptr;
};

struct Device {
  int capability = 90, processors = 4, shared_bytes = 232448;
};

constexpr int kDevices = 2;  // alike

// Where a grid was started: the stream that was asked for, the device that was current.
struct Start {
  const void* stream;
  int device;
};

int& current_device();
void note_start(const void* stream);
// All since the last call.
std::vector<Start> take_starts();

struct Grid {
  dim3 blocks, threads;
  unsigned cluster;
  size_t shared_bytes;
};

Device& device();

// Takes launches in place of the emulator: a kernel, its grid, its parameters as they lie in constant memory.
using Interceptor = std::function<void(void* kernel, const Grid&, const std::vector<unsigned char>&)>;
Interceptor& interceptor();

template <class... Parameters>
std::vector<unsigned char> packed(const typename std::decay<Parameters>::type&... values) {
  std::vector<unsigned char> bytes;
  [[maybe_unused]] const auto add = [&](const void* value, size_t size, size_t alignment) {
    bytes.resize((bytes.size() + alignment - 1) / alignment * alignment);
    bytes.insert(bytes.end(), static_cast<const unsigned char*>(value),
                 static_cast<const unsigned char*>(value) + size);
  };
  (add(&values, sizeof values, alignof(typename std::decay<Parameters>::type)), ...);
  return bytes;
}

// Registers of a thread of a kernel; 32 where nobody says.
std::function<int(void* kernel)>& registers();
// Blocks of a kernel that one processor holds at a time, as the device counts.
int resident_blocks(void* kernel, int threads, size_t shared_bytes);

void allow_shared(void* kernel, size_t bytes);
size_t allowed_shared(void* kernel);

// Runs `body` as every thread of the grid; false for a grid that the device cannot run. Throws
// std::runtime_error with what was wrong in the kernel.
bool launch(const Grid& grid, const std::function<void()>& body);
// How many there were so far.
long launches();

Thread& self();
unsigned lane();
void block_barrier(const Place& place);
void cluster_barrier(const Place& place);
// All lanes of the mask meet; each then sees the values of the others until its own next exchange.
const Values& exchange(unsigned mask, const void* value, size_t size, const Place& place);

unsigned char* shared_memory();
unsigned cluster_rank();
unsigned cluster_size();
// The same address in the shared memory of another block of the cluster.
void* peer_shared(void* address, unsigned rank);

}  // namespace mfd_emulator
