// Products of matrices on the CPU.
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "cpu/runtime/fusion.h"
#include "cpu/runtime/isa.h"

namespace py = pybind11;

namespace mfd {
namespace {

void product_of(int64_t rows, int64_t columns, int64_t depth, Address a, int64_t a_row, int64_t a_depth,
                Address b, int64_t b_depth, int64_t b_column, Address bias, Address out, int threads) {
  product({rows, columns, depth, pointer<const float>(a), pointer<const float>(b), pointer<const float>(bias),
           a_row, a_depth, b_depth, b_column, pointer<float>(out)},
          threads);
}

// a [rows, depth] and b [columns, depth] in bfloat16, dense, depth even.
void pair_product_of(int64_t rows, int64_t columns, int64_t depth, Address a, Address b, Address bias,
                     Address out, int threads) {
  const int64_t pairs = depth / 2;
  pair_product({rows, columns, pairs, pointer<const float>(a), pointer<const float>(b),
                pointer<const float>(bias), pairs, 1, 1, pairs, pointer<float>(out)},
               threads);
}

}  // namespace

void bind_product(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("product", &product_of, release());
  m.def("pair_product", &pair_product_of, release());
  m.def("has_pair_product", [] { return product_of_pairs() != nullptr; });
}

}  // namespace mfd
