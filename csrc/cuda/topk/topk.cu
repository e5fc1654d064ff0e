// Row losses of a sparse teacher.
#include "cuda/distill/ladder.h"
#include "cuda/topk/topk.cuh"

namespace mfd {
namespace cuda {
namespace {

// Where a group's room keeps its lists and its bitmap, and how many bytes it has.
struct GroupRoom {
  int64_t lists_at, bits_at, bytes, words;
};

GroupRoom room_of(const RowProblem& p, const TopK& topk, int parts, bool parked, bool bits_in_shared) {
  GroupRoom room{};
  room.lists_at = parked ? parked_bytes(p.classes, p.student.dtype, parts) : 0;
  room.bits_at = room.lists_at + round_up(2 * topk.listed * (p.is_double ? 8 : 4), 16);
  room.words = p.classes / 32 / parts + 2;
  room.bytes = room.bits_at + (bits_in_shared ? round_up(room.words * 4, 16) : 0);
  return room;
}

// How a launch shares rows and lays out shared memory.
struct TopKPlan {
  Plan plan;
  GroupRoom room;
  bool bits_in_shared;
  int in_block;
};

TopKPlan plan_rows(const RowProblem& p, const TopK& topk, const DeviceFacts& facts) {
  const int64_t fixed = parking_at<device::Cluster, device::TopKState>(1);
  TopKPlan t{};
  t.plan = choose_plan(facts, p.classes, p.is_double, fixed,
                       [&](int parts) { return room_of(p, topk, parts, true, true).bytes; });
  const bool parked = t.plan.rung != Rung::kStream;
  t.in_block = t.plan.rung == Rung::kWarp ? t.plan.threads / 32 : 1;
  t.room = room_of(p, topk, t.plan.cluster, parked, true);
  t.bits_in_shared = parked || fixed + t.room.bytes <= facts.shared_per_block;
  if (!t.bits_in_shared) t.room = room_of(p, topk, t.plan.cluster, parked, false);
  return t;
}

template <class Group>
int64_t shared_bytes(const TopKPlan& t) {
  return parking_at<Group, device::TopKState>(t.in_block) + t.in_block * t.room.bytes;
}

template <class S, class Group>
void start_kernel(device::TopKLaunch launch, const TopKPlan& t, const Where& where) {
  launch.states_at = static_cast<int>(states_at<Group>());
  launch.parking_at = static_cast<int>(parking_at<Group, device::TopKState>(t.in_block));
  launch.parking_bytes = static_cast<int>(t.room.bytes);
  launch.lists_at = static_cast<int>(t.room.lists_at);
  launch.bits_at = static_cast<int>(t.room.bits_at);
  launch.parked = t.plan.rung != Rung::kStream;
  const int64_t shared = shared_bytes<Group>(t);
  const auto kernel = device::topk_rows<S, Group>;
  const int64_t n_rows = launch.forward.problem.n_rows;
  Shape shape{1, t.plan.threads, shared, t.plan.cluster};
  shape.blocks = launch.parked ? blocks_of(kernel, where, shape, n_rows, t.in_block)
                               : streaming_blocks(facts_of(where.device), n_rows);
  start(where, shape, kernel, launch);
}

}  // namespace

Plan topk_plan(const RowProblem& p, const TopK& topk, int device) {
  return plan_rows(p, topk, facts_of(device)).plan;
}

int64_t topk_scratch(const RowProblem& p, const TopK& topk, int device) {
  const DeviceFacts facts = facts_of(device);
  const TopKPlan t = plan_rows(p, topk, facts);
  if (t.bits_in_shared) return 0;
  return streaming_blocks(facts, p.n_rows) * t.room.words * 4;
}

void topk_rows(const TopKPass& pass, const ScalarLoss* scalar, void* scratch, const Where& where) {
  static_assert(sizeof(device::TopKLaunch) <= 4096, "what a kernel takes by value");
  const DeviceGuard guard(where.device);
  const DeviceFacts facts = facts_of(where.device);
  const RowProblem& p = pass.forward.problem;
  const TopKPlan t = plan_rows(p, pass.teacher, facts);
  device::TopKLaunch launch{};
  launch.forward = pass.forward;
  describe_scalar(launch, scalar, where);
  launch.topk = pass.teacher;
  launch.grad_soft = pass.grad_soft;
  launch.grad_hard = pass.grad_hard;
  launch.d_values = pass.d_values;
  launch.d_temperature = pass.d_temperature;
  launch.d_teacher_temperature = pass.d_teacher_temperature;
  launch.bits = t.bits_in_shared ? nullptr : static_cast<uint32_t*>(scratch);
  launch.bits_words = t.room.words;
  if (p.is_double) return start_kernel<device::F64, device::Blocks>(launch, t, where);
  if (t.plan.rung == Rung::kWarp) return start_kernel<device::F32, device::Warp>(launch, t, where);
  start_kernel<device::F32, device::Blocks>(launch, t, where);
}

}  // namespace cuda
}  // namespace mfd
