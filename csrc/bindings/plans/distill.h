// What the plans of distill_loss share: one teacher, a scalar, numbers for all that may be a number.
#pragma once

#include <cmath>

#include "bindings/plans/plans.h"

namespace mfd {

// Of a loss, detached: soft and hard term, and the entropies of student and teacher.
constexpr int64_t kLossParts = 4;

class DistillPlan : public CallPlan {
 public:
  // `problem` for all that is the same in the calls of this plan; `least` and `most` of a temperature.
  // `parts`: the call returns them too.
  DistillPlan(const RowProblem& problem, bool use_soft, bool use_hard, bool mean, bool parts, double least,
              double most, const Places& tensors, const Places& numbers)
      : problem_(problem),
        use_soft_(use_soft),
        use_hard_(use_hard),
        mean_(mean),
        parts_(parts),
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
      throw pybind11::value_error("a plan of distill_loss has one teacher and numbers for temperatures");
  }

  pybind11::object run(const Call& call) const override {
    const pybind11::object none = pybind11::none();
    const Scalars scalars = {call.number(soft_weight_, 1.0), call.number(hard_weight_, 0.0),
                             call.number(normalizer_, 1.0), mean_ && normalizer_ < 0};
    Forward f{};
    f.problem = problem_;
    if (!rows_.fill(call, f.problem) || !std::isfinite(scalars.soft_weight) ||
        !std::isfinite(scalars.hard_weight) || !(0 < scalars.divisor && std::isfinite(scalars.divisor)))
      return none;
    f.use_soft = use_soft_;
    f.use_hard = use_hard_;
    f.weight = {call.data(weight_), 1, 1.0};
    const size_t student = static_cast<size_t>(rows_.student);
    const DLDataType dtype = {kFloating, static_cast<uint8_t>(f.problem.is_double ? 64 : 32), 1};
    const DLDevice device = call.tensors[student].device;
    pybind11::object value = new_tensor(dtype, device, {}), gradient = none, parts = none;
    if (parts_) parts = new_tensor(dtype, device, {kLossParts});
    if (call.needs_grad) {
      gradient = new_like(call.objects[student], call.tensors[student]);
      f.grad = data_of(gradient);
    }
    const LossOutputs outputs = {data_of(value), parts_ ? data_of(parts) : nullptr};
    if (!start(f, scalars, outputs, call.tensors[student], call.threads)) return none;
    return pybind11::make_tuple(value, gradient, parts);
  }

 protected:
  // The weights of the terms and what both are divided by, 1 where the rows that count are still to be
  // counted.
  struct Scalars {
    double soft_weight, hard_weight, divisor;
    bool counts;
  };

  // Where the loss goes and, unless null, its parts.
  struct LossOutputs {
    void *loss, *parts;
  };

  // Writes these and the gradient to `f.grad`; false: the full checks have something to say.
  virtual bool start(Forward& f, Scalars scalars, LossOutputs outputs, const DLTensor& student,
                     int threads) const = 0;

 private:
  RowProblem problem_;
  bool use_soft_, use_hard_, mean_, parts_;
  RowPlaces rows_;
  int weight_, soft_weight_, hard_weight_, normalizer_;
};

}  // namespace mfd
