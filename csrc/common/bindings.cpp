// The problem that row kernels get, for Python.
#include "bindings.h"

#include <pybind11/stl.h>

#include <memory>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace mfd {
namespace {

Side make_side(Address data, int dtype, int64_t inner, int64_t outer_stride, int64_t row_stride,
               int64_t width, double scale, double softcap, bool standardize) {
  return {pointer(data), static_cast<Dtype>(dtype), inner, outer_stride, row_stride, width, scale, softcap,
          standardize};
}

// Several teachers and the sides that `mixture` points to.
struct Teachers {
  std::vector<Side> sides;
  Mixture mixture;
};

std::unique_ptr<Teachers> make_teachers(std::vector<Side> sides, Address weights, int64_t row_stride) {
  auto teachers = std::make_unique<Teachers>();
  teachers->sides = std::move(sides);
  teachers->mixture = {teachers->sides.data(), static_cast<int64_t>(teachers->sides.size()), pointer(weights),
                       row_stride};
  return teachers;
}

// `teachers` is null for one teacher; it must outlive the problem.
std::unique_ptr<Problem> make_problem(int64_t n_rows, int64_t classes, bool is_double, const Side& student,
                                      const Side& teacher, double ts, Address ts_rows, int64_t ts_stride,
                                      double tt, Address tt_rows, int64_t tt_stride, Address labels,
                                      Address mask, int64_t ignore_index, double smoothing,
                                      bool scale_by_temperature, int divergence, double first, double second,
                                      const Teachers* teachers) {
  return std::unique_ptr<Problem>(new Problem{n_rows,
                                              classes,
                                              is_double,
                                              student,
                                              teacher,
                                              {pointer(ts_rows), ts_stride, ts},
                                              {pointer(tt_rows), tt_stride, tt},
                                              pointer<const int64_t>(labels),
                                              pointer<const unsigned char>(mask),
                                              ignore_index,
                                              smoothing,
                                              scale_by_temperature,
                                              static_cast<Divergence>(divergence),
                                              first,
                                              second,
                                              teachers ? &teachers->mixture : nullptr});
}

std::unique_ptr<TopK> make_topk(Address indices, int64_t listed, int tail, bool logprobs) {
  return std::unique_ptr<TopK>(
      new TopK{pointer<const int64_t>(indices), listed, static_cast<Tail>(tail), logprobs});
}

}  // namespace

// Local to the module: the tests load a second one, with the CUDA kernels for a host compiler.
void bind_problem(py::module_& m) {
  py::class_<Side>(m, "Side", py::module_local()).def(py::init(&make_side));
  py::class_<Teachers>(m, "Teachers", py::module_local()).def(py::init(&make_teachers));
  py::class_<Problem>(m, "Problem", py::module_local()).def(py::init(&make_problem));
  py::class_<TopK>(m, "TopK", py::module_local()).def(py::init(&make_topk));
}

}  // namespace mfd
