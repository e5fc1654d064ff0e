// modal_pool on the CPU.
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/plans.h"
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

// modal_pool where query, scores and bias have the dtype of the arithmetic and the temperature is a number.
class ModalPoolPlan final : public CallPlan {
 public:
  // `pool` for all that is the same in the calls of this plan, which are like that of `given`; `least` and
  // `most` of the temperature, which is the argument number `temperature_argument`.
  ModalPoolPlan(const PoolProblem& pool, Dtype pooled_dtype, bool stacked, double least, double most,
                int temperature_argument, const Places& tensors, const Places& numbers, const py::list& given)
      : pool_(pool),
        pooled_dtype_(pooled_dtype),
        places_(pool, stacked, tensors),
        least_(least),
        most_(most),
        temperature_argument_(static_cast<size_t>(temperature_argument)),
        temperature_(place(numbers, "temperature")) {
    for (const py::handle& tensor : given) {
      DLTensor t;
      if (!read_tensor(tensor, t)) throw py::value_error("a plan reads plain tensors");
      describe(t, given_);
    }
  }

  py::object run(const Call& call) const override {
    const double temperature = call.number(temperature_, 1.0);
    if (!(least_ <= temperature && temperature <= most_)) return py::none();
    PoolProblem pool = pool_;
    places_.fill(call.tensors, temperature, pool);
    const DLDevice device = call.tensors[0].device;
    std::vector<int64_t> shape = places_.leading(call.tensors);
    shape.push_back(pool.width);
    py::object pooled = new_tensor(dl_dtype(pooled_dtype_), device, shape);
    shape.back() = pool.modalities;
    py::object weights = new_tensor(number_dtype(), device, shape);
    PoolForward f{};
    f.pool = &pool;
    f.pooled = data_of(pooled);
    f.pooled_dtype = pooled_dtype_;
    f.weights = data_of(weights);
    {
      const py::gil_scoped_release release;
      pool_forward(f, call.threads);
    }
    return py::make_tuple(pooled, weights);
  }

  // Gradients of query, scores, bias, temperature (None) and the features, as `needs` says. `saved` are the
  // tensors of the call and the weights, `rest` its arguments without them. None: something is not as it was.
  py::object backward(const py::tuple& saved, const py::tuple& rest, const py::object& d_pooled,
                      const py::object& d_weights, const py::tuple& needs) const {
    if (is_grad_enabled() || is_watched()) return py::none();
    std::vector<DLTensor> tensors(saved.size());
    std::string found;
    for (size_t k = 0; k < tensors.size(); ++k) {
      if (!read_tensor(saved[k], tensors[k])) return py::none();
      if (k + 1 < tensors.size()) describe(tensors[k], found);
    }
    if (found != given_ || !is_contiguous(tensors.back())) return py::none();
    double temperature = 1.0;
    if (temperature_ >= 0) temperature = rest[temperature_argument_].cast<double>();
    PoolProblem pool = pool_;
    places_.fill(tensors, temperature, pool);

    PoolBackward g{};
    g.pool = &pool;
    g.weights = tensors.back().data;
    DLTensor upstream;
    if (!d_pooled.is_none()) {
      Dtype dtype;
      if (!read_tensor(d_pooled, upstream) || !is_contiguous(upstream) || !dtype_of(upstream, dtype))
        return py::none();
      g.d_pooled = {upstream.data, dtype, std::max<int64_t>(pool.n_rows, 1), 0, pool.width};
    }
    if (!d_weights.is_none()) {
      Dtype dtype;
      if (!read_tensor(d_weights, upstream) || !is_contiguous(upstream) || !dtype_of(upstream, dtype) ||
          dtype != (pool.is_double ? Dtype::kFloat64 : Dtype::kFloat32))
        return py::none();
      g.d_weights = upstream.data;
    }

    const DLDevice device = tensors[0].device;
    py::tuple gradients(needs.size());
    for (size_t k = 0; k < gradients.size(); ++k) gradients[k] = py::none();
    const auto fresh = [&](size_t k, std::vector<int64_t> shape) -> void* {
      if (!needs[k].cast<bool>()) return nullptr;
      gradients[k] = new_tensor(number_dtype(), device, shape);
      return data_of(gradients[k]);
    };
    std::vector<int64_t> each = places_.leading(tensors);
    each.push_back(pool.modalities);
    g.d_query = fresh(0, {pool.width});
    g.d_scores = fresh(1, each);
    g.d_bias = fresh(2, {pool.modalities});
    int64_t bytes = 0;
    for (size_t k = 4; k < gradients.size(); ++k)
      if (needs[k].cast<bool>()) {
        const size_t feature = static_cast<size_t>(places_.features) + k - 4;
        gradients[k] = new_like(saved[feature], tensors[feature]);
        bytes += bytes_of(tensors[feature]);
        places_.set_gradient(k - 4, data_of(gradients[k]), pool, tensors[feature].dtype.bits / 8, g);
      }
    g.stream = bytes >= kStreamBytes;
    const int threads = thread_count();
    {
      const py::gil_scoped_release release;
      pool_backward(g, threads);
    }
    return std::move(gradients);
  }

 private:
  DLDataType number_dtype() const { return {kFloating, static_cast<uint8_t>(pool_.is_double ? 64 : 32), 1}; }

  PoolProblem pool_;
  Dtype pooled_dtype_;
  PoolPlaces places_;
  double least_, most_;
  size_t temperature_argument_;
  int temperature_;
  std::string given_;  // what the tensors are
};

}  // namespace

void bind_modal_pool(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<ModalPoolPlan, CallPlan>(m, "PoolPlan")
      .def(py::init([](const PoolProblem& pool, int pooled_dtype, bool stacked, double least, double most,
                       int temperature_argument, const Places& tensors, const Places& numbers,
                       const py::list& given) {
        return new ModalPoolPlan(pool, static_cast<Dtype>(pooled_dtype), stacked, least, most,
                                 temperature_argument, tensors, numbers, given);
      }))
      .def("backward", &ModalPoolPlan::backward);
  m.def("pool_forward", &forward_pool, release());
  m.def("pool_backward", &backward_pool, release());
}

}  // namespace mfd
