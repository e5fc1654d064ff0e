// What the plans of modal_pool share: vectors as the kernels read them, and a number for the temperature.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "bindings/plans/plans.h"

namespace mfd {

class [[gnu::visibility("hidden")]] ModalPoolPlan : public CallPlan {  // as pybind11 is
 public:
  // `pool` for all that is the same in the calls of this plan, which are like that of `given`; `least` and
  // `most` of the temperature, which is the argument number `temperature_argument`.
  ModalPoolPlan(const PoolProblem& pool, int pooled_dtype, bool stacked, double least, double most,
                int temperature_argument, const Places& tensors, const Places& numbers,
                const pybind11::list& given)
      : pool_(pool),
        pooled_dtype_(static_cast<Dtype>(pooled_dtype)),
        places_(pool, stacked, tensors),
        least_(least),
        most_(most),
        temperature_argument_(static_cast<size_t>(temperature_argument)),
        temperature_(place(numbers, "temperature")) {
    for (const pybind11::handle& tensor : given) {
      DLTensor t;
      if (!read_tensor(tensor, t)) throw pybind11::value_error("a plan reads plain tensors");
      describe(t, given_);
    }
  }

  pybind11::object run(const Call& call) const override {
    const double temperature = call.number(temperature_, 1.0);
    if (!(least_ <= temperature && temperature <= most_)) return pybind11::none();
    PoolProblem pool = pool_;
    places_.fill(call.tensors, temperature, pool);
    const DLDevice device = call.tensors[0].device;
    std::vector<int64_t> shape = places_.leading(call.tensors);
    shape.push_back(pool.width);
    pybind11::object pooled = new_tensor(dl_dtype(pooled_dtype_), device, shape);
    shape.back() = pool.modalities;
    pybind11::object weights = new_tensor(number_dtype(), device, shape);
    PoolForward f{};
    f.pool = &pool;
    f.pooled = data_of(pooled);
    f.pooled_dtype = pooled_dtype_;
    f.weights = data_of(weights);
    if (!start(f, device, call.threads)) return pybind11::none();
    return pybind11::make_tuple(pooled, weights);
  }

  // Gradients of query, scores, bias, temperature (None) and the features, as `needs` says. `saved` are the
  // tensors of the call and the weights, `rest` its arguments without them. None: something is not as it was.
  pybind11::object backward(const pybind11::tuple& saved, const pybind11::tuple& rest,
                            const pybind11::object& d_pooled, const pybind11::object& d_weights,
                            const pybind11::tuple& needs) const override {
    const pybind11::object none = pybind11::none();
    if (is_grad_enabled() || is_watched()) return none;
    std::vector<DLTensor> tensors(saved.size());
    std::string found;
    for (size_t k = 0; k < tensors.size(); ++k) {
      if (!read_tensor(saved[k], tensors[k])) return none;
      if (k + 1 < tensors.size()) describe(tensors[k], found);
    }
    if (found != given_ || !is_contiguous(tensors.back())) return none;
    double temperature = 1.0;
    if (temperature_ >= 0) temperature = rest[temperature_argument_].cast<double>();
    PoolProblem pool = pool_;
    places_.fill(tensors, temperature, pool);

    PoolBackward g{};
    g.pool = &pool;
    g.weights = tensors.back().data;
    const DLDevice device = tensors[0].device;
    DLTensor upstream;
    Dtype dtype;
    const auto is_plain = [&](const pybind11::object& gradient) {
      return read_tensor(gradient, upstream) && is_contiguous(upstream) && dtype_of(upstream, dtype) &&
             upstream.device == device;
    };
    if (!d_pooled.is_none()) {
      if (!is_plain(d_pooled)) return none;
      g.d_pooled = {upstream.data, dtype, std::max<int64_t>(pool.n_rows, 1), 0, pool.width};
    }
    if (!d_weights.is_none()) {
      if (!is_plain(d_weights) || dtype != (pool.is_double ? Dtype::kFloat64 : Dtype::kFloat32)) return none;
      g.d_weights = upstream.data;
    }

    pybind11::tuple gradients(needs.size());
    for (size_t k = 0; k < gradients.size(); ++k) gradients[k] = none;
    const auto fresh = [&](size_t k, int tensor) -> void* {
      if (!needs[k].cast<bool>()) return nullptr;
      const size_t of = static_cast<size_t>(tensor);
      gradients[k] = new_like(saved[of], tensors[of]);
      return data_of(gradients[k]);
    };
    g.d_query = fresh(0, places_.query);
    g.d_scores = fresh(1, places_.scores);
    g.d_bias = fresh(2, places_.bias);
    int64_t bytes = 0;
    for (size_t k = 4; k < gradients.size(); ++k) {
      const int feature = places_.features + static_cast<int>(k) - 4;
      void* const data = fresh(k, feature);
      if (!data) continue;
      const DLTensor& of = tensors[static_cast<size_t>(feature)];
      bytes += bytes_of(of);
      places_.set_gradient(k - 4, data, pool, of.dtype.bits / 8, g);
    }
    g.stream = bytes >= kStreamBytes;
    if (!start(g, device, thread_count())) return none;
    return std::move(gradients);
  }

 protected:
  // Each writes its outputs, or is false: the full checks have something to say.
  virtual bool start(const PoolForward& f, DLDevice device, int threads) const = 0;
  virtual bool start(const PoolBackward& g, DLDevice device, int threads) const = 0;

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

}  // namespace mfd
