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
