// mfd_loss on the CPU: the parts between which Python takes the products of its head.
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/plans/mfd.h"
#include "cpu/runtime/distill.h"
#include "cpu/runtime/fusion.h"

namespace py = pybind11;

namespace mfd {
namespace {

// mfd_loss: the terms besides the logits, what they need and leave behind.
struct Mfd {
  PoolProblem pool;
  RowProblem problem;
  RowMatrix target;
  FeatureKind kind;
  const void* pool_target;
  RowScalar weight;
  double soft_factor, hard_factor, feature_factor, pool_factor, divisor, hard_divisor;
  bool use_soft, use_hard;
  std::vector<FeatureRow> feature;
  std::vector<double> pool_kl, soft, hard;
};

std::unique_ptr<Mfd> make_mfd(const PoolProblem& pool, const RowProblem& problem, const MatrixFields& target,
                              int kind, Address pool_target, Address weight, double soft_factor,
                              double hard_factor, double feature_factor, double pool_factor, double divisor,
                              double hard_divisor, bool use_soft, bool use_hard) {
  auto m = std::make_unique<Mfd>();
  m->pool = pool;
  m->problem = problem;
  m->pool.rows = &m->problem;
  m->target = matrix(target);
  m->kind = static_cast<FeatureKind>(kind);
  m->pool_target = pointer(pool_target);
  m->weight = {pointer(weight), 1, 1.0};
  m->soft_factor = soft_factor;
  m->hard_factor = hard_factor;
  m->feature_factor = feature_factor;
  m->pool_factor = pool_factor;
  m->divisor = divisor;
  m->hard_divisor = hard_divisor;
  m->use_soft = use_soft;
  m->use_hard = use_hard;
  const size_t n = static_cast<size_t>(problem.n_rows);
  if (m->target.data) m->feature.resize(n);
  if (m->pool_target) m->pool_kl.resize(n);
  if (use_soft) m->soft.resize(n);
  if (use_hard) m->hard.resize(n);
  return m;
}

void pool_of_mfd(Mfd& m, Address pooled, Address weights, int threads) {
  PoolForward f{};
  f.pool = &m.pool;
  f.pooled = pointer(pooled);
  f.pooled_dtype = m.pool.is_double ? Dtype::kFloat64 : Dtype::kFloat32;
  f.weights = pointer(weights);
  f.target = m.target;
  f.kind = m.kind;
  f.feature = m.target.data ? m.feature.data() : nullptr;
  f.pool_target = m.pool_target;
  f.pool_kl = m.pool_target ? m.pool_kl.data() : nullptr;
  pool_forward(f, threads);
}

// `logits` and `grad` are [N, C] in the compute dtype, contiguous; they may be the same.
void rows_of_mfd(Mfd& m, Address logits, Address loss, Address soft, Address hard, Address feature,
                 Address predictions, Address grad, bool stream, int threads) {
  const int64_t n = m.problem.n_rows, classes = m.problem.classes;
  const Dtype dtype = m.pool.is_double ? Dtype::kFloat64 : Dtype::kFloat32;
  m.problem.student = {pointer(logits), dtype, n, 0, classes, classes, 1.0, 0.0, false};
  MfdRows r{};
  r.problem = m.problem;
  r.use_soft = m.use_soft;
  r.use_hard = m.use_hard;
  r.weight = m.weight;
  r.soft_factor = m.soft_factor;
  r.hard_factor = m.hard_factor;
  r.feature_factor = m.feature_factor;
  r.pool_factor = m.pool_factor;
  r.divisor = m.divisor;
  r.hard_divisor = m.hard_divisor;
  r.feature = m.target.data ? m.feature.data() : nullptr;
  r.pool_kl = m.pool_target ? m.pool_kl.data() : nullptr;
  r.soft = m.soft.data();
  r.hard = m.hard.data();
  r.grad = pointer(grad);
  r.stream = stream;
  r.predictions = pointer<int64_t>(predictions);
  const MfdSums sums = mfd_rows(r, threads);
  const bool is_double = m.problem.is_double;
  put_value(loss, is_double, sums.loss);
  put_value(soft, is_double, sums.soft);
  put_value(hard, is_double, sums.hard);
  put_value(feature, is_double, sums.feature);
}

// `g` says where the gradients go, and what comes from the logits.
void backward_of_mfd(const Mfd& m, PoolBackward& g, const void* weights, const void* pooled,
                     const void* d_logits, int threads) {
  g.pool = &m.pool;
  g.weights = weights;
  g.pooled = pooled;
  g.target = m.target;
  g.kind = m.kind;
  g.feature = m.target.data ? m.feature.data() : nullptr;
  g.feature_factor = m.feature_factor / m.divisor;
  g.pool_target = m.pool_target;
  g.pool_factor = m.pool_factor / m.divisor;
  g.weight = m.weight;
  g.d_logits = d_logits;
  g.classes = m.problem.classes;
  pool_backward(g, threads);
}

void backward_mfd(const Mfd& m, Address weights, Address pooled, const MatrixFields& d_pooled,
                  Address d_logits, const std::vector<Address>& d_features, int64_t d_row_stride, bool stream,
                  Address d_query, Address d_bias, Address d_head_bias, int threads) {
  PoolBackward g{};
  g.d_pooled = matrix(d_pooled);
  set_gradients(g, d_features, d_row_stride, stream, d_query, d_bias);
  g.d_head_bias = pointer(d_head_bias);
  backward_of_mfd(m, g, pointer(weights), pointer(pooled), pointer(d_logits), threads);
}

// mfd_loss where head and arithmetic are float32 and small enough for the native product.
class MFDPlan final : public CallPlan {
 public:
  // `mfd` for all that is the same in the calls of this plan; `least` and `most` of the temperatures.
  MFDPlan(const Mfd& mfd, bool stacked, bool mean, bool in_place, double least, double most,
          const Places& tensors, const Places& numbers)
      : mfd_(mfd), mean_(mean), in_place_(in_place), at_(mfd.pool, stacked, least, most, tensors, numbers) {}

  py::object run(const Call& call) const override {
    Mfd m = mfd_;
    m.pool.rows = &m.problem;
    MfdNumbers numbers;
    if (!at_.fill(call, m.problem, m.pool, numbers)) return py::none();
    m.soft_factor = numbers.soft_weight;
    m.hard_factor = numbers.hard_weight;
    m.feature_factor = numbers.feature_weight;
    m.pool_factor = numbers.pool_weight;
    m.divisor = numbers.divisor;
    int64_t counted = m.problem.n_rows;
    if (m.problem.labels || m.problem.mask) counted = count_rows(m.problem);
    if (counted < 0) return py::none();
    const bool counts = mean_ && at_.normalizer < 0;
    if (counts) m.divisor = static_cast<double>(std::max<int64_t>(counted, 1));
    m.hard_divisor = m.divisor;
    if (counts && m.problem.keeps_ignored)
      m.hard_divisor = static_cast<double>(std::max<int64_t>(count_labelled(m.problem), 1));
    if (m.target.data) m.target.data = call.data(at_.teacher_features);
    if (m.pool_target) m.pool_target = call.data(at_.teacher_pool_weights);
    m.weight = {call.data(at_.weight), 1, 1.0};

    const int64_t n = m.problem.n_rows, classes = m.problem.classes, width = m.pool.width;
    const DLDevice device = call.tensors[0].device;
    constexpr DLDataType kFloat = {kFloating, 32, 1}, kLong = {0, 64, 1};
    std::vector<int64_t> shape = at_.pool.leading(call.tensors);
    py::object predictions = new_tensor(kLong, device, shape);
    shape.push_back(m.pool.modalities);
    py::object weights = new_tensor(kFloat, device, shape), pooled = new_tensor(kFloat, device, {n, width});
    py::object logits = new_tensor(kFloat, device, {n, classes}), d_logits = py::none(),
               d_pooled = py::none();
    std::vector<py::object> sums;
    for (int k = 0; k < 4; ++k) sums.push_back(new_tensor(kFloat, device, {}));
    MfdGradients gradients(at_, m.pool, call, true);
    const bool need_pool = gradients.needs_pool, need_any = gradients.needs_any();
    if (need_any) d_logits = in_place_ ? logits : new_tensor(kFloat, device, {n, classes});
    if (need_pool) d_pooled = new_tensor(kFloat, device, {n, width});

    const auto at = [](const py::object& tensor) { return static_cast<float*>(data_of(tensor)); };
    const auto address = [](const void* data) { return reinterpret_cast<Address>(data); };
    float *const y = at(pooled), *const z = at(logits), *const up = need_any ? at(d_logits) : nullptr;
    float* const into_pool = need_pool ? at(d_pooled) : nullptr;
    float* const d_head_weight = static_cast<float*>(gradients.head_weight);
    const float* const head = call.data<float>(at_.head_weight);
    void *const a = data_of(weights), *const predicted = data_of(predictions);
    void* out[4];
    for (size_t k = 0; k < 4; ++k) out[k] = data_of(sums[k]);
    {
      const py::gil_scoped_release release;
      pool_of_mfd(m, address(y), address(a), call.threads);
      product({n, classes, width, y, head, call.data<float>(at_.head_bias), width, 1, 1, width, z},
              call.threads);
      rows_of_mfd(m, address(z), address(out[0]), address(out[1]), address(out[2]), address(out[3]),
                  address(predicted), address(up), false, call.threads);
      if (d_head_weight)
        product({classes, width, n, up, y, nullptr, 1, classes, width, 1, d_head_weight}, call.threads);
      if (into_pool)
        product({n, width, classes, up, head, nullptr, classes, 1, width, 1, into_pool}, call.threads);
      if (need_any) {
        PoolBackward& g = gradients.of_pool;
        g.stream = gradients.feature_bytes >= kStreamBytes;
        g.d_pooled = {into_pool, Dtype::kFloat32, std::max<int64_t>(n, 1), 0, width};
        backward_of_mfd(m, g, a, y, up, call.threads);
      }
    }
    const py::tuple outputs = py::make_tuple(sums[0], sums[1], sums[2], sums[3], weights, predictions);
    return py::make_tuple(outputs, gradients.all);
  }

 private:
  Mfd mfd_;
  bool mean_, in_place_;
  MfdPlaces at_;
};

}  // namespace

void bind_mfd_loss(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<Mfd>(m, "Mfd").def(py::init(&make_mfd));
  py::class_<MFDPlan, CallPlan>(m, "MFDPlan")
      .def(py::init<const Mfd&, bool, bool, bool, double, double, const Places&, const Places&>());
  m.def("mfd_pool", &pool_of_mfd, release());
  m.def("mfd_rows", &rows_of_mfd, release());
  m.def("mfd_backward", &backward_mfd, release());
}

}  // namespace mfd
