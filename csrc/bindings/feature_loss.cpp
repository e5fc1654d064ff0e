// feature_loss on the CPU.
#include <pybind11/stl.h>

#include <cmath>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/plans.h"
#include "cpu/runtime/fusion.h"

namespace py = pybind11;

namespace mfd {
namespace {

// The scalar loss goes to `loss`; with 0 the taps carry per-row outputs or gradients.
void match_taps(std::vector<Tap> taps, int kind, bool is_double, bool mean, Address loss, int threads) {
  const double sum = tap_rows(taps, static_cast<FeatureKind>(kind), is_double, loss == 0, mean, threads);
  if (loss) put_value(loss, is_double, sum);
}

// feature_loss as a scalar, without projectors.
class FeaturePlan final : public CallPlan {
 public:
  // `taps` for all that is the same in the calls of this plan; of each tap the places of its tensors and of
  // its weight, -1 for none.
  FeaturePlan(std::vector<Tap> taps, int kind, bool is_double, bool mean, std::vector<int> students,
              std::vector<int> teachers, std::vector<int> masks, std::vector<int> weights)
      : taps_(std::move(taps)),
        kind_(kind),
        is_double_(is_double),
        mean_(mean),
        students_(std::move(students)),
        teachers_(std::move(teachers)),
        masks_(std::move(masks)),
        weights_(std::move(weights)) {}

  py::object run(const Call& call) const override {
    std::vector<Tap> taps = taps_;
    py::list gradients;
    int64_t bytes = 0;
    for (size_t k = 0; k < taps.size(); ++k) {
      Tap& tap = taps[k];
      tap.weight = call.number(weights_[k], tap.weight);
      if (!std::isfinite(tap.weight)) return py::none();
      tap.student.data = call.data(students_[k]);
      tap.teacher.data = call.data(teachers_[k]);
      tap.mask = call.data<unsigned char>(masks_[k]);
      const size_t student = static_cast<size_t>(students_[k]);
      if (!call.needs[student]) {
        gradients.append(py::none());
        continue;
      }
      py::object gradient = new_like(call.objects[student], call.tensors[student]);
      tap.d_student = data_of(gradient);
      bytes += bytes_of(call.tensors[student]);
      gradients.append(std::move(gradient));
    }
    for (Tap& tap : taps) tap.stream = bytes >= kStreamBytes;
    const uint8_t bits = is_double_ ? 64 : 32;
    py::object value = new_tensor({kFloating, bits, 1}, call.tensors[0].device, {});
    void* const out = data_of(value);
    {
      const py::gil_scoped_release release;
      match_taps(std::move(taps), kind_, is_double_, mean_, reinterpret_cast<Address>(out), call.threads);
    }
    return py::make_tuple(value, gradients);
  }

 private:
  std::vector<Tap> taps_;
  int kind_;
  bool is_double_, mean_;
  std::vector<int> students_, teachers_, masks_, weights_;
};

}  // namespace

void bind_feature_loss(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<FeaturePlan, CallPlan>(m, "FeaturePlan")
      .def(py::init<std::vector<Tap>, int, bool, bool, std::vector<int>, std::vector<int>, std::vector<int>,
                    std::vector<int>>());
  m.def("tap_rows", &match_taps, release());
}

}  // namespace mfd
