// feature_loss: which threads share a row, how many blocks each tap gets, and the launches.
#include <algorithm>

#include "cuda/features/lean_taps.cuh"
#include "cuda/fusion/fusion.h"
#include "cuda/rows/scale.cuh"
#include "cuda/runtime/resident.h"

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

// A launch's kernel, its threads and shared memory, and how a tap is shared.
struct TapPlan {
  void (*kernel)(device::FeatureLaunch);
  int threads;
  int64_t shared;
  int64_t group = 0;   // bytes of a group's parked rows
  int64_t widest = 0;  // a wider row, in bytes of the pair or in columns, takes a whole block
  bool parked = false;

  bool is_whole(const Tap& tap) const { return (parked ? pair_bytes(tap) : tap.width) > widest; }
};

bool is_aligned(const RowMatrix& m) {
  const int64_t columns = 16 / size_of(m.dtype);
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.row_stride % columns == 0 &&
         m.outer_stride % columns == 0;
}

// Whether the lean kernels do, for all taps.
bool are_lean(const Tap* taps, int64_t count, bool is_double) {
  constexpr int64_t kMost = 8 * device::kTapVectors * kBlockThreads;
  const Dtype dtype = taps[0].student.dtype;
  return !is_double && std::all_of(taps, taps + count, [&](const Tap& tap) {
    return tap.student.dtype == dtype && tap.teacher.dtype == dtype && !tap.d_teacher && tap.width % 8 == 0 &&
           tap.width <= kMost && is_aligned(tap.student) && is_aligned(tap.teacher);
  });
}

template <Dtype kDtype, class Group>
auto lean_kernel(FeatureKind kind) {
  return kind == kMse        ? device::lean_match_taps<kDtype, kMse, Group>
         : kind == kSmoothL1 ? device::lean_match_taps<kDtype, kSmoothL1, Group>
                             : device::lean_match_taps<kDtype, kCosine, Group>;
}

template <class Group>
auto lean_kernel(FeatureKind kind, Dtype dtype) {
  return dtype == Dtype::kFloat32    ? lean_kernel<Dtype::kFloat32, Group>(kind)
         : dtype == Dtype::kBFloat16 ? lean_kernel<Dtype::kBFloat16, Group>(kind)
                                     : lean_kernel<Dtype::kFloat16, Group>(kind);
}

TapPlan plan_of(const FeatureTaps& all, const Tap* taps, int64_t count, const DeviceFacts& facts) {
  int64_t longest = 0, columns = 0;
  for (int64_t k = 0; k < count; ++k) {
    longest = std::max(longest, pair_bytes(taps[k]));
    columns = std::max(columns, taps[k].width);
  }
  TapPlan plan{};
  if (are_lean(taps, count, all.is_double)) {
    const bool warps = columns <= 8 * device::kTapVectors * 32;
    const Dtype dtype = taps[0].student.dtype;
    plan.kernel = warps ? lean_kernel<device::Warp>(all.kind, dtype)
                        : lean_kernel<device::ThreadBlock>(all.kind, dtype);
    plan.threads = warps ? kWarpThreads : kBlockThreads;
    plan.shared = team_bytes() + 16;
    plan.widest = warps ? columns : 0;
    return plan;
  }
  const int64_t room = std::min<int64_t>(facts.shared_per_processor / 2 - kOverhead, facts.shared_per_block);
  plan.parked = !all.is_double && team_bytes() + longest <= room;
  const bool warps = plan.parked ? longest <= kWarpBytes && team_bytes() + kWarpThreads / 32 * longest <= room
                                 : columns <= kWarpColumns;
  plan.threads = warps ? kWarpThreads : kBlockThreads;
  // Beside wide rows, which need a block each, narrow ones share the place of one.
  plan.group = warps ? longest : longest / (plan.threads / 32) / 16 * 16;
  plan.widest = plan.parked ? plan.group : kWarpColumns;
  plan.shared = team_bytes() + (!plan.parked ? 16 : warps ? plan.threads / 32 * plan.group : longest);
  plan.kernel = all.is_double ? device::match_taps<device::F64, false>
                : plan.parked ? device::match_taps<device::F32, true>
                              : device::match_taps<device::F32, false>;
  return plan;
}

// One launch for at most kMaxTaps taps that have rows.
void match(const FeatureTaps& all, int64_t begin, int64_t end, const FeatureScalarLoss* loss, bool adds,
           const Where& where) {
  const TapPlan plan = plan_of(all, all.taps + begin, end - begin, facts_of(where.device));
  device::FeatureLaunch launch{};
  launch.kind = all.kind;
  launch.parking_at = static_cast<int>(team_bytes());
  launch.group_bytes = plan.parked ? static_cast<int>(plan.group) : 0;
  double bytes = 0;
  for (int64_t k = begin; k < end; ++k)
    bytes += static_cast<double>(all.taps[k].n_rows) * static_cast<double>(pair_bytes(all.taps[k]));
  const int64_t most =
      std::min(resident(plan.kernel, where, {1, plan.threads, plan.shared}), kMaxGroups - device::kMaxTaps);
  int64_t blocks = 0;
  for (int64_t k = begin; k < end; ++k) {
    const Tap& tap = all.taps[k];
    device::FeatureTap& of = launch.taps[launch.count++];
    of.tap = tap;
    of.weight = all.weights ? all.weights[k] : nullptr;
    of.count = all.counts ? all.counts[k] : nullptr;
    of.whole = plan.is_whole(tap);
    const int64_t in_block = of.whole ? 1 : plan.threads / 32,
                  needed = (tap.n_rows + in_block - 1) / in_block;
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
  start(where, {blocks, plan.threads, plan.shared}, plan.kernel, launch);
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
  const int64_t most = resident(device::scale_all<>, where, {1, 256});
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
