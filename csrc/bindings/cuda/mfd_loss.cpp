// The launcher of the single pass of mfd_loss for Python.
#include "cuda/fusion/mfd_loss.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "bindings/cuda/scalar.h"

namespace py = pybind11;

namespace mfd {
namespace {

// (address, dtype) of a contiguous tensor
using Typed = std::tuple<Address, int>;

RowScalar row_scalar(const ScalarFields& fields) {
  return {pointer(std::get<0>(fields)), 0, std::get<1>(fields)};
}

// `scalars`: the weights of the soft, hard, feature and pool terms, and the divisor. `outputs`: weights,
// predictions and the four terms. `products`: y and dz, both 0 or neither, and dz's stride. `gradients`: of
// query, bias and head bias, 0 where they are not wanted.
void mfd_loss(const RowProblem& problem, const PoolProblem& pool, const std::tuple<int, int, int>& types,
              bool use_soft, bool use_hard, Address weight, const std::array<ScalarFields, 5>& scalars,
              bool count_rows, const MatrixFields& target, int kind, Address pool_target, const Typed& head,
              int64_t head_stride, const Typed& head_bias, const std::array<Address, 2 + kMfdTerms>& outputs,
              bool wants_logits, bool wants_pooled, const std::tuple<Address, Address, int64_t>& products,
              const std::vector<Address>& d_features, int64_t d_row_stride,
              const std::array<Address, 3>& gradients, Address partial, Address tickets, int device,
              Address stream) {
  MfdPass p{};
  p.forward.problem = problem;
  p.forward.use_soft = use_soft;
  p.forward.use_hard = use_hard;
  p.forward.weight = {pointer(weight), 1, 1.0};
  p.soft_weight = row_scalar(scalars[0]);
  p.hard_weight = row_scalar(scalars[1]);
  p.feature_weight = row_scalar(scalars[2]);
  p.pool_weight = row_scalar(scalars[3]);
  p.divisor = row_scalar(scalars[4]);
  p.count_rows = count_rows;
  p.pool = pool;
  p.types = {static_cast<Dtype>(std::get<0>(types)), static_cast<Dtype>(std::get<1>(types)),
             static_cast<Dtype>(std::get<2>(types))};
  p.target = matrix(target);
  p.kind = static_cast<FeatureKind>(kind);
  p.pool_target = pointer<const float>(pool_target);
  p.head = pointer(std::get<0>(head));
  p.operand = static_cast<Dtype>(std::get<1>(head));
  p.head_stride = head_stride;
  p.head_bias = pointer(std::get<0>(head_bias));
  p.head_bias_dtype = static_cast<Dtype>(std::get<1>(head_bias));
  p.weights = pointer<float>(outputs[0]);
  p.predictions = pointer<int64_t>(outputs[1]);
  for (size_t k = 0; k < kMfdTerms; ++k) p.terms[k] = pointer<float>(outputs[2 + k]);
  p.wants_logits = wants_logits;
  p.wants_pooled = wants_pooled;
  p.y = pointer(std::get<0>(products));
  p.dz = pointer(std::get<1>(products));
  p.dz_stride = std::get<2>(products);
  for (size_t m = 0; m < d_features.size(); ++m) p.d_features[m] = pointer(d_features[m]);
  p.d_row_stride = d_row_stride;
  p.d_query = pointer(gradients[0]);
  p.d_bias = pointer(gradients[1]);
  p.d_head_bias = pointer(gradients[2]);
  p.partial = pointer<double>(partial);
  p.tickets = pointer<unsigned>(tickets);
  cuda::mfd_loss(p, {device, pointer(stream)});
}

}  // namespace

void bind_cuda_mfd(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.attr("mfd_rows") = kMfdRows;
  m.attr("mfd_group") = kMfdGroup;
  m.attr("mfd_terms") = kMfdTerms;
  m.def("mfd_fits", &cuda::mfd_fits);
  m.def("mfd_loss", &mfd_loss, release());
}

}  // namespace mfd
