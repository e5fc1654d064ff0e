// Python's view of the native kernels. Tensors cross as addresses; the Python side checks, allocates and
// keeps them alive.
#include "bindings.h"

#include <pybind11/stl.h>

#include <memory>
#include <tuple>
#include <vector>

#include "common/dlpack.h"
#include "cpu/buffer_pool.h"
#include "cpu/dispatch.h"
#include "cpu/fusion_dispatch.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace {

using mfd::Address;
using mfd::matrix;
using mfd::pointer;
using mfd::Rows;

void put_value(Address out, bool is_double, double value) {
  if (is_double) {
    *pointer<double>(out) = value;
  } else {
    *pointer<float>(out) = static_cast<float>(value);
  }
}

// `topk` is null for a teacher of all classes.
double run_forward(const mfd::Forward& f, const mfd::TopK* topk, bool wants_sum, int threads) {
  if (!topk) return mfd::forward(f, wants_sum, threads);
  constexpr mfd::PerRow kOne = {nullptr, 0, 1.0};
  return mfd::topk({f, *topk, kOne, kOne, nullptr, nullptr, nullptr}, wants_sum, threads);
}

// Writes the weighted sum of the row losses to `loss`, and its gradient to `grad` where that is not 0.
void scalar(const mfd::Problem& problem, const mfd::TopK* topk, bool use_soft, bool use_hard, Address weight,
            double soft_factor, double hard_factor, Address loss, Address grad, bool stream, int threads) {
  mfd::Forward f{};
  f.problem = problem;
  f.use_soft = use_soft;
  f.use_hard = use_hard;
  f.weight = {pointer(weight), 1, 1.0};
  f.soft_factor = soft_factor;
  f.hard_factor = hard_factor;
  f.grad = pointer(grad);
  f.stream = stream;
  put_value(loss, problem.is_double, run_forward(f, topk, true, threads));
}

// Per-row values; the last five addresses are all 0 or all but the label probabilities are not.
void per_row(const mfd::Problem& problem, const mfd::TopK* topk, Address soft, Address hard, Address stats,
             Address student_entropy, Address teacher_entropy, Address student_label_prob,
             Address teacher_label_prob, Address agreement, int threads) {
  mfd::Forward f{};
  f.problem = problem;
  f.use_soft = true;
  f.use_hard = problem.labels != nullptr;
  f.soft = pointer(soft);
  f.hard = pointer(hard);
  f.stats = pointer(stats);
  f.student_entropy = pointer(student_entropy);
  f.teacher_entropy = pointer(teacher_entropy);
  f.student_label_prob = pointer(student_label_prob);
  f.teacher_label_prob = pointer(teacher_label_prob);
  f.agreement = pointer<unsigned char>(agreement);
  run_forward(f, topk, false, threads);
}

void per_row_backward(const mfd::Problem& problem, const mfd::TopK* topk, Address stats, Address grad_soft,
                      int64_t grad_soft_stride, Address grad_hard, int64_t grad_hard_stride,
                      Address d_student, const std::vector<Address>& d_teachers, Address d_temperature,
                      Address d_teacher_temperature, Address d_weights, bool stream, int threads) {
  std::vector<void*> teachers;
  for (const Address d_teacher : d_teachers) teachers.push_back(pointer(d_teacher));
  if (topk) {
    mfd::TopKPass pass{};
    pass.forward.problem = problem;
    pass.forward.use_soft = true;
    pass.forward.use_hard = problem.labels != nullptr;
    pass.forward.weight = {nullptr, 0, 1.0};
    pass.forward.soft_factor = pass.forward.hard_factor = 1.0;
    pass.forward.grad = pointer(d_student);
    pass.forward.stream = stream;
    pass.teacher = *topk;
    pass.grad_soft = {pointer(grad_soft), grad_soft_stride, 0.0};
    pass.grad_hard = {pointer(grad_hard), grad_hard_stride, 0.0};
    pass.d_values = teachers[0];
    pass.d_temperature = pointer(d_temperature);
    pass.d_teacher_temperature = pointer(d_teacher_temperature);
    mfd::topk(pass, false, threads);
    return;
  }
  mfd::backward({problem,
                 pointer(stats),
                 {pointer(grad_soft), grad_soft_stride, 0.0},
                 {pointer(grad_hard), grad_hard_stride, 0.0},
                 pointer(d_student),
                 problem.mixture ? nullptr : teachers[0],
                 pointer(d_temperature),
                 pointer(d_teacher_temperature),
                 stream,
                 teachers.data(),
                 pointer(d_weights)},
                threads);
}

// ---------------------------------------------------------------------------------------------- fusion

void pool_forward(const mfd::Pool& pool, Address pooled, int pooled_dtype, Address weights, bool stream,
                  int threads) {
  mfd::PoolForward f{};
  f.pool = &pool;
  f.pooled = pointer(pooled);
  f.pooled_dtype = static_cast<mfd::Dtype>(pooled_dtype);
  f.weights = pointer(weights);
  f.stream = stream;
  mfd::pool_forward(f, threads);
}

void set_gradients(mfd::PoolBackward& g, const std::vector<Address>& d_features, int64_t d_row_stride,
                   bool stream, Address d_query, Address d_bias) {
  for (size_t m = 0; m < d_features.size(); ++m) g.d_features[m] = pointer(d_features[m]);
  g.d_row_stride = d_row_stride;
  g.stream = stream;
  g.d_query = pointer(d_query);
  g.d_bias = pointer(d_bias);
}

void pool_backward(const mfd::Pool& pool, Address weights, const Rows& d_pooled, Address d_weights,
                   const std::vector<Address>& d_features, int64_t d_row_stride, bool stream, Address d_query,
                   Address d_bias, Address d_temperature, Address d_scores, Address d_row_temperature,
                   int threads) {
  mfd::PoolBackward g{};
  g.pool = &pool;
  g.weights = pointer(weights);
  g.d_pooled = matrix(d_pooled);
  g.d_weights = pointer(d_weights);
  set_gradients(g, d_features, d_row_stride, stream, d_query, d_bias);
  g.d_temperature = pointer(d_temperature);
  g.d_scores = pointer(d_scores);
  g.d_row_temperature = pointer(d_row_temperature);
  mfd::pool_backward(g, threads);
}

// The scalar loss goes to `loss`; with 0 the taps carry per-row outputs or gradients.
void tap_rows(std::vector<mfd::Tap> taps, int kind, bool is_double, bool mean, Address loss, int threads) {
  const double sum =
      mfd::tap_rows(taps, static_cast<mfd::FeatureKind>(kind), is_double, loss == 0, mean, threads);
  if (loss) put_value(loss, is_double, sum);
}

void product(int64_t rows, int64_t columns, int64_t depth, Address a, int64_t a_row, int64_t a_depth,
             Address b, int64_t b_depth, int64_t b_column, Address bias, Address out, int threads) {
  mfd::product({rows, columns, depth, pointer<const float>(a), pointer<const float>(b),
                pointer<const float>(bias), a_row, a_depth, b_depth, b_column, pointer<float>(out)},
               threads);
}

// a [rows, depth] and b [columns, depth] in bfloat16, dense, depth even.
void pair_product(int64_t rows, int64_t columns, int64_t depth, Address a, Address b, Address bias,
                  Address out, int threads) {
  const int64_t pairs = depth / 2;
  mfd::pair_product({rows, columns, pairs, pointer<const float>(a), pointer<const float>(b),
                     pointer<const float>(bias), pairs, 1, 1, pairs, pointer<float>(out)},
                    threads);
}

// mfd_loss: the terms besides the logits, what they need and leave behind.
struct Mfd {
  mfd::Pool pool;
  mfd::Problem problem;
  mfd::Matrix target;
  mfd::FeatureKind kind;
  const void* pool_target;
  mfd::PerRow weight;
  double soft_factor, hard_factor, feature_factor, pool_factor, divisor;
  bool use_soft, use_hard;
  std::vector<mfd::FeatureRow> feature;
  std::vector<double> pool_kl, soft, hard;
};

std::unique_ptr<Mfd> make_mfd(const mfd::Pool& pool, const mfd::Problem& problem, const Rows& target,
                              int kind, Address pool_target, Address weight, double soft_factor,
                              double hard_factor, double feature_factor, double pool_factor, double divisor,
                              bool use_soft, bool use_hard) {
  auto m = std::make_unique<Mfd>();
  m->pool = pool;
  m->problem = problem;
  m->pool.rows = &m->problem;
  m->target = matrix(target);
  m->kind = static_cast<mfd::FeatureKind>(kind);
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

void mfd_pool(Mfd& m, Address pooled, Address weights, int threads) {
  mfd::PoolForward f{};
  f.pool = &m.pool;
  f.pooled = pointer(pooled);
  f.pooled_dtype = m.pool.is_double ? mfd::Dtype::kFloat64 : mfd::Dtype::kFloat32;
  f.weights = pointer(weights);
  f.target = m.target;
  f.kind = m.kind;
  f.feature = m.target.data ? m.feature.data() : nullptr;
  f.pool_target = m.pool_target;
  f.pool_kl = m.pool_target ? m.pool_kl.data() : nullptr;
  mfd::pool_forward(f, threads);
}

// `logits` and `grad` are [N, C] in the compute dtype, contiguous; they may be the same.
void mfd_rows(Mfd& m, Address logits, Address loss, Address soft, Address hard, Address feature,
              Address predictions, Address grad, bool stream, int threads) {
  const int64_t n = m.problem.n_rows, classes = m.problem.classes;
  const mfd::Dtype dtype = m.pool.is_double ? mfd::Dtype::kFloat64 : mfd::Dtype::kFloat32;
  m.problem.student = {pointer(logits), dtype, n, 0, classes, classes, 1.0, 0.0, false};
  mfd::MfdRows r{};
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
  const mfd::MfdSums sums = mfd::mfd_rows(r, threads);
  const bool is_double = m.problem.is_double;
  put_value(loss, is_double, sums.loss);
  put_value(soft, is_double, sums.soft);
  put_value(hard, is_double, sums.hard);
  put_value(feature, is_double, sums.feature);
}

void mfd_backward(const Mfd& m, Address weights, Address pooled, const Rows& d_pooled, Address d_logits,
                  const std::vector<Address>& d_features, int64_t d_row_stride, bool stream, Address d_query,
                  Address d_bias, Address d_head_bias, int threads) {
  mfd::PoolBackward g{};
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
  mfd::pool_backward(g, threads);
}

// --------------------------------------------------------------------------------------- gradient buffers

// A pool buffer on its way to a tensor; the tensor's storage gives it back.
struct Lent {
  mfd::DLManagedTensor managed{};
  std::vector<int64_t> shape;
  mfd::Buffer buffer;
};

void give_back(mfd::DLManagedTensor* managed) {
  Lent* lent = static_cast<Lent*>(managed->manager_ctx);
  mfd::pool_give_back(lent->buffer);
  delete lent;
}

constexpr const char* kCapsule = "dltensor";

// DLPack capsule of an uninitialised contiguous tensor, or None when the pool declines.
py::object lend(const py::tuple& shape, bool bfloat16, int64_t item_size) {
  auto lent = std::make_unique<Lent>();
  size_t bytes = static_cast<size_t>(item_size);
  for (const py::handle& size : shape) {
    lent->shape.push_back(size.cast<int64_t>());
    bytes *= static_cast<size_t>(lent->shape.back());
  }
  lent->buffer = mfd::pool_take(bytes);
  if (!lent->buffer.data) return py::none();
  mfd::DLManagedTensor& managed = lent->managed;
  managed.dl_tensor = {lent->buffer.data,
                       {1, 0},
                       static_cast<int32_t>(lent->shape.size()),
                       {static_cast<uint8_t>(bfloat16 ? 4 : 2), static_cast<uint8_t>(8 * item_size), 1},
                       lent->shape.data(),
                       nullptr,
                       0};
  managed.manager_ctx = lent.get();
  managed.deleter = give_back;
  PyObject* capsule = PyCapsule_New(&lent.release()->managed, kCapsule, [](PyObject* self) {
    // A consumer renames the capsule; one that was never consumed gives the buffer back here.
    if (!PyCapsule_IsValid(self, kCapsule)) return;
    auto* unused = static_cast<mfd::DLManagedTensor*>(PyCapsule_GetPointer(self, kCapsule));
    unused->deleter(unused);
  });
  return py::reinterpret_steal<py::object>(capsule);
}

py::tuple pool_stats() {
  const mfd::PoolStats s = mfd::pool_stats();
  return py::make_tuple(s.limit, s.idle_bytes, s.live_bytes, s.idle_buffers, s.live_buffers, s.reused,
                        s.mapped);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.doc() = "Native kernels of mfd_fast.";
  m.attr("compiler") = MFD_COMPILER;
  m.attr("statistics") = mfd::kStats;
  mfd::bind_problem(m);
#ifdef MFD_HAVE_CUDA
  mfd::bind_cuda(m);
#endif
  m.def("count_rows", &mfd::count_rows);
  m.def("lists_are_valid", &mfd::lists_are_valid, release());
  m.def("scalar", &scalar, release());
  m.def("per_row", &per_row, release());
  m.def("per_row_backward", &per_row_backward, release());
  m.def("pool_forward", &pool_forward, release());
  m.def("pool_backward", &pool_backward, release());
  m.def("tap_rows", &tap_rows, release());
  m.def("product", &product, release());
  m.def("has_pair_product", [] { return mfd::product_of_pairs() != nullptr; });
  m.def("pair_product", &pair_product, release());
  py::class_<Mfd>(m, "Mfd").def(py::init(&make_mfd));
  m.def("mfd_pool", &mfd_pool, release());
  m.def("mfd_rows", &mfd_rows, release());
  m.def("mfd_backward", &mfd_backward, release());
  m.def(
      "stream_add",
      [](Address a, Address b, Address out, int64_t n, int threads) {
        mfd::stream_add(pointer<const float>(a), pointer<const float>(b), pointer<float>(out), n, threads);
      },
      release());
  m.def("select_isa", &mfd::select_isa);
  m.def("current_isa", &mfd::current_isa);
  m.def("supported_isas", [] {
    py::list names;
    for (const std::string& name : mfd::supported_isas()) names.append(name);
    return names;
  });
  m.def("pool_lend", &lend);
  m.def("pool_set_limit", &mfd::pool_set_limit, release());
  m.def("pool_clear", &mfd::pool_clear, release());
  m.def("pool_stats", &pool_stats);
}
