// modal_pool: which threads share a row, and the launches.
#include <algorithm>

#include "cuda/fusion/fusion.h"
#include "cuda/pool/lean_pool.cuh"
#include "cuda/runtime/resident.h"

namespace mfd {
namespace cuda {
namespace {

constexpr int kWarpThreads = 128, kBlockThreads = 256;
// A warp's row in shared memory, at most; several blocks of four then share a processor.
constexpr int64_t kWarpBytes = 16 << 10;
constexpr int64_t kOverhead = 1024;  // of each block, kept by the system

int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

bool is_narrow(Dtype dtype) {
  return dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16;
}

struct PoolLayout {
  int64_t pitch, scratch, parking, sum, group;  // bytes; of a group: its scratch, where the parts begin, all
};

PoolLayout layout_of(const PoolProblem& p, bool backward, Dtype d_pooled) {
  bool narrow = !backward || is_narrow(d_pooled);
  for (int m = 0; m < p.modalities; ++m) narrow = narrow && is_narrow(p.features[m].dtype);
  PoolLayout l{};
  l.pitch = device::parked_row_bytes(p.width, narrow ? 2 : 4);
  l.scratch = p.is_double ? sizeof(device::PoolScratch<double>) : sizeof(device::PoolScratch<float>);
  l.parking = l.scratch;
  l.sum = l.parking + (p.modalities + (backward ? 1 : 0)) * l.pitch;
  l.group = l.sum + (backward && p.query ? device::parked_row_bytes(p.width, 4) : 0);
  return l;
}

int64_t team_bytes() {
  return round_up(sizeof(device::Team::Shared), 16);
}

int64_t shared_bytes(const PoolPlan& plan, const PoolLayout& l) {
  const int64_t groups = plan.whole ? 1 : plan.threads / 32;
  return team_bytes() + groups * (plan.parked ? l.group : l.scratch);
}

device::PoolLaunch common_of(const PoolProblem& pool, const PoolTypes& types, const PoolPlan& plan,
                             const PoolLayout& l) {
  device::PoolLaunch c{};
  c.pool = pool;
  c.pool.rows = nullptr;
  c.types = types;
  c.fast = !pool.scores || is_narrow(types.scores);
  for (int m = 0; m < pool.modalities; ++m) c.fast = c.fast && is_narrow(pool.features[m].dtype);
  c.whole = plan.whole;
  c.scratch_at = static_cast<int>(team_bytes());
  c.parking_at = static_cast<int>(l.parking);
  c.pitch = plan.parked ? static_cast<int>(l.pitch) : 0;
  c.sum_at = plan.parked ? static_cast<int>(l.sum) : 0;
  c.group_bytes = static_cast<int>(plan.parked ? l.group : l.scratch);
  return c;
}

// Whether the lean kernels do; `more` are the dtypes of what a pass reads and writes besides.
bool is_lean(const PoolProblem& p, const PoolTypes& types, Dtype more) {
  const Dtype dtype = p.features[0].dtype;
  const auto aligned = [](const RowMatrix& m) {
    const int64_t columns = m.dtype == Dtype::kFloat32 ? 4 : 8;
    return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.row_stride % columns == 0 &&
           m.outer_stride % columns == 0;
  };
  bool lean = !p.is_double && p.modalities <= device::kTogether && more == dtype && p.width % 8 == 0 &&
              p.width <= 8 * 32 * device::kPoolVectors;
  for (int m = 0; m < p.modalities; ++m)
    lean = lean && p.features[m].dtype == dtype && aligned(p.features[m]);
  return lean && (!p.query || (types.query == dtype && reinterpret_cast<uintptr_t>(p.query) % 16 == 0));
}

auto forward_kernel(const PoolPlan& plan, const PoolProblem& p) {
  const Dtype dtype = p.features[0].dtype;
  if (plan.lean)
    return dtype == Dtype::kFloat32    ? device::lean_pool_forward<Dtype::kFloat32>
           : dtype == Dtype::kBFloat16 ? device::lean_pool_forward<Dtype::kBFloat16>
                                       : device::lean_pool_forward<Dtype::kFloat16>;
  return p.is_double   ? device::pool_forward<device::F64, false>
         : plan.parked ? device::pool_forward<device::F32, true>
                       : device::pool_forward<device::F32, false>;
}

auto backward_kernel(const PoolPlan& plan, const PoolProblem& p) {
  const Dtype dtype = p.features[0].dtype;
  if (plan.lean)
    return dtype == Dtype::kFloat32    ? device::lean_pool_backward<Dtype::kFloat32>
           : dtype == Dtype::kBFloat16 ? device::lean_pool_backward<Dtype::kBFloat16>
                                       : device::lean_pool_backward<Dtype::kFloat16>;
  return p.is_double   ? device::pool_backward<device::F64, false>
         : plan.parked ? device::pool_backward<device::F32, true>
                       : device::pool_backward<device::F32, false>;
}

// Of a lean kernel: what its warps add up in the end.
int64_t shared_bytes(const PoolPlan& plan, const PoolLayout& l, const PoolProblem& p, bool backward) {
  if (!plan.lean) return shared_bytes(plan, l);
  const int64_t sums = plan.threads / 32 * std::max<int64_t>(p.width * 4, (kMaxModalities + 1) * 8);
  return backward ? sums : 0;
}

}  // namespace

PoolPlan pool_plan(const PoolProblem& p, const PoolTypes& types, bool backward, Dtype d_pooled, int device) {
  const DeviceGuard guard(device);
  const DeviceFacts facts = facts_of(device);
  const PoolLayout l = layout_of(p, backward, d_pooled);
  PoolPlan plan{};
  plan.lean = is_lean(p, types, d_pooled);
  plan.parked = !plan.lean && !p.is_double &&
                team_bytes() + l.group <= facts.shared_per_processor / 2 - kOverhead &&
                team_bytes() + l.group <= facts.shared_per_block;
  plan.whole = !plan.lean && (p.is_double || !plan.parked || l.group > kWarpBytes ||
                              team_bytes() + kWarpThreads / 32 * l.group > facts.shared_per_block);
  plan.threads = plan.whole && !p.is_double ? kBlockThreads : kWarpThreads;
  const int64_t in_block = plan.whole ? 1 : plan.threads / 32;
  const Shape shape{1, plan.threads, shared_bytes(plan, l, p, backward)};
  const Where where{device, nullptr};
  plan.blocks = backward ? resident(backward_kernel(plan, p), where, shape)
                         : resident(forward_kernel(plan, p), where, shape);
  const int64_t needed = (p.n_rows + in_block - 1) / in_block;
  // Short sums round less: a group adds up at most kSumRows rows.
  const int64_t least = backward ? (needed + kSumRows - 1) / kSumRows : 1;
  if (plan.blocks < least) plan.blocks = least;
  if (plan.blocks > needed) plan.blocks = needed;
  return plan;
}

void pool_forward(const PoolForward& f, const PoolTypes& types, const Where& where) {
  const DeviceGuard guard(where.device);
  const PoolProblem& p = *f.pool;
  const PoolPlan plan = pool_plan(p, types, false, f.pooled_dtype, where.device);
  const PoolLayout l = layout_of(p, false, f.pooled_dtype);
  device::PoolForwardLaunch launch{};
  launch.common = common_of(p, types, plan, l);
  launch.pooled = f.pooled;
  launch.pooled_dtype = f.pooled_dtype;
  launch.weights = f.weights;
  start(where, {plan.blocks, plan.threads, shared_bytes(plan, l, p, false)}, forward_kernel(plan, p), launch);
}

void pool_backward(const PoolBackward& g, const PoolTypes& types, const PoolPartials& partials,
                   const Where& where) {
  const DeviceGuard guard(where.device);
  const PoolProblem& p = *g.pool;
  const Dtype d_pooled = g.d_pooled.data ? g.d_pooled.dtype : p.features[0].dtype;
  const PoolPlan plan = pool_plan(p, types, true, d_pooled, where.device);
  const PoolLayout l = layout_of(p, true, d_pooled);
  device::PoolBackwardLaunch launch{};
  launch.common = common_of(p, types, plan, l);
  launch.weights = g.weights;
  launch.d_pooled = g.d_pooled;
  launch.d_weights = g.d_weights;
  for (int m = 0; m < p.modalities; ++m) launch.d_features[m] = g.d_features[m];
  launch.d_row_stride = g.d_row_stride;
  launch.d_scores = g.d_scores;
  launch.d_row_temperature = g.d_row_temperature;
  launch.wants_temperature = g.d_temperature || g.d_row_temperature;
  if (g.d_query) launch.query_partial = partials.query;
  if (g.d_bias || g.d_temperature) launch.shared_partial = partials.shared;
  start(where, {plan.blocks, plan.threads, shared_bytes(plan, l, p, true)}, backward_kernel(plan, p), launch);
  if (!launch.query_partial && !launch.shared_partial) return;
  device::PoolSums sums{};
  sums.query_partial = launch.query_partial;
  sums.shared_partial = launch.shared_partial;
  sums.partials = plan.blocks;
  sums.width = p.width;
  sums.modalities = p.modalities;
  sums.d_query = g.d_query;
  sums.d_bias = g.d_bias;
  sums.d_temperature = g.d_temperature;
  sums.query_dtype = types.query;
  sums.bias_dtype = types.bias;
  const int64_t blocks =
      (g.d_query ? (p.width + 31) / 32 : 0) + (launch.shared_partial ? (p.modalities + 32) / 32 : 0);
  const auto add = p.is_double ? device::pool_sums<device::F64> : device::pool_sums<device::F32>;
  start(where, {blocks, 256, 256 * sizeof(double)}, add, sums);
}

}  // namespace cuda
}  // namespace mfd
