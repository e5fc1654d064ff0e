// distill_loss and distill_terms on the CPU.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/plans.h"
#include "common/rows/row_math.h"
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
struct Parts {
  static constexpr int kCount = 4;
  std::vector<char> rows;  // of the compute dtype, in room for double
  int64_t n;

  Parts(Forward& f, int64_t n_rows) : rows(static_cast<size_t>(kCount * n_rows) * sizeof(double)), n(n_rows) {
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
    for (int k = 0; k < kCount; ++k) {
      const T* values = reinterpret_cast<const T*>(row(k));
      const bool used = k == 1 ? f.use_hard : f.use_soft;
      double total = 0;
      for (int64_t i = 0; used && i < n; ++i)
        if (is_counted(f.problem, i)) total += at<T>(f.weight, i) * static_cast<double>(values[i]);
      out[k] = static_cast<T>(total * (k == 1 ? hard_share : share));
    }
  }
};

// Writes the weighted sum of the row losses to `loss`, and its gradient to `grad` where that is not 0. To
// `parts`, if not 0, the weighted sums of soft and hard term and of both entropies, times `share` or
// `hard_share`.
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
  if (!parts) return put_value(loss, problem.is_double, run_forward(f, topk, true, threads));
  Parts rows(f, problem.n_rows);
  put_value(loss, problem.is_double, run_forward(f, topk, true, threads));
  if (problem.is_double) {
    rows.sum(f, share, hard_share, pointer<double>(parts));
  } else {
    rows.sum(f, share, hard_share, pointer<float>(parts));
  }
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

// distill_loss of one teacher as a scalar, with numbers for all that may be a number.
class DistillPlan final : public CallPlan {
 public:
  // `problem` for all that is the same in the calls of this plan; `least` and `most` of a temperature.
  DistillPlan(const RowProblem& problem, bool use_soft, bool use_hard, bool mean, double least, double most,
              const Places& tensors, const Places& numbers)
      : problem_(problem),
        use_soft_(use_soft),
        use_hard_(use_hard),
        mean_(mean),
        rows_{place(tensors, "student"),
              place(tensors, "teacher"),
              place(tensors, "labels"),
              place(tensors, "mask"),
              place(numbers, "temperature"),
              place(numbers, "teacher_temperature"),
              least,
              most},
        weight_(place(tensors, "weight")),
        soft_weight_(place(numbers, "soft_weight")),
        hard_weight_(place(numbers, "hard_weight")),
        normalizer_(place(numbers, "normalizer")) {
    if (problem.mixture || problem.student_temperature.rows || problem.teacher_temperature.rows)
      throw py::value_error("a plan of distill_loss has one teacher and numbers for temperatures");
  }

  py::object run(const Call& call) const override {
    RowProblem problem = problem_;
    const double soft_weight = call.number(soft_weight_, 1.0), hard_weight = call.number(hard_weight_, 0.0);
    double divisor = call.number(normalizer_, 1.0);
    if (!rows_.fill(call, problem) || !std::isfinite(soft_weight) || !std::isfinite(hard_weight) ||
        !(0 < divisor && std::isfinite(divisor)))
      return py::none();
    int64_t counted = problem.n_rows;
    if (problem.labels || problem.mask) counted = count_rows(problem);
    if (counted < 0) return py::none();
    const bool counts = mean_ && normalizer_ < 0;
    if (counts) divisor = static_cast<double>(std::max<int64_t>(counted, 1));
    double hard_divisor = divisor;
    if (counts && problem.keeps_ignored)
      hard_divisor = static_cast<double>(std::max<int64_t>(count_labelled(problem), 1));

    const DLTensor& student = call.tensors[static_cast<size_t>(rows_.student)];
    const uint8_t bits = problem.is_double ? 64 : 32;
    py::object value = new_tensor({kFloating, bits, 1}, student.device, {}), gradient = py::none();
    Forward f{};
    f.problem = problem;
    f.use_soft = use_soft_;
    f.use_hard = use_hard_;
    f.weight = {call.data(weight_), 1, 1.0};
    f.soft_factor = soft_weight / divisor;
    f.hard_factor = hard_weight / hard_divisor;
    if (call.needs_grad) {
      gradient = new_like(call.objects[static_cast<size_t>(rows_.student)], student);
      f.grad = data_of(gradient);
      f.stream = bytes_of(student) >= kStreamBytes;
    }
    void* const out = data_of(value);
    {
      const py::gil_scoped_release release;
      put_value(reinterpret_cast<Address>(out), problem.is_double, forward(f, true, call.threads));
    }
    return py::make_tuple(value, gradient);
  }

 private:
  RowProblem problem_;
  bool use_soft_, use_hard_, mean_;
  RowPlaces rows_;
  int weight_, soft_weight_, hard_weight_, normalizer_;
};

}  // namespace

void bind_distill_loss(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.attr("statistics") = kStats;
  py::class_<DistillPlan, CallPlan>(m, "DistillPlan")
      .def(py::init<const RowProblem&, bool, bool, bool, double, double, const Places&, const Places&>());
  m.def("count_rows", &count_rows);
  m.def("count_labelled", &count_labelled);
  m.def("lists_are_valid", &lists_are_valid, release());
  m.def("scalar", &scalar, release());
  m.def("per_row", &per_row, release());
  m.def("per_row_backward", &per_row_backward, release());
}

}  // namespace mfd
