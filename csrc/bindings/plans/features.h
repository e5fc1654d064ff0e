// What the plans of feature_loss share: a scalar, without projectors.
#pragma once

#include <cmath>
#include <utility>
#include <vector>

#include "bindings/plans/plans.h"

namespace mfd {

class FeaturePlan : public CallPlan {
 public:
  // `taps` for all that is the same in the calls of this plan; of each tap the places of its tensors and of
  // its weight, -1 for none.
  FeaturePlan(std::vector<Tap> taps, int kind, bool is_double, bool mean, std::vector<int> students,
              std::vector<int> teachers, std::vector<int> masks, std::vector<int> weights)
      : kind_(static_cast<FeatureKind>(kind)),
        is_double_(is_double),
        mean_(mean),
        taps_(std::move(taps)),
        students_(std::move(students)),
        teachers_(std::move(teachers)),
        masks_(std::move(masks)),
        weights_(std::move(weights)) {}

  pybind11::object run(const Call& call) const override {
    std::vector<Tap> taps = taps_;
    pybind11::list gradients;
    int64_t bytes = 0;
    for (size_t k = 0; k < taps.size(); ++k) {
      Tap& tap = taps[k];
      tap.weight = call.number(weights_[k], tap.weight);
      if (!std::isfinite(tap.weight)) return pybind11::none();
      tap.student.data = call.data(students_[k]);
      tap.teacher.data = call.data(teachers_[k]);
      tap.mask = call.data<unsigned char>(masks_[k]);
      const size_t student = static_cast<size_t>(students_[k]);
      if (!call.needs[student]) {
        gradients.append(pybind11::none());
        continue;
      }
      pybind11::object gradient = new_like(call.objects[student], call.tensors[student]);
      tap.d_student = data_of(gradient);
      bytes += bytes_of(call.tensors[student]);
      gradients.append(std::move(gradient));
    }
    for (Tap& tap : taps) tap.stream = bytes >= kStreamBytes;
    const uint8_t bits = is_double_ ? 64 : 32;
    const DLDevice device = call.tensors[0].device;
    pybind11::object value = new_tensor({kFloating, bits, 1}, device, {});
    if (!start(std::move(taps), data_of(value), device, call.threads)) return pybind11::none();
    return pybind11::make_tuple(value, gradients);
  }

 protected:
  // Writes the loss and the gradients; false: the full checks have something to say.
  virtual bool start(std::vector<Tap> taps, void* loss, DLDevice device, int threads) const = 0;

  FeatureKind kind_;
  bool is_double_, mean_;

 private:
  std::vector<Tap> taps_;
  std::vector<int> students_, teachers_, masks_, weights_;
};

}  // namespace mfd
