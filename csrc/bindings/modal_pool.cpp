// modal_pool on the CPU.
#include <pybind11/stl.h>

#include <vector>

#include "bindings/bindings.h"
#include "bindings/plans/pool.h"
#include "cpu/runtime/fusion.h"

namespace py = pybind11;

namespace mfd {
namespace {

void forward_pool(const PoolProblem& pool, Address pooled, int pooled_dtype, Address weights, bool stream,
                  int threads) {
  PoolForward f{};
  f.pool = &pool;
  f.pooled = pointer(pooled);
  f.pooled_dtype = static_cast<Dtype>(pooled_dtype);
  f.weights = pointer(weights);
  f.stream = stream;
  pool_forward(f, threads);
}

void backward_pool(const PoolProblem& pool, Address weights, const MatrixFields& d_pooled, Address d_weights,
                   const std::vector<Address>& d_features, int64_t d_row_stride, bool stream, Address d_query,
                   Address d_bias, Address d_temperature, Address d_scores, Address d_row_temperature,
                   int threads) {
  PoolBackward g{};
  g.pool = &pool;
  g.weights = pointer(weights);
  g.d_pooled = matrix(d_pooled);
  g.d_weights = pointer(d_weights);
  set_gradients(g, d_features, d_row_stride, stream, d_query, d_bias);
  g.d_temperature = pointer(d_temperature);
  g.d_scores = pointer(d_scores);
  g.d_row_temperature = pointer(d_row_temperature);
  pool_backward(g, threads);
}

class CpuModalPoolPlan final : public ModalPoolPlan {
  using ModalPoolPlan::ModalPoolPlan;

  bool start(const PoolForward& f, DLDevice, int threads) const override {
    const py::gil_scoped_release release;
    pool_forward(f, threads);
    return true;
  }
  bool start(const PoolBackward& g, DLDevice, int threads) const override {
    const py::gil_scoped_release release;
    pool_backward(g, threads);
    return true;
  }
};

}  // namespace

void bind_modal_pool(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<CpuModalPoolPlan, CallPlan>(m, "PoolPlan")
      .def(py::init<const PoolProblem&, int, bool, double, double, int, const Places&, const Places&,
                    const py::list&>());
  m.def("pool_forward", &forward_pool, release());
  m.def("pool_backward", &backward_pool, release());
}

}  // namespace mfd
