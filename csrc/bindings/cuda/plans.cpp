// Plans of calls that the CUDA kernels run.
#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/plans/distill.h"
#include "bindings/plans/features.h"
#include "bindings/plans/mfd.h"
#include "bindings/plans/pool.h"
#include "common/rows/row_math.h"
#include "cuda/fusion/fusion.h"
#include "cuda/fusion/mfd_loss.h"
#include "cuda/reduce/parts.h"

namespace py = pybind11;

namespace mfd {
namespace {

// Whether launches happen; the benchmark of what a call costs beside its kernels turns them off.
bool launching = true;

template <class Launch>
void start_kernels(const Launch& launch) {
  if (!launching) return;
  const py::gil_scoped_release release;
  launch();
}

cuda::Where where_of(DLDevice device) {
  return {device.device_id, current_stream(device)};
}

// Memory that launch.workspace has made for this stream; null for none, and where a graph is captured.
void* workspace(const cuda::Where& where, int64_t bytes, const char* purpose) {
  static const py::handle kept =
      py::object(py::module_::import("mfd_fast.backends.cuda.launch").attr("kept_workspace")).release();
  return pointer(kept(where.device, reinterpret_cast<Address>(where.stream), bytes, purpose).cast<Address>());
}

// The same for the loss of a call; before anything is allocated.
cuda::ScalarWorkspace* scalar_workspace(const Call& call) {
  return static_cast<cuda::ScalarWorkspace*>(
      workspace(where_of(call.tensors[0].device), sizeof(cuda::ScalarWorkspace), "scalar"));
}

// The host looks at labels in its own memory alone.
bool has_bad_label(const RowProblem& p, DLDevice device) {
  if (device.device_type != kCPU || !p.labels) return false;
  for (int64_t i = 0; i < p.n_rows; ++i)
    if (is_labelled(p, i) && (p.labels[i] < 0 || p.labels[i] >= p.classes)) return true;
  return false;
}

bool scale_all(const py::tuple& saved, size_t count, const py::object& factor) {
  if (is_grad_enabled() || is_watched()) return false;
  DLTensor by;
  Dtype by_dtype;
  if (!read_tensor(factor, by) || by.ndim != 0 || !dtype_of(by, by_dtype)) return false;
  std::vector<cuda::Scaled> all;
  for (size_t k = saved.size() - count; k < saved.size(); ++k) {
    DLTensor t;
    Dtype dtype;
    if (saved[k].is_none()) continue;
    if (!read_tensor(saved[k], t) || !is_contiguous(t) || !dtype_of(t, dtype) || !(t.device == by.device))
      return false;
    const int64_t elements = bytes_of(t) / (t.dtype.bits / 8);
    if (elements) all.push_back({t.data, dtype, elements});
  }
  const cuda::Where where = where_of(by.device);
  if (all.size() == 1) {
    start_kernels(
        [&] { cuda::scale_in_place(all[0].grad, all[0].dtype, all[0].n, by.data, by_dtype, where); });
  } else if (!all.empty()) {
    start_kernels(
        [&] { cuda::scale_all(all.data(), static_cast<int64_t>(all.size()), by.data, by_dtype, where); });
  }
  return true;
}

// A plan of one loss: its workspace is there before anything is allocated.
template <class Plan>
class OfScalarLoss : public Plan {
  using Plan::Plan;

  py::object run(const Call& call) const override {
    return scalar_workspace(call) ? Plan::run(call) : py::none();
  }

  bool scale(const py::tuple& saved, size_t count, const py::object& factor) const override {
    return scale_all(saved, count, factor);
  }
};

static_assert(kParts == kLossParts, "one number");

class CudaDistillPlan final : public OfScalarLoss<DistillPlan> {
  using OfScalarLoss::OfScalarLoss;

  bool start(Forward& f, Scalars scalars, LossOutputs outputs, const DLTensor& student, int) const override {
    const RowProblem& problem = f.problem;
    const cuda::Where where = where_of(student.device);
    void* const scratch = workspace(where, sizeof(cuda::ScalarWorkspace), "scalar");
    if (!scratch || has_bad_label(problem, student.device)) return false;
    cuda::Parts parts{};
    py::object rows;
    if (outputs.parts) {
      parts.workspace =
          static_cast<cuda::PartsWorkspace*>(workspace(where, sizeof(cuda::PartsWorkspace), "parts"));
      if (!parts.workspace) return false;
      const uint8_t bits = problem.is_double ? 64 : 32;
      rows = new_tensor({kFloating, bits, 1}, student.device, {kParts, problem.n_rows});
      char* const first = static_cast<char*>(data_of(rows));
      void** const written[kParts] = {&f.soft, &f.hard, &f.student_entropy, &f.teacher_entropy};
      for (int k = 0; k < kParts; ++k)
        if (k == 1 ? f.use_hard : f.use_soft)
          parts.rows[k] = *written[k] = first + k * problem.n_rows * (bits / 8);
    }
    if (!f.use_soft) f.problem.teacher.data = student.data;
    if (scalars.counts) scalars.divisor = static_cast<double>(problem.n_rows);
    const cuda::ScalarLoss s = {{nullptr, scalars.soft_weight},
                                {nullptr, scalars.hard_weight},
                                {nullptr, scalars.divisor},
                                scalars.counts && (problem.labels || problem.mask),
                                static_cast<cuda::ScalarWorkspace*>(scratch),
                                outputs.loss};
    parts.divisor = parts.hard_divisor = s.divisor;
    parts.count_rows = s.count_rows;
    parts.out = outputs.parts;
    start_kernels([&] {
      cuda::forward(f, &s, where);
      if (parts.out) cuda::reduce_parts(problem, f.weight, parts, where);
    });
    return true;
  }
};

class CudaFeaturePlan final : public OfScalarLoss<FeaturePlan> {
  using OfScalarLoss::OfScalarLoss;

  bool start(std::vector<Tap> taps, void* loss, DLDevice device, int) const override {
    const cuda::Where where = where_of(device);
    void* const scratch = workspace(where, sizeof(cuda::ScalarWorkspace), "scalar");
    if (!scratch) return false;
    const std::vector<const void*> weights(taps.size(), nullptr);
    const std::vector<const int64_t*> counts(taps.size(), nullptr);
    for (Tap& tap : taps) tap.stream = false;
    const cuda::FeatureTaps all = {
        taps.data(), weights.data(), counts.data(), static_cast<int64_t>(taps.size()), kind_, is_double_};
    const cuda::FeatureScalarLoss scalar = {mean_, static_cast<cuda::ScalarWorkspace*>(scratch), loss};
    start_kernels([&] { cuda::match_taps(all, &scalar, where); });
    return true;
  }
};

// Dtypes of query, scores and bias.
using TypeFields = std::tuple<int, int, int>;

PoolTypes types_of(const TypeFields& dtypes) {
  return {static_cast<Dtype>(std::get<0>(dtypes)), static_cast<Dtype>(std::get<1>(dtypes)),
          static_cast<Dtype>(std::get<2>(dtypes))};
}

class CudaModalPoolPlan final : public ModalPoolPlan {
 public:
  template <class... Fields>
  CudaModalPoolPlan(const TypeFields& types, const Fields&... fields)
      : ModalPoolPlan(fields...), types_(types_of(types)) {}

 private:
  bool start(const PoolForward& f, DLDevice device, int) const override {
    const cuda::Where where = where_of(device);
    start_kernels([&] { cuda::pool_forward(f, types_, where); });
    return true;
  }

  bool start(const PoolBackward& g, DLDevice device, int) const override {
    const PoolProblem& pool = *g.pool;
    const cuda::Where where = where_of(device);
    py::object query, shared;
    if (g.d_query || g.d_bias) {
      const Dtype upstream = g.d_pooled.data ? g.d_pooled.dtype : pool.features[0].dtype;
      const int64_t blocks =
          launching ? cuda::pool_plan(pool, types_, true, upstream, where.device).blocks : 1;
      const uint8_t bits = pool.is_double ? 64 : 32;
      if (g.d_query) query = new_tensor({kFloating, bits, 1}, device, {blocks, pool.width});
      if (g.d_bias) shared = new_tensor({kFloating, 64, 1}, device, {blocks, pool.modalities + 1});
    }
    const cuda::PoolPartials partials = {query ? data_of(query) : nullptr,
                                         shared ? static_cast<double*>(data_of(shared)) : nullptr};
    start_kernels([&] { cuda::pool_backward(g, types_, partials, where); });
    return true;
  }

  PoolTypes types_;
};

// mfd_loss in one launch, and the head weight's gradient as a product of Python's.
class CudaMfdPlan final : public CallPlan {
 public:
  // `product(dz, y, classes)` is the first `classes` columns of dz, transposed, times y.
  CudaMfdPlan(const RowProblem& problem, const PoolProblem& pool, const TypeFields& types, bool use_soft,
              bool use_hard, const MatrixFields& target, int kind, bool uses_pool_target, int operand,
              int64_t head_stride, int head_bias_dtype, bool mean, bool stacked, double least, double most,
              const Places& tensors, const Places& numbers, py::object product)
      : mean_(mean),
        uses_pool_target_(uses_pool_target),
        at_(pool, stacked, least, most, tensors, numbers),
        product_(std::move(product)) {
    pass_.forward.problem = problem;
    pass_.forward.use_soft = use_soft;
    pass_.forward.use_hard = use_hard;
    pass_.pool = pool;
    pass_.types = types_of(types);
    pass_.target = matrix(target);
    pass_.kind = static_cast<FeatureKind>(kind);
    pass_.operand = static_cast<Dtype>(operand);
    pass_.head_stride = head_stride;
    pass_.head_bias_dtype = static_cast<Dtype>(head_bias_dtype);
  }

  bool scale(const py::tuple& saved, size_t count, const py::object& factor) const override {
    return scale_all(saved, count, factor);
  }

  py::object run(const Call& call) const override {
    const DLDevice device = call.tensors[0].device;
    const cuda::Where where = where_of(device);
    MfdPass p = pass_;
    RowProblem& problem = p.forward.problem;
    MfdNumbers numbers;
    if (!at_.fill(call, problem, p.pool, numbers) || has_bad_label(problem, device)) return py::none();
    p.head = call.data(at_.head_weight);
    if (reinterpret_cast<Address>(p.head) % 16) return py::none();
    const int64_t n = problem.n_rows, classes = problem.classes, width = p.pool.width;
    const int64_t blocks = (n + kMfdRows - 1) / kMfdRows, groups = (blocks + kMfdGroup - 1) / kMfdGroup;
    p.tickets = static_cast<unsigned*>(workspace(where, 4 * (1 + groups), "tickets"));
    if (!p.tickets) return py::none();
    p.head_bias = call.data(at_.head_bias);
    p.forward.weight = {call.data(at_.weight), 1, 1.0};
    p.soft_weight = {nullptr, 0, numbers.soft_weight};
    p.hard_weight = {nullptr, 0, numbers.hard_weight};
    p.feature_weight = {nullptr, 0, numbers.feature_weight};
    p.pool_weight = {nullptr, 0, numbers.pool_weight};
    const bool counts = mean_ && at_.normalizer < 0;
    p.divisor = {nullptr, 0, counts ? static_cast<double>(n) : numbers.divisor};
    p.count_rows = counts && (problem.labels || problem.mask);
    if (p.target.data) p.target.data = call.data(at_.teacher_features);
    if (uses_pool_target_) p.pool_target = call.data<float>(at_.teacher_pool_weights);

    constexpr DLDataType kFloat = {kFloating, 32, 1}, kDouble = {kFloating, 64, 1}, kLong = {0, 64, 1};
    std::vector<int64_t> shape = at_.pool.leading(call.tensors);
    py::object predictions = new_tensor(kLong, device, shape);
    shape.push_back(p.pool.modalities);
    py::object weights = new_tensor(kFloat, device, shape);
    p.predictions = static_cast<int64_t*>(data_of(predictions));
    p.weights = static_cast<float*>(data_of(weights));
    py::object terms[kMfdTerms];
    for (size_t k = 0; k < kMfdTerms; ++k) {
      terms[k] = new_tensor(kFloat, device, {});
      p.terms[k] = static_cast<float*>(data_of(terms[k]));
    }
    MfdGradients found(at_, p.pool, call, false);
    p.wants_pooled = found.needs_pool;
    p.wants_logits = found.needs_any();
    py::object y, dz;
    if (found.needs_head_weight) {
      p.dz_stride = (classes + 7) / 8 * 8;
      y = new_tensor(dl_dtype(p.operand), device, {n, width});
      dz = new_tensor(dl_dtype(p.operand), device, {n, p.dz_stride});
      p.y = data_of(y);
      p.dz = data_of(dz);
    }
    std::copy(std::begin(found.of_pool.d_features), std::end(found.of_pool.d_features), p.d_features);
    p.d_row_stride = found.of_pool.d_row_stride;
    p.d_query = found.of_pool.d_query;
    p.d_bias = found.of_pool.d_bias;
    p.d_head_bias = found.of_pool.d_head_bias;
    const int64_t sums = kMfdTerms + (p.d_query ? width : 0) + (p.d_bias ? p.pool.modalities : 0) +
                         (p.d_head_bias ? classes : 0);
    const py::object partial = new_tensor(kDouble, device, {blocks, sums});
    p.partial = static_cast<double*>(data_of(partial));
    start_kernels([&] { cuda::mfd_loss(p, where); });
    if (found.needs_head_weight)
      found.all[2] =
          launching ? product_(dz, y, classes) : new_tensor(dl_dtype(p.operand), device, {classes, width});
    const py::tuple outputs = py::make_tuple(terms[0], terms[1], terms[2], terms[3], weights, predictions);
    return py::make_tuple(outputs, found.all);
  }

 private:
  MfdPass pass_{};
  bool mean_, uses_pool_target_;
  MfdPlaces at_;
  py::object product_;
};

}  // namespace

void bind_cuda_plans(py::module_& m) {
  if (!py::detail::get_type_info(typeid(CallPlan))) py::module_::import("mfd_fast._C");
  const py::module_local local;
  py::class_<CudaDistillPlan, CallPlan>(m, "DistillPlan", local)
      .def(py::init<const RowProblem&, bool, bool, bool, bool, double, double, const Places&,
                    const Places&>());
  py::class_<CudaFeaturePlan, CallPlan>(m, "FeaturePlan", local)
      .def(py::init<std::vector<Tap>, int, bool, bool, std::vector<int>, std::vector<int>, std::vector<int>,
                    std::vector<int>>());
  py::class_<CudaModalPoolPlan, CallPlan>(m, "PoolPlan", local)
      .def(py::init<const TypeFields&, const PoolProblem&, int, bool, double, double, int, const Places&,
                    const Places&, const py::list&>());
  py::class_<CudaMfdPlan, CallPlan>(m, "MFDPlan", local)
      .def(py::init<const RowProblem&, const PoolProblem&, const TypeFields&, bool, bool, const MatrixFields&,
                    int, bool, int, int64_t, int, bool, bool, double, double, const Places&, const Places&,
                    py::object>());
  // Turns launches off; the outputs are then never written.
  m.def("set_launching", [](bool on) { launching = on; });
}

}  // namespace mfd
