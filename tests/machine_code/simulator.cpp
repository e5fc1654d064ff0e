// One multiprocessor of an H200 driven by recorded instructions: four schedulers, each issues at most one
// instruction a clock, in order within a warp, as the stall counts and scoreboards of the control words
// allow. Without instruction-cache misses; not calibrated against hardware. Input and output: timing.py.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <vector>

namespace {

enum Pipe : uint8_t { kFma, kImad, kAlu, kMufu, kFp64, kMemory, kUniform, kNone, kTensor, kPipes };
enum Kind : uint8_t {
  kPlain,
  kDramLoad,
  kCacheLoad,
  kStore,
  kBlockBarrier,
  kBranch,
  kShared,
  kClusterBarrier
};

struct Step {
  uint8_t pipe, stall, writes, reads, waits, kind;
  uint16_t occupancy, latency, dram_bytes, waves, cache_bytes;
};
static_assert(sizeof(Step) == 16, "as packed by timing.py");

struct Model {
  double dram, cache, dram_latency, cache_latency, launch, barrier, branch;
};

struct Warp {
  const std::vector<Step>* steps;
  int block;
  long age;
  size_t at = 0;
  double next = 0;
  std::array<double, 6> ready{};
  bool done = false, waits = false;
};

constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr double kStoreQueue = 4000;  // clocks of stores that may wait for DRAM
constexpr double kPortQueue = 24, kMufuQueue = 8;

class Processor {
 public:
  Processor(const Model& model, const std::vector<std::vector<Step>>& program, int blocks, int launches)
      : model_(model), in_block_(static_cast<int>(program.size())), left_(launches - blocks) {
    for (int block = 0; block < blocks; ++block)
      for (const auto& steps : program) {
        Warp warp{&steps, block, static_cast<long>(warps_.size())};
        warp.next = block * 37 % 200;
        schedulers_[warps_.size() % 4].push_back(static_cast<int>(warps_.size()));
        warps_.push_back(warp);
      }
    running_.assign(static_cast<size_t>(blocks), in_block_);
    arrived_.assign(static_cast<size_t>(blocks), 0);
    alive_ = static_cast<int>(warps_.size());
  }

  bool run() {
    while (alive_ > 0) {
      double soonest = kNever;
      bool issued = false;
      for (int s = 0; s < 4; ++s) {
        const int chosen = choose(s, soonest);
        if (chosen < 0) continue;
        issue(s, warps_[static_cast<size_t>(chosen)]);
        last_[s] = chosen;
        issued = true;
      }
      if (!issued && soonest == kNever) return false;
      now_ = issued ? now_ + 1 : std::max(now_ + 1, std::ceil(soonest));
    }
    return true;
  }

  double clocks() const { return std::max(now_, dram_free_); }
  double in_flight() const { return in_flight_ / now_; }
  long issued() const { return issued_; }
  double busy(int pipe) const { return busy_[pipe] / now_ / (pipe == kMemory ? 1 : 4); }

 private:
  // When the warp's next instruction may issue.
  double ready(int s, const Warp& warp) const {
    if (warp.done || warp.waits) return kNever;
    const Step& step = (*warp.steps)[warp.at];
    double when = warp.next;
    for (int k = 0; k < 6; ++k)
      if (step.waits >> k & 1) when = std::max(when, warp.ready[static_cast<size_t>(k)]);
    const auto& pipes = free_[static_cast<size_t>(s)];
    switch (step.pipe) {
      case kFma:
        return std::max(when, std::min(pipes[kFma], pipes[kImad]));
      case kMemory:
        return std::max(when, port_ - kPortQueue);
      case kMufu:
        return std::max(when, pipes[kMufu] - kMufuQueue);
      case kNone:
        return when;
      default:
        return std::max(when, pipes[step.pipe]);
    }
  }

  // The warp that issued last goes on; else the oldest that may.
  int choose(int s, double& soonest) const {
    if (last_[s] >= 0 && ready(s, warps_[static_cast<size_t>(last_[s])]) <= now_) return last_[s];
    int best = -1;
    for (const int k : schedulers_[s]) {
      const Warp& warp = warps_[static_cast<size_t>(k)];
      const double when = ready(s, warp);
      if (when > now_) {
        soonest = std::min(soonest, when);
      } else if (best < 0 || warp.age < warps_[static_cast<size_t>(best)].age) {
        best = k;
      }
    }
    return best;
  }

  // Takes the pipe; when the result is there.
  double occupy(int s, const Step& step) {
    auto& pipes = free_[static_cast<size_t>(s)];
    switch (step.pipe) {
      case kFma:  // half of the lanes can also multiply integers
        pipes[pipes[kFma] <= pipes[kImad] ? kFma : kImad] = now_ + 2;
        busy_[kFma] += 1;
        return now_ + step.latency;
      case kMemory:
        port_ = std::max(port_, now_) + step.waves;
        busy_[kMemory] += step.waves;
        return port_ + step.latency;
      case kMufu:
        pipes[kMufu] = std::max(pipes[kMufu], now_) + step.occupancy;
        busy_[kMufu] += step.occupancy;
        return pipes[kMufu] + step.latency;
      case kNone:
        return now_ + step.latency;
      default:
        pipes[step.pipe] = now_ + step.occupancy;
        busy_[step.pipe] += step.occupancy;
        return now_ + step.latency;
    }
  }

  void issue(int s, Warp& warp) {
    const Step& step = (*warp.steps)[warp.at++];
    ++issued_;
    double done = occupy(s, step), sources_read = done;
    warp.next = now_ + std::max<int>(step.stall, 1);
    if (step.kind == kDramLoad || step.kind == kCacheLoad) {
      cache_free_ = std::max(cache_free_, now_) + step.cache_bytes / model_.cache;
      double arrives = cache_free_ + model_.cache_latency;
      if (step.kind == kDramLoad) {
        dram_free_ = std::max(dram_free_, now_) + step.dram_bytes / model_.dram;
        arrives = std::max(arrives, dram_free_ + model_.dram_latency);
        in_flight_ += step.dram_bytes * (arrives - now_);
      }
      done = std::max(done, arrives);
    } else if (step.kind == kStore) {
      cache_free_ = std::max(cache_free_, now_) + step.cache_bytes / model_.cache;
      dram_free_ = std::max(dram_free_, now_) + step.dram_bytes / model_.dram;
      if (dram_free_ - now_ > kStoreQueue) warp.next = std::max(warp.next, dram_free_ - kStoreQueue);
    } else if (step.kind == kBranch) {
      warp.next += model_.branch;
    }
    if (step.pipe == kMemory && step.kind != kPlain) sources_read = std::max(port_, now_) + 12;
    if (step.writes < 6) warp.ready[step.writes] = std::max(warp.ready[step.writes], done);
    if (step.reads < 6) warp.ready[step.reads] = std::max(warp.ready[step.reads], sources_read);
    if (step.kind == kBlockBarrier || step.kind == kClusterBarrier)
      arrive(warp, step.kind == kClusterBarrier ? step.latency : model_.barrier);
    if (warp.at >= warp.steps->size()) leave(warp);
  }

  void arrive(Warp& warp, double latency) {
    const size_t block = static_cast<size_t>(warp.block);
    warp.waits = true;
    if (++arrived_[block] < running_[block]) return;
    arrived_[block] = 0;
    for (Warp& other : warps_) {
      if (other.block != warp.block || !other.waits || other.done) continue;
      other.waits = false;
      other.next = std::max(other.next, now_ + latency);
    }
  }

  // Another block takes the place of one that has finished.
  void leave(Warp& warp) {
    const size_t block = static_cast<size_t>(warp.block);
    warp.done = true;
    --alive_;
    if (--running_[block] > 0 || left_ <= 0) return;
    --left_;
    running_[block] = in_block_;
    for (Warp& other : warps_) {
      if (other.block != warp.block) continue;
      other.done = false;
      other.at = 0;
      other.next = now_ + model_.launch;
      other.ready.fill(0);
      other.age = static_cast<long>(++ages_) + static_cast<long>(warps_.size());
      ++alive_;
    }
  }

  Model model_;
  int in_block_, left_, alive_ = 0;
  std::vector<Warp> warps_;
  std::array<std::vector<int>, 4> schedulers_;
  int last_[4] = {-1, -1, -1, -1};
  std::vector<int> running_, arrived_;
  std::array<std::array<double, kPipes>, 4> free_{};
  double port_ = 0, dram_free_ = 0, cache_free_ = 0, now_ = 0, in_flight_ = 0;
  double busy_[kPipes] = {};
  long issued_ = 0, ages_ = 0;
};

template <class T>
bool read(T* values, size_t count) {
  return std::fread(values, sizeof(T), count, stdin) == count;
}

}  // namespace

int main() {
  int32_t head[3];  // blocks at a time, blocks in all, warps of a block
  Model model;
  if (!read(head, 3) || !read(&model, 1)) return 1;
  std::vector<std::vector<Step>> program(static_cast<size_t>(head[2]));
  for (auto& steps : program) {
    int32_t count;
    if (!read(&count, 1)) return 1;
    steps.resize(static_cast<size_t>(count));
    if (!read(steps.data(), steps.size())) return 1;
  }
  Processor processor(model, program, head[0], head[1]);
  if (!processor.run()) return 2;
  std::printf("%.0f %ld %.1f", processor.clocks(), processor.issued(), processor.in_flight());
  for (int pipe = 0; pipe < kPipes; ++pipe) std::printf(" %.4f", processor.busy(pipe));
  std::printf("\n");
}
