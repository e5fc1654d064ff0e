// Python's view of the native kernels. Tensors cross as addresses; the Python side checks, allocates and
// keeps them alive.
#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "common/dlpack.h"
#include "common/types.h"
#include "cpu/buffer_pool.h"
#include "cpu/dispatch.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

mfd::Side make_side(Address data, int dtype, int64_t inner, int64_t outer_stride, int64_t row_stride,
                    int64_t width, double scale, double softcap, bool standardize) {
  return {
      pointer(data), static_cast<mfd::Dtype>(dtype), inner, outer_stride, row_stride, width, scale, softcap,
      standardize};
}

std::unique_ptr<mfd::Problem> make_problem(int64_t n_rows, int64_t classes, bool is_double,
                                           const mfd::Side& student, const mfd::Side& teacher, double ts,
                                           Address ts_rows, int64_t ts_stride, double tt, Address tt_rows,
                                           int64_t tt_stride, Address labels, Address mask,
                                           int64_t ignore_index, double smoothing, bool scale_by_temperature,
                                           int divergence, double first, double second) {
  return std::unique_ptr<mfd::Problem>(new mfd::Problem{n_rows,
                                                        classes,
                                                        is_double,
                                                        student,
                                                        teacher,
                                                        {pointer(ts_rows), ts_stride, ts},
                                                        {pointer(tt_rows), tt_stride, tt},
                                                        pointer<const int64_t>(labels),
                                                        pointer<const unsigned char>(mask),
                                                        ignore_index,
                                                        smoothing,
                                                        scale_by_temperature,
                                                        static_cast<mfd::Divergence>(divergence),
                                                        first,
                                                        second});
}

std::unique_ptr<mfd::TopK> make_topk(Address indices, int64_t listed, int tail, bool logprobs) {
  return std::unique_ptr<mfd::TopK>(
      new mfd::TopK{pointer<const int64_t>(indices), listed, static_cast<mfd::Tail>(tail), logprobs});
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
  const double sum = run_forward(f, topk, true, threads);
  if (problem.is_double) {
    *pointer<double>(loss) = sum;
  } else {
    *pointer<float>(loss) = static_cast<float>(sum);
  }
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
                      Address d_student, Address d_teacher, Address d_temperature,
                      Address d_teacher_temperature, bool stream, int threads) {
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
    pass.d_values = pointer(d_teacher);
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
                 pointer(d_teacher),
                 pointer(d_temperature),
                 pointer(d_teacher_temperature),
                 stream},
                threads);
}

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
  m.doc() = "Native CPU kernels of mfd_fast.";
  m.attr("compiler") = MFD_COMPILER;
  m.attr("statistics") = mfd::kStats;
  py::class_<mfd::Side>(m, "Side").def(py::init(&make_side));
  py::class_<mfd::Problem>(m, "Problem").def(py::init(&make_problem));
  py::class_<mfd::TopK>(m, "TopK").def(py::init(&make_topk));
  m.def("count_rows", &mfd::count_rows);
  m.def("lists_are_valid", &mfd::lists_are_valid, release());
  m.def("scalar", &scalar, release());
  m.def("per_row", &per_row, release());
  m.def("per_row_backward", &per_row_backward, release());
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
