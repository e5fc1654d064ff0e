// The CUDA launchers for Python.
#include "bindings.h"

#include <tuple>

#include "cuda/distill.h"

namespace py = pybind11;

namespace mfd {
namespace {

// (address in device memory or 0, value where that is 0)
using Number = std::tuple<Address, double>;

cuda::Scalar scalar_of(const Number& number) {
  return {pointer(std::get<0>(number)), std::get<1>(number)};
}

// Writes the weighted sum of the row losses to `loss`, and its gradient to `grad` where that is not 0.
void scalar(const Problem& problem, bool use_soft, bool use_hard, Address weight, const Number& soft_weight,
            const Number& hard_weight, const Number& divisor, bool count_rows, Address workspace,
            Address loss, Address grad, int device, Address stream) {
  Forward f{};
  f.problem = problem;
  f.use_soft = use_soft;
  f.use_hard = use_hard;
  f.weight = {pointer(weight), 1, 1.0};
  f.grad = pointer(grad);
  const cuda::ScalarLoss s = {scalar_of(soft_weight),
                              scalar_of(hard_weight),
                              scalar_of(divisor),
                              count_rows,
                              pointer<cuda::ScalarWorkspace>(workspace),
                              pointer(loss)};
  cuda::forward(f, &s, {device, pointer(stream)});
}

// Per-row values; the last five addresses are all 0 or all but the label probabilities are not.
void per_row(const Problem& problem, Address soft, Address hard, Address stats, Address student_entropy,
             Address teacher_entropy, Address student_label_prob, Address teacher_label_prob,
             Address agreement, int device, Address stream) {
  Forward f{};
  f.problem = problem;
  f.use_soft = true;
  f.use_hard = problem.labels != nullptr;
  f.weight = {nullptr, 0, 1.0};
  f.soft = pointer(soft);
  f.hard = pointer(hard);
  f.stats = pointer(stats);
  f.student_entropy = pointer(student_entropy);
  f.teacher_entropy = pointer(teacher_entropy);
  f.student_label_prob = pointer(student_label_prob);
  f.teacher_label_prob = pointer(teacher_label_prob);
  f.agreement = pointer<unsigned char>(agreement);
  cuda::forward(f, nullptr, {device, pointer(stream)});
}

void per_row_backward(const Problem& problem, Address stats, Address grad_soft, int64_t grad_soft_stride,
                      Address grad_hard, int64_t grad_hard_stride, Address d_student, Address d_teacher,
                      Address d_temperature, Address d_teacher_temperature, int device, Address stream) {
  cuda::backward({problem,
                  pointer(stats),
                  {pointer(grad_soft), grad_soft_stride, 0.0},
                  {pointer(grad_hard), grad_hard_stride, 0.0},
                  pointer(d_student),
                  pointer(d_teacher),
                  pointer(d_temperature),
                  pointer(d_teacher_temperature),
                  false,
                  nullptr,
                  nullptr},
                 {device, pointer(stream)});
}

py::tuple plan(const Problem& problem, bool use_soft, int device) {
  static const char* const names[] = {"warp", "block", "cluster", "stream"};
  const cuda::Plan p = cuda::plan_of(problem, use_soft, device);
  return py::make_tuple(names[static_cast<int>(p.rung)], p.cluster, p.threads);
}

}  // namespace

void bind_cuda(py::module_& parent) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::module_ m = parent.def_submodule("cuda", "Launchers of the CUDA kernels.");
  bind_cuda_fusion(m);
  bind_cuda_mfd(m);
  m.attr("scalar_workspace") = sizeof(cuda::ScalarWorkspace);
  m.def("plan", &plan);
  m.def("scalar", &scalar, release());
  m.def("per_row", &per_row, release());
  m.def("per_row_backward", &per_row_backward, release());
  m.def(
      "scale_in_place",
      [](Address grad, int dtype, int64_t n, Address factor, int factor_dtype, int device, Address stream) {
        cuda::scale_in_place(pointer(grad), static_cast<Dtype>(dtype), n, pointer(factor),
                             static_cast<Dtype>(factor_dtype), {device, pointer(stream)});
      },
      release());
}

}  // namespace mfd
