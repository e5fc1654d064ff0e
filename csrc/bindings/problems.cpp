// What kernels of all backends get, for Python.
#include <pybind11/stl.h>

#include <memory>
#include <utility>
#include <vector>

#include "bindings/bindings.h"

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
std::unique_ptr<RowProblem> make_problem(int64_t n_rows, int64_t classes, bool is_double, const Side& student,
                                         const Side& teacher, double ts, Address ts_rows, int64_t ts_stride,
                                         double tt, Address tt_rows, int64_t tt_stride, Address labels,
                                         Address mask, int64_t ignore_index, bool keeps_ignored,
                                         double smoothing, bool scale_by_temperature, int divergence,
                                         double first, double second, const Teachers* teachers) {
  return std::unique_ptr<RowProblem>(new RowProblem{n_rows,
                                                    classes,
                                                    is_double,
                                                    student,
                                                    teacher,
                                                    {pointer(ts_rows), ts_stride, ts},
                                                    {pointer(tt_rows), tt_stride, tt},
                                                    pointer<const int64_t>(labels),
                                                    pointer<const unsigned char>(mask),
                                                    ignore_index,
                                                    keeps_ignored,
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

std::unique_ptr<PoolProblem> make_pool(int64_t n_rows, int64_t width, bool is_double,
                                       const std::vector<MatrixFields>& features, Address query,
                                       Address scores, Address bias, double temperature,
                                       Address temperature_rows, int64_t temperature_stride, double scale,
                                       Address present) {
  auto p = std::make_unique<PoolProblem>();
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

Tap make_tap(int64_t n_rows, int64_t width, const MatrixFields& student, const MatrixFields& teacher,
             Address mask, double weight, Address grad_rows, int64_t grad_stride, Address d_student,
             Address d_teacher, Address distances, bool stream) {
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

// A number of an enumeration.
template <class Enum>
int code(Enum of) {
  return static_cast<int>(of);
}

}  // namespace

// Local to the module: the tests load a second one, with the CUDA kernels for a host compiler.
void bind_problems(py::module_& m) {
  using namespace py::literals;
  py::class_<Side>(m, "Side", py::module_local())
      .def(py::init(&make_side), "data"_a, "dtype"_a, "inner"_a, "outer_stride"_a, "row_stride"_a, "width"_a,
           "scale"_a, "softcap"_a, "standardize"_a);
  py::class_<Teachers>(m, "Teachers", py::module_local())
      .def(py::init(&make_teachers), "sides"_a, "weights"_a, "row_stride"_a);
  py::class_<RowProblem>(m, "Problem", py::module_local())
      .def(py::init(&make_problem), "n_rows"_a, "classes"_a, "is_double"_a, "student"_a, "teacher"_a,
           "student_temperature"_a, "student_temperature_rows"_a, "student_temperature_stride"_a,
           "teacher_temperature"_a, "teacher_temperature_rows"_a, "teacher_temperature_stride"_a, "labels"_a,
           "mask"_a, "ignore_index"_a, "keeps_ignored"_a, "smoothing"_a, "scale_by_temperature"_a,
           "divergence"_a, "first"_a, "second"_a, "teachers"_a);
  py::class_<TopK>(m, "TopK", py::module_local())
      .def(py::init(&make_topk), "indices"_a, "listed"_a, "tail"_a, "logprobs"_a);
  py::class_<PoolProblem>(m, "Pool", py::module_local())
      .def(py::init(&make_pool), "n_rows"_a, "width"_a, "is_double"_a, "features"_a, "query"_a, "scores"_a,
           "bias"_a, "temperature"_a, "temperature_rows"_a, "temperature_stride"_a, "scale"_a, "present"_a);
  py::class_<Tap>(m, "Tap", py::module_local())
      .def(py::init(&make_tap), "n_rows"_a, "width"_a, "student"_a, "teacher"_a, "mask"_a, "weight"_a,
           "grad_rows"_a, "grad_stride"_a, "d_student"_a, "d_teacher"_a, "distances"_a, "stream"_a);

  // The numbers that Python knows as well (mfd_fast/codes.py), for its tests.
  m.attr("dtypes") = py::dict("float32"_a = code(Dtype::kFloat32), "float64"_a = code(Dtype::kFloat64),
                              "bfloat16"_a = code(Dtype::kBFloat16), "float16"_a = code(Dtype::kFloat16));
  m.attr("divergences") =
      py::dict("forward_kl"_a = code(Divergence::kForwardKL), "reverse_kl"_a = code(Divergence::kReverseKL),
               "jsd"_a = code(Divergence::kJSD), "skew_kl"_a = code(Divergence::kSkewKL),
               "skew_reverse_kl"_a = code(Divergence::kSkewReverseKL), "tvd"_a = code(Divergence::kTVD),
               "alpha_beta"_a = code(Divergence::kAlphaBeta), "dkd"_a = code(Divergence::kDKD),
               "nkd"_a = code(Divergence::kNKD), "cross_entropy"_a = code(Divergence::kCrossEntropy));
  m.attr("tails") = py::dict("bucket"_a = code(Tail::kBucket), "renormalize"_a = code(Tail::kRenormalize),
                             "zero"_a = code(Tail::kZero));
  m.attr("feature_kinds") =
      py::dict("mse"_a = code(kMse), "smooth_l1"_a = code(kSmoothL1), "cosine"_a = code(kCosine));
}

}  // namespace mfd
