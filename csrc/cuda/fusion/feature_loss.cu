// feature_loss: which threads share a row, how many blocks each tap gets, and the launches.
#include <algorithm>

#include "cuda/features/feature_loss.cuh"
#include "cuda/fusion/fusion.h"
#include "cuda/rows/scale.cuh"
#include "cuda/runtime/launch.h"

namespace mfd {
namespace cuda {
namespace {

constexpr int kWarpThreads = 128, kBlockThreads = 256;
// A warp's pair of rows in shared memory, at most; several blocks of four then share a processor.
constexpr int64_t kWarpBytes = 16 << 10;
constexpr int64_t kOverhead = 1024;  // of each block, kept by the system
// Columns beyond which a block works on a row of float64, or on one that is not parked.
constexpr int64_t kWarpColumns = 1024;

int64_t team_bytes() {
  return (sizeof(device::Team::Shared) + 15) / 16 * 16;
}

int size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

int64_t pair_bytes(const Tap& tap) {
  return device::parked_row_bytes(tap.width, size_of(tap.student.dtype)) +
         device::parked_row_bytes(tap.width, size_of(tap.teacher.dtype));
}

// One launch for at most kMaxTaps taps that have rows.
void match(const FeatureTaps& all, int64_t begin, int64_t end, const FeatureScalarLoss* loss, bool adds,
           const Where& where) {
  const DeviceFacts facts = facts_of(where.device);
  device::FeatureLaunch launch{};
  launch.kind = all.kind;
  int64_t longest = 0, columns = 0;
  double bytes = 0;
  for (int64_t k = begin; k < end; ++k) {
    const Tap& tap = all.taps[k];
    longest = std::max(longest, pair_bytes(tap));
    columns = std::max(columns, tap.width);
    bytes += static_cast<double>(tap.n_rows) * static_cast<double>(pair_bytes(tap));
  }
  const int64_t room = std::min<int64_t>(facts.shared_per_processor / 2 - kOverhead, facts.shared_per_block);
  const bool parked = !all.is_double && team_bytes() + longest <= room;
  const bool warps = parked ? longest <= kWarpBytes && team_bytes() + kWarpThreads / 32 * longest <= room
                            : columns <= kWarpColumns;
  const int threads = warps ? kWarpThreads : kBlockThreads;
  // Beside wide rows, which need a block each, narrow ones share the place of one.
  const int64_t group = warps ? longest : longest / (threads / 32) / 16 * 16;
  launch.parking_at = static_cast<int>(team_bytes());
  launch.group_bytes = parked ? static_cast<int>(group) : 0;
  const int64_t shared = team_bytes() + (!parked ? 16 : warps ? threads / 32 * group : longest);

  int64_t resident = facts.shared_per_processor / (shared + kOverhead);
  resident = std::max<int64_t>(1, std::min<int64_t>(resident, 1024 / threads));
  const int64_t most = std::min(facts.processors * resident, kMaxGroups - device::kMaxTaps);
  int64_t blocks = 0;
  for (int64_t k = begin; k < end; ++k) {
    const Tap& tap = all.taps[k];
    device::FeatureTap& of = launch.taps[launch.count++];
    of.tap = tap;
    of.weight = all.weights ? all.weights[k] : nullptr;
    of.count = all.counts ? all.counts[k] : nullptr;
    of.whole = parked ? pair_bytes(tap) > group : tap.width > kWarpColumns;
    const int64_t in_block = of.whole ? 1 : threads / 32, needed = (tap.n_rows + in_block - 1) / in_block;
    // Blocks in proportion to the bytes, so that all of them end together.
    const double part = static_cast<double>(tap.n_rows) * static_cast<double>(pair_bytes(tap)) / bytes;
    const int64_t fair = static_cast<int64_t>(part * static_cast<double>(most));
    of.first_block = static_cast<int>(blocks);
    of.blocks = static_cast<int>(std::max<int64_t>(1, std::min(needed, fair)));
    blocks += of.blocks;
  }
  if (loss) {
    launch.mean = loss->mean;
    launch.loss = loss->loss;
    launch.adds = adds;
    launch.partial = loss->workspace->partial;
    launch.ticket = &loss->workspace->ticket;
  }
  const auto kernel = all.is_double ? device::match_taps<device::F64, false>
                      : parked      ? device::match_taps<device::F32, true>
                                    : device::match_taps<device::F32, false>;
  start(where, {blocks, threads, shared}, kernel, launch);
}

}  // namespace

void match_taps(const FeatureTaps& taps, const FeatureScalarLoss* loss, const Where& where) {
  const DeviceGuard guard(where.device);
  for (int64_t begin = 0; begin < taps.count; begin += device::kMaxTaps)
    match(taps, begin, std::min(taps.count, begin + device::kMaxTaps), loss, begin > 0, where);
}

void scale_all(const Scaled* gradients, int64_t count, const void* factor, Dtype factor_dtype,
               const Where& where) {
  const DeviceGuard guard(where.device);
  constexpr int64_t kPerBlock = 256 * 8;
  const int64_t most = int64_t{8} * attribute(cudaDevAttrMultiProcessorCount, where.device);
  for (int64_t begin = 0; begin < count; begin += device::kMaxScaled) {
    device::Gradients all{};
    int64_t longest = 0;
    for (int64_t k = begin; k < count && all.count < device::kMaxScaled; ++k, ++all.count) {
      all.grad[all.count] = gradients[k].grad;
      all.dtype[all.count] = gradients[k].dtype;
      all.n[all.count] = gradients[k].n;
      longest = std::max(longest, gradients[k].n);
    }
    start(where, {std::min(most, (longest + kPerBlock - 1) / kPerBlock), 256}, device::scale_all<>, all,
          factor, factor_dtype);
  }
}

}  // namespace cuda
}  // namespace mfd
