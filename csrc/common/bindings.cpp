// What kernels of all backends get, for Python.
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

std::unique_ptr<Pool> make_pool(int64_t n_rows, int64_t width, bool is_double,
                                const std::vector<Rows>& features, Address query, Address scores,
                                Address bias, double temperature, Address temperature_rows,
                                int64_t temperature_stride, double scale, Address present) {
  auto p = std::make_unique<Pool>();
  p->n_rows = n_rows;
  p->width = width;
  p->modalities = static_cast<int>(features.size());
  p->is_double = is_double;
  for (size_t m = 0; m < features.size(); ++m) p->features[m] = matrix(features[m]);
  p->query = pointer(query);
  p->scores = pointer(scores);
  p->bias = pointer(bias);
  p->temperature = {pointer(temperature_rows), temperature_stride, temperature};
  p->scale = scale;
  p->present = pointer<const unsigned char>(present);
  return p;
}

Tap make_tap(int64_t n_rows, int64_t width, const Rows& student, const Rows& teacher, Address mask,
             double weight, Address grad_rows, int64_t grad_stride, Address d_student, Address d_teacher,
             Address distances, bool stream) {
  return {n_rows,
          width,
          matrix(student),
          matrix(teacher),
          pointer<const unsigned char>(mask),
          weight,
          {pointer(grad_rows), grad_stride, 0.0},
          pointer(d_student),
          pointer(d_teacher),
          pointer(distances),
          stream};
}

}  // namespace

// Local to the module: the tests load a second one, with the CUDA kernels for a host compiler.
void bind_problem(py::module_& m) {
  py::class_<Side>(m, "Side", py::module_local()).def(py::init(&make_side));
  py::class_<Teachers>(m, "Teachers", py::module_local()).def(py::init(&make_teachers));
  py::class_<Problem>(m, "Problem", py::module_local()).def(py::init(&make_problem));
  py::class_<TopK>(m, "TopK", py::module_local()).def(py::init(&make_topk));
  py::class_<Pool>(m, "Pool", py::module_local()).def(py::init(&make_pool));
  py::class_<Tap>(m, "Tap", py::module_local()).def(py::init(&make_tap));
}

}  // namespace mfd
