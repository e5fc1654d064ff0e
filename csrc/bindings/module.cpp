// The native module: which instruction set runs, a ceiling for benchmarks, and what the other files of this
// folder bind.
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "cpu/runtime/distill.h"
#include "cpu/runtime/isa.h"

namespace py = pybind11;

namespace mfd {

// Plans of calls, before the ops.
void bind_plans(py::module_& m);
void bind_programs(py::module_& m);
// The CPU's ops.
void bind_distill_loss(py::module_& m);
void bind_modal_pool(py::module_& m);
void bind_feature_loss(py::module_& m);
void bind_mfd_loss(py::module_& m);
void bind_product(py::module_& m);
void bind_gradient_buffers(py::module_& m);

}  // namespace mfd

PYBIND11_MODULE(_C, m) {
  using mfd::Address;
  using mfd::pointer;
  m.doc() = "Native kernels of mfd_fast.";
  m.attr("compiler") = MFD_COMPILER;
  mfd::bind_problems(m);
  mfd::bind_plans(m);
  mfd::bind_programs(m);
#ifdef MFD_HAVE_CUDA
  mfd::bind_cuda(m);
#endif
  mfd::bind_distill_loss(m);
  mfd::bind_modal_pool(m);
  mfd::bind_feature_loss(m);
  mfd::bind_mfd_loss(m);
  mfd::bind_product(m);
  mfd::bind_gradient_buffers(m);
  m.def("select_isa", &mfd::select_isa);
  m.def("current_isa", &mfd::current_isa);
  m.def("supported_isas", &mfd::supported_isas);
  m.def(
      "stream_add",
      [](Address a, Address b, Address out, int64_t n, int threads) {
        mfd::stream_add(pointer<const float>(a), pointer<const float>(b), pointer<float>(out), n, threads);
      },
      py::call_guard<py::gil_scoped_release>());
}
