// feature_loss on the CPU.
#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/plans/features.h"
#include "cpu/runtime/fusion.h"

namespace py = pybind11;

namespace mfd {
namespace {

// The scalar loss goes to `loss`; with 0 the taps carry per-row outputs or gradients.
void match_taps(std::vector<Tap> taps, int kind, bool is_double, bool mean, Address loss, int threads) {
  const double sum = tap_rows(taps, static_cast<FeatureKind>(kind), is_double, loss == 0, mean, threads);
  if (loss) put_value(loss, is_double, sum);
}

class CpuFeaturePlan final : public FeaturePlan {
  using FeaturePlan::FeaturePlan;

  bool start(std::vector<Tap> taps, void* loss, DLDevice, int threads) const override {
    const py::gil_scoped_release release;
    match_taps(std::move(taps), kind_, is_double_, mean_, reinterpret_cast<Address>(loss), threads);
    return true;
  }
};

}  // namespace

void bind_feature_loss(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<CpuFeaturePlan, CallPlan>(m, "FeaturePlan")
      .def(py::init<std::vector<Tap>, int, bool, bool, std::vector<int>, std::vector<int>, std::vector<int>,
                    std::vector<int>>());
  m.def("tap_rows", &match_taps, release());
}

}  // namespace mfd
