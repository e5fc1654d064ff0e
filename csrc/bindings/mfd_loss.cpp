// mfd_loss on the CPU: the parts between which Python takes the products of its head.
#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "bindings/bindings.h"
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
  double soft_factor, hard_factor, feature_factor, pool_factor, divisor;
  bool use_soft, use_hard;
  std::vector<FeatureRow> feature;
  std::vector<double> pool_kl, soft, hard;
};

std::unique_ptr<Mfd> make_mfd(const PoolProblem& pool, const RowProblem& problem, const MatrixFields& target,
                              int kind, Address pool_target, Address weight, double soft_factor,
                              double hard_factor, double feature_factor, double pool_factor, double divisor,
                              bool use_soft, bool use_hard) {
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

void backward_mfd(const Mfd& m, Address weights, Address pooled, const MatrixFields& d_pooled,
                  Address d_logits, const std::vector<Address>& d_features, int64_t d_row_stride, bool stream,
                  Address d_query, Address d_bias, Address d_head_bias, int threads) {
  PoolBackward g{};
  g.pool = &m.pool;
  g.weights = pointer(weights);
  g.d_pooled = matrix(d_pooled);
  set_gradients(g, d_features, d_row_stride, stream, d_query, d_bias);
  g.pooled = pointer(pooled);
  g.target = m.target;
  g.kind = m.kind;
  g.feature = m.target.data ? m.feature.data() : nullptr;
  g.feature_factor = m.feature_factor / m.divisor;
  g.pool_target = m.pool_target;
  g.pool_factor = m.pool_factor / m.divisor;
  g.weight = m.weight;
  g.d_logits = pointer(d_logits);
  g.classes = m.problem.classes;
  g.d_head_bias = pointer(d_head_bias);
  pool_backward(g, threads);
}

}  // namespace

void bind_mfd_loss(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<Mfd>(m, "Mfd").def(py::init(&make_mfd));
  m.def("mfd_pool", &pool_of_mfd, release());
  m.def("mfd_rows", &rows_of_mfd, release());
  m.def("mfd_backward", &backward_mfd, release());
}

}  // namespace mfd
