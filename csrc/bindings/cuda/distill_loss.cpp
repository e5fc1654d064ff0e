// The CUDA launchers for Python.
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bindings/cuda/scalar.h"
#include "cuda/distill/distill.h"
#include "cuda/reduce/parts.h"

namespace py = pybind11;

namespace mfd {
namespace {

// `topk` is null for a teacher of all classes.
void start_forward(const Forward& f, const TopK* topk, const cuda::ScalarLoss* scalar, Address scratch,
                   const cuda::Where& where) {
  if (topk) {
    TopKPass pass{};
    pass.forward = f;
    pass.teacher = *topk;
    pass.grad_soft = pass.grad_hard = {nullptr, 0, 1.0};
    return cuda::topk_rows(pass, scalar, pointer(scratch), where);
  }
  if (f.use_soft && f.problem.mixture) return cuda::mixture_forward(f, scalar, pointer(scratch), where);
  cuda::forward(f, scalar, where);
}

// Writes the weighted sum of the row losses to `loss`, and its gradient to `grad` where that is not 0.
// `rows`: where soft and hard term and both entropies of every row go, 0 for none.
void scalar(const RowProblem& problem, const TopK* topk, bool use_soft, bool use_hard, Address weight,
            const ScalarFields& soft_weight, const ScalarFields& hard_weight, const ScalarFields& divisor,
            bool count_rows, Address workspace, Address loss, Address grad,
            const std::array<Address, 4>& rows, Address scratch, int device, Address stream) {
  Forward f{};
  f.problem = problem;
  f.soft = pointer(rows[0]);
  f.hard = pointer(rows[1]);
  f.student_entropy = pointer(rows[2]);
  f.teacher_entropy = pointer(rows[3]);
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
  start_forward(f, topk, &s, scratch, {device, pointer(stream)});
}

// The parts of that loss from those values per row, to `parts`; the divisors are those of the terms.
void reduce_parts(const RowProblem& problem, const std::array<Address, kParts>& rows, Address weight,
                  const ScalarFields& divisor, const ScalarFields& hard_divisor, bool count_rows,
                  Address workspace, Address parts, int device, Address stream) {
  const cuda::Parts p = {{pointer(rows[0]), pointer(rows[1]), pointer(rows[2]), pointer(rows[3])},
                         scalar_of(divisor),
                         scalar_of(hard_divisor),
                         count_rows,
                         pointer<cuda::PartsWorkspace>(workspace),
                         pointer(parts)};
  cuda::reduce_parts(problem, {pointer(weight), 1, 1.0}, p, {device, pointer(stream)});
}

// Per-row values. Of the by-products `student_entropy` and `teacher_entropy` are both 0 or neither is.
void per_row(const RowProblem& problem, const TopK* topk, Address soft, Address hard, Address stats,
             Address student_entropy, Address teacher_entropy, Address student_label_prob,
             Address teacher_label_prob, Address agreement, Address scratch, int device, Address stream) {
  const Forward f = per_row_forward(problem, soft, hard, stats, student_entropy, teacher_entropy,
                                    student_label_prob, teacher_label_prob, agreement);
  start_forward(f, topk, nullptr, scratch, {device, pointer(stream)});
}

// `d_teachers` holds one address per teacher; `d_weights` is 0 for one.
void per_row_backward(const RowProblem& problem, const TopK* topk, Address stats, Address grad_soft,
                      int64_t grad_soft_stride, Address grad_hard, int64_t grad_hard_stride,
                      Address d_student, const std::vector<Address>& d_teachers, Address d_temperature,
                      Address d_teacher_temperature, Address d_weights, Address scratch, int device,
                      Address stream) {
  std::vector<void*> teachers;
  for (const Address address : d_teachers) teachers.push_back(pointer(address));
  const Backward g = {problem,
                      pointer(stats),
                      {pointer(grad_soft), grad_soft_stride, 0.0},
                      {pointer(grad_hard), grad_hard_stride, 0.0},
                      pointer(d_student),
                      teachers[0],
                      pointer(d_temperature),
                      pointer(d_teacher_temperature),
                      false,
                      teachers.data(),
                      pointer(d_weights)};
  if (topk)
    return cuda::topk_rows(topk_backward(g, *topk), nullptr, pointer(scratch), {device, pointer(stream)});
  if (problem.mixture) return cuda::mixture_backward(g, pointer(scratch), {device, pointer(stream)});
  cuda::backward(g, {device, pointer(stream)});
}

// Bytes of device memory that a launch needs beside its outputs.
int64_t scratch_bytes(const RowProblem& problem, const TopK* topk, bool backward, int device) {
  if (topk) return cuda::topk_scratch(problem, *topk, device);
  return problem.mixture ? cuda::mixture_scratch(problem, backward, device) : 0;
}

py::tuple plan(const RowProblem& problem, const TopK* topk, bool use_soft, int device) {
  static const char* const names[] = {"warp", "block", "cluster", "stream"};
  const cuda::Plan p =
      topk ? cuda::topk_plan(problem, *topk, device) : cuda::plan_of(problem, use_soft, device);
  return py::make_tuple(names[static_cast<int>(p.rung)], p.cluster, p.threads);
}

}  // namespace

void bind_cuda(py::module_& parent) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::module_ m = parent.def_submodule("cuda", "Launchers of the CUDA kernels.");
  bind_cuda_fusion(m);
  bind_cuda_mfd(m);
  bind_cuda_plans(m);
  m.attr("scalar_workspace") = sizeof(cuda::ScalarWorkspace);
  m.attr("parts_workspace") = sizeof(cuda::PartsWorkspace);
  m.attr("max_teachers") = kMaxTeachers;
  m.def("plan", &plan);
  m.def("scratch_bytes", &scratch_bytes);
  m.def("scalar", &scalar, release());
  m.def("reduce_parts", &reduce_parts, release());
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
