// Threads of a cluster as fibres of one operating-system thread, or with MFD_EMULATOR_THREADS as threads of
// their own, for ThreadSanitizer.
#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "fibres.h"

namespace mfd_emulator {

namespace {

struct Aborted {};  // unwinds the other threads after a fault

// Where threads meet. `bank` alternates, so that a thread on its way to the next exchange leaves the values
// alone that slower ones still read.
struct Gate {
  unsigned mask = 0, arrived = 0, generation = 0;
  Place place{nullptr, 0};
  Values bank[2];
};

}  // namespace

struct Block {
  std::unique_ptr<unsigned char[]> shared;
  Gate barrier;
  std::vector<std::array<Gate, 32>> warps;  // by the lowest lane of the mask
  unsigned threads = 0, exited = 0, rank = 0;
};

namespace {

// The blocks that run together.
struct Cluster {
  std::vector<Block> blocks;
  Gate barrier;
  unsigned live = 0, waiting = 0, threads = 0;
  size_t shared_bytes = 0;
  std::string fault;
};

Cluster cluster;
#ifdef MFD_EMULATOR_THREADS
thread_local
#endif
    Thread* current = nullptr;
Runner runner;

std::string name(const Place& place) {
  const char* slash = std::strrchr(place.file, '/');
  return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}

std::string name(const Thread& t) {
  return "thread " + std::to_string(t.linear) + " of block " + std::to_string(t.block_index.x);
}

// Called with the lock held.
void fail(const std::string& what) {
  if (cluster.fault.empty()) cluster.fault = "CUDA emulator: " + what;
  runner.wake_all();
}

void check_progress(const Place& place) {
  if (cluster.live && cluster.waiting == cluster.live)
    fail("divergent barrier: every thread waits, " + name(*current) + " at " + name(place));
}

// Called with the lock held; leaves it held.
void meet(Gate& gate, unsigned expected, const Place& place, const char* kind) {
  if (!cluster.fault.empty()) throw Aborted();
  if (gate.arrived == 0) {
    gate.place = place;
  } else if (gate.place.line != place.line || std::strcmp(gate.place.file, place.file) != 0) {
    fail(std::string("divergent barrier: ") + kind + " at " + name(gate.place) + " and at " + name(place));
    throw Aborted();
  }
  const unsigned generation = gate.generation;
  if (++gate.arrived == expected) {
    gate.arrived = 0;
    ++gate.generation;
    cluster.waiting -= expected - 1;
    runner.wake_all();
    return;
  }
  ++cluster.waiting;
  check_progress(place);
  Thread* const me = current;
  while (gate.generation == generation && cluster.fault.empty()) runner.wait();
  current = me;
  if (!cluster.fault.empty()) throw Aborted();
}

void run_thread(Thread& thread, const std::function<void()>& body) {
  current = &thread;
  try {
    body();
  } catch (const Aborted&) {
  }
  const Lock lock(runner);
  --cluster.live;
  Block& block = *thread.block;
  ++block.exited;
  if (cluster.fault.empty() && block.barrier.arrived)
    fail("divergent barrier: " + name(thread) + " has left, others wait at " + name(block.barrier.place));
  if (cluster.fault.empty()) check_progress({"the end of the kernel", 0});
}

std::map<void*, size_t>& limits() {
  static std::map<void*, size_t> map;
  return map;
}

constexpr size_t kDefaultShared = 48 << 10;

void run_cluster(const Grid& grid, unsigned first, const std::function<void()>& body,
                 std::vector<Thread>& threads) {
  const unsigned per_block = grid.threads.x * grid.threads.y * grid.threads.z;
  cluster.live = cluster.threads = per_block * grid.cluster;
  cluster.waiting = 0;
  cluster.fault.clear();
  cluster.barrier.arrived = 0;
  cluster.shared_bytes = grid.shared_bytes;
  cluster.blocks.resize(grid.cluster);
  for (unsigned b = 0; b < grid.cluster; ++b) {
    Block& block = cluster.blocks[b];
    block.shared.reset(new unsigned char[grid.shared_bytes]);
    std::memset(block.shared.get(), 0xff, grid.shared_bytes);
    block.barrier.arrived = block.exited = 0;
    block.threads = per_block;
    block.rank = b;
    block.warps.resize((per_block + 31) / 32);
    for (std::array<Gate, 32>& warp : block.warps)
      for (Gate& gate : warp) gate.arrived = 0;
    for (unsigned k = 0; k < per_block; ++k) {
      Thread& t = threads[b * per_block + k];
      t.index = dim3(k % grid.threads.x, k / grid.threads.x % grid.threads.y,
                     k / (grid.threads.x * grid.threads.y));
      t.block_index = dim3(first + b, 0, 0);
      t.block_size = grid.threads;
      t.grid_size = grid.blocks;
      t.linear = k;
      t.block = &block;
    }
  }
  runner.run(cluster.threads, [&](unsigned k) { run_thread(threads[k], body); });
  for (Block& block : cluster.blocks) block.shared.reset();
  if (!cluster.fault.empty()) throw std::runtime_error(cluster.fault);
}

}  // namespace

Device& device() {
  static Device d;
  return d;
}

Interceptor& interceptor() {
  static Interceptor taken;
  return taken;
}

std::function<int(void*)>& registers() {
  static std::function<int(void*)> known;
  return known;
}

int resident_blocks(void* kernel, int threads, size_t shared_bytes) {
  constexpr int kRegisters = 65536, kThreads = 2048, kBlocks = 32, kSystemBytes = 1024;
  const int own = registers() ? (registers()(kernel) + 7) / 8 * 8 : 32;
  const int shared = (device().shared_bytes + kSystemBytes) / (static_cast<int>(shared_bytes) + kSystemBytes);
  return std::min({kRegisters / (own * threads), kThreads / threads, kBlocks, shared});
}

int& current_device() {
  static thread_local int number = 0;
  return number;
}

namespace {

std::mutex starts_mutex;
std::vector<Start> starts;
constexpr size_t kMostStarts = 1 << 16;

}  // namespace

void note_start(const void* stream) {
  const std::lock_guard<std::mutex> guard(starts_mutex);
  if (starts.size() < kMostStarts) starts.push_back({stream, current_device()});
}

std::vector<Start> take_starts() {
  const std::lock_guard<std::mutex> guard(starts_mutex);
  return std::exchange(starts, {});
}

void allow_shared(void* kernel, size_t bytes) {
  limits()[kernel] = bytes;
}

size_t allowed_shared(void* kernel) {
  const auto found = limits().find(kernel);
  return found == limits().end() ? kDefaultShared : std::max(kDefaultShared, found->second);
}

namespace {
std::atomic<long> started{0};
}

long launches() {
  return started;
}

bool launch(const Grid& grid, const std::function<void()>& body) {
  const size_t per_block = static_cast<size_t>(grid.threads.x) * grid.threads.y * grid.threads.z;
  const bool possible = per_block > 0 && per_block <= 1024 && grid.blocks.x > 0 && grid.blocks.x < 1u << 31 &&
                        grid.blocks.y == 1 && grid.blocks.z == 1 && grid.cluster > 0 && grid.cluster <= 8 &&
                        (grid.cluster == 1 || device().capability >= 90) && grid.blocks.x % grid.cluster == 0;
  if (!possible) return false;
  static std::mutex one_launch;
  const std::lock_guard<std::mutex> guard(one_launch);
  ++started;
  std::vector<Thread> threads(per_block * grid.cluster);
  for (unsigned block = 0; block < grid.blocks.x; block += grid.cluster)
    run_cluster(grid, block, body, threads);
  return true;
}

Thread& self() {
  return *current;
}

unsigned lane() {
  return current->linear & 31u;
}

void block_barrier(const Place& place) {
  const Lock lock(runner);
  Block& block = *current->block;
  if (block.exited) {
    fail("divergent barrier: " + name(*current) + " waits at " + name(place) +
         ", others have left the kernel");
    throw Aborted();
  }
  meet(block.barrier, block.threads, place, "__syncthreads");
}

void cluster_barrier(const Place& place) {
  const Lock lock(runner);
  meet(cluster.barrier, cluster.threads, place, "the cluster's barrier");
}

const Values& exchange(unsigned mask, const void* value, size_t size, const Place& place) {
  const Lock lock(runner);
  if (!cluster.fault.empty()) throw Aborted();
  const unsigned mine = lane();
  if (!(mask >> mine & 1u)) {
    fail("warp mask without its own lane: " + name(*current) + " at " + name(place));
    throw Aborted();
  }
  Gate& gate = current->block->warps[current->linear / 32][static_cast<unsigned>(__builtin_ctz(mask))];
  if (gate.arrived && gate.mask != mask) {
    fail("warp masks differ: " + name(*current) + " at " + name(place) + " and " + name(gate.place));
    throw Aborted();
  }
  gate.mask = mask;
  Values& values = gate.bank[gate.generation & 1u];
  std::memcpy(values.of_lane[mine], value, size);
  meet(gate, static_cast<unsigned>(__builtin_popcount(mask)), place, "a warp's exchange");
  return values;
}

unsigned char* shared_memory() {
  return current->block->shared.get();
}

unsigned cluster_rank() {
  return current->block->rank;
}

unsigned cluster_size() {
  return static_cast<unsigned>(cluster.blocks.size());
}

void* peer_shared(void* address, unsigned rank) {
  const ptrdiff_t offset = static_cast<unsigned char*>(address) - shared_memory();
  if (offset < 0 || static_cast<size_t>(offset) >= cluster.shared_bytes || rank >= cluster.blocks.size()) {
    const Lock lock(runner);
    fail("no such address in the cluster's shared memory: " + name(*current));
    throw Aborted();
  }
  return cluster.blocks[rank].shared.get() + offset;
}

}  // namespace mfd_emulator
