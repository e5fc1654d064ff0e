// The launchers of the fusion kernels for Python.
#include "cuda/fusion/fusion.h"

#include <pybind11/stl.h>

#include <vector>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace mfd {
namespace {

PoolTypes types_of(const std::tuple<int, int, int>& dtypes) {
  return {static_cast<Dtype>(std::get<0>(dtypes)), static_cast<Dtype>(std::get<1>(dtypes)),
          static_cast<Dtype>(std::get<2>(dtypes))};
}

// `dtypes`: of query, scores and bias.
void pool_forward(const PoolProblem& pool, const std::tuple<int, int, int>& dtypes, Address pooled,
                  int pooled_dtype, Address weights, int device, Address stream) {
  PoolForward f{};
  f.pool = &pool;
  f.pooled = pointer(pooled);
  f.pooled_dtype = static_cast<Dtype>(pooled_dtype);
  f.weights = pointer(weights);
  cuda::pool_forward(f, types_of(dtypes), {device, pointer(stream)});
}

// (whether a row lies in shared memory, whether a block works on a row, blocks)
std::tuple<bool, bool, int64_t> pool_plan(const PoolProblem& pool, const std::tuple<int, int, int>& dtypes,
                                          bool backward, int d_pooled_dtype, int device) {
  const cuda::PoolPlan plan =
      cuda::pool_plan(pool, types_of(dtypes), backward, static_cast<Dtype>(d_pooled_dtype), device);
  return {plan.parked, plan.whole, plan.blocks};
}

void pool_backward(const PoolProblem& pool, const std::tuple<int, int, int>& dtypes, Address weights,
                   const MatrixFields& d_pooled, Address d_weights, const std::vector<Address>& d_features,
                   int64_t d_row_stride, Address d_query, Address d_bias, Address d_temperature,
                   Address d_scores, Address d_row_temperature, Address query_partial, Address shared_partial,
                   int device, Address stream) {
  PoolBackward g{};
  g.pool = &pool;
  g.weights = pointer(weights);
  g.d_pooled = matrix(d_pooled);
  g.d_weights = pointer(d_weights);
  for (size_t m = 0; m < d_features.size(); ++m) g.d_features[m] = pointer(d_features[m]);
  g.d_row_stride = d_row_stride;
  g.d_query = pointer(d_query);
  g.d_bias = pointer(d_bias);
  g.d_temperature = pointer(d_temperature);
  g.d_scores = pointer(d_scores);
  g.d_row_temperature = pointer(d_row_temperature);
  cuda::pool_backward(g, types_of(dtypes), {pointer(query_partial), pointer<double>(shared_partial)},
                      {device, pointer(stream)});
}

// `weights` and `counts`: addresses in device memory, one per tap, 0 where there is none. `loss` 0: the taps
// carry per-row outputs or gradients.
void match_taps(const std::vector<Tap>& taps, const std::vector<Address>& weights,
                const std::vector<Address>& counts, int kind, bool is_double, bool mean, Address workspace,
                Address loss, int device, Address stream) {
  std::vector<const void*> weight_of;
  std::vector<const int64_t*> count_of;
  for (const Address w : weights) weight_of.push_back(pointer(w));
  for (const Address c : counts) count_of.push_back(pointer<const int64_t>(c));
  const cuda::FeatureTaps all = {taps.data(),
                                 weight_of.empty() ? nullptr : weight_of.data(),
                                 count_of.empty() ? nullptr : count_of.data(),
                                 static_cast<int64_t>(taps.size()),
                                 static_cast<FeatureKind>(kind),
                                 is_double};
  const cuda::FeatureScalarLoss scalar = {mean, pointer<cuda::ScalarWorkspace>(workspace), pointer(loss)};
  cuda::match_taps(all, loss ? &scalar : nullptr, {device, pointer(stream)});
}

// `gradients`: (address, dtype, elements) each.
void scale_all(const std::vector<std::tuple<Address, int, int64_t>>& gradients, Address factor,
               int factor_dtype, int device, Address stream) {
  std::vector<cuda::Scaled> all;
  for (const auto& [grad, dtype, n] : gradients) all.push_back({pointer(grad), static_cast<Dtype>(dtype), n});
  cuda::scale_all(all.data(), static_cast<int64_t>(all.size()), pointer(factor),
                  static_cast<Dtype>(factor_dtype), {device, pointer(stream)});
}

}  // namespace

void bind_cuda_fusion(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("pool_plan", &pool_plan);
  m.def("pool_forward", &pool_forward, release());
  m.def("pool_backward", &pool_backward, release());
  m.def("match_taps", &match_taps, release());
  m.def("scale_all", &scale_all, release());
}

}  // namespace mfd
