// The CUDA kernels and launchers, compiled by the host compiler, as a Python module.
#include "bindings.h"
#include "cuda_runtime.h"

PYBIND11_MODULE(_cuda_emulated, m) {
  m.doc() = "The CUDA kernels of mfd_fast on the CPU, for checking.";
  mfd::bind_problem(m);
  mfd::bind_cuda(m);
  m.def("launches", &mfd_emulator::launches);
  // Which device is emulated: compute capability as 90, processors, bytes of shared memory per block.
  m.def("set_device", [](int capability, int processors, int shared_bytes) {
    mfd_emulator::device() = {capability, processors, shared_bytes};
  });
}
