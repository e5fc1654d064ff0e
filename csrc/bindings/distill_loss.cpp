// distill_loss and distill_terms on the CPU.
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/plans/distill.h"
#include "common/rows/topk_math.h"
#include "cpu/runtime/distill.h"

namespace py = pybind11;

namespace mfd {
namespace {

// `topk` is null for a teacher of all classes.
double run_forward(const Forward& f, const TopK* topk, bool wants_sum, int threads) {
  if (!topk) return forward(f, wants_sum, threads);
  constexpr RowScalar kOne = {nullptr, 0, 1.0};
  return mfd::topk({f, *topk, kOne, kOne, nullptr, nullptr, nullptr}, wants_sum, threads);
}

// Values per row of the two terms and, with the soft one, of both entropies.
struct RowParts {
  std::vector<char> rows;  // of the compute dtype, in room for double
  int64_t n;

  RowParts(Forward& f, int64_t n_rows)
      : rows(static_cast<size_t>(kLossParts * n_rows) * sizeof(double)), n(n_rows) {
    f.soft = row(0);
    if (f.use_hard) f.hard = row(1);
    if (!f.use_soft) return;
    f.student_entropy = row(2);
    f.teacher_entropy = row(3);
  }
  char* row(int k) { return rows.data() + static_cast<size_t>(k * n) * sizeof(double); }

  // sum weight*value of each, times what its mean divides by, in the fixed order of the rows.
  template <class T>
  void sum(const Forward& f, double share, double hard_share, T* out) {
    for (int k = 0; k < kLossParts; ++k) {
      const T* values = reinterpret_cast<const T*>(row(k));
      const bool used = k == 1 ? f.use_hard : f.use_soft;
      double total = 0;
      for (int64_t i = 0; used && i < n; ++i)
        if (is_counted(f.problem, i)) total += at<T>(f.weight, i) * static_cast<double>(values[i]);
      out[k] = static_cast<T>(total * (k == 1 ? hard_share : share));
    }
  }
};

// Where the weighted sum of the row losses goes; and, unless they are null, the weighted sums of soft and
// hard term and of both entropies, times `share` or `hard_share`.
struct LossSums {
  void *value, *parts;
  double share, hard_share;
};

void run_scalar(Forward& f, const TopK* topk, const LossSums& loss, int threads) {
  const RowProblem& problem = f.problem;
  std::optional<RowParts> rows;
  if (loss.parts) rows.emplace(f, problem.n_rows);
  put_value(reinterpret_cast<Address>(loss.value), problem.is_double, run_forward(f, topk, true, threads));
  if (rows && problem.is_double) rows->sum(f, loss.share, loss.hard_share, static_cast<double*>(loss.parts));
  if (rows && !problem.is_double) rows->sum(f, loss.share, loss.hard_share, static_cast<float*>(loss.parts));
}

// The gradient goes to `grad` where that is not 0.
void scalar(const RowProblem& problem, const TopK* topk, bool use_soft, bool use_hard, Address weight,
            double soft_factor, double hard_factor, Address loss, Address grad, bool stream, Address parts,
            double share, double hard_share, int threads) {
  Forward f{};
  f.problem = problem;
  f.use_soft = use_soft;
  f.use_hard = use_hard;
  f.weight = {pointer(weight), 1, 1.0};
  f.soft_factor = soft_factor;
  f.hard_factor = hard_factor;
  f.grad = pointer(grad);
  f.stream = stream;
  run_scalar(f, topk, {pointer(loss), pointer(parts), share, hard_share}, threads);
}

// Per-row values; the last five addresses are all 0 or all but the label probabilities are not.
void per_row(const RowProblem& problem, const TopK* topk, Address soft, Address hard, Address stats,
             Address student_entropy, Address teacher_entropy, Address student_label_prob,
             Address teacher_label_prob, Address agreement, int threads) {
  const Forward f = per_row_forward(problem, soft, hard, stats, student_entropy, teacher_entropy,
                                    student_label_prob, teacher_label_prob, agreement);
  run_forward(f, topk, false, threads);
}

void per_row_backward(const RowProblem& problem, const TopK* topk, Address stats, Address grad_soft,
                      int64_t grad_soft_stride, Address grad_hard, int64_t grad_hard_stride,
                      Address d_student, const std::vector<Address>& d_teachers, Address d_temperature,
                      Address d_teacher_temperature, Address d_weights, bool stream, int threads) {
  std::vector<void*> teachers;
  for (const Address d_teacher : d_teachers) teachers.push_back(pointer(d_teacher));
  const Backward g = {problem,
                      pointer(stats),
                      {pointer(grad_soft), grad_soft_stride, 0.0},
                      {pointer(grad_hard), grad_hard_stride, 0.0},
                      pointer(d_student),
                      problem.mixture ? nullptr : teachers[0],
                      pointer(d_temperature),
                      pointer(d_teacher_temperature),
                      stream,
                      teachers.data(),
                      pointer(d_weights)};
  if (topk) {
    mfd::topk(topk_backward(g, *topk), false, threads);
  } else {
    backward(g, threads);
  }
}

class CpuDistillPlan final : public DistillPlan {
  using DistillPlan::DistillPlan;

  bool start(Forward& f, Scalars scalars, LossOutputs outputs, const DLTensor& student,
             int threads) const override {
    const RowProblem& problem = f.problem;
    int64_t counted = problem.n_rows;
    if (problem.labels || problem.mask) counted = count_rows(problem);
    if (counted < 0) return false;
    if (scalars.counts) scalars.divisor = static_cast<double>(std::max<int64_t>(counted, 1));
    double hard_divisor = scalars.divisor;
    if (scalars.counts && problem.keeps_ignored)
      hard_divisor = static_cast<double>(std::max<int64_t>(count_labelled(problem), 1));
    f.soft_factor = scalars.soft_weight / scalars.divisor;
    f.hard_factor = scalars.hard_weight / hard_divisor;
    f.stream = f.grad && bytes_of(student) >= kStreamBytes;
    const py::gil_scoped_release release;
    run_scalar(f, nullptr, {outputs.loss, outputs.parts, 1.0 / scalars.divisor, 1.0 / hard_divisor}, threads);
    return true;
  }
};

}  // namespace

void bind_distill_loss(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.attr("statistics") = kStats;
  m.attr("padding") = kPadding;
  py::class_<CpuDistillPlan, CallPlan>(m, "DistillPlan")
      .def(py::init<const RowProblem&, bool, bool, bool, bool, double, double, const Places&,
                    const Places&>());
  m.def("count_rows", &count_rows);
  m.def("count_labelled", &count_labelled);
  m.def("lists_are_valid", &lists_are_valid, release());
  m.def("scalar", &scalar, release());
  m.def("per_row", &per_row, release());
  m.def("per_row_backward", &per_row_backward, release());
}

}  // namespace mfd
