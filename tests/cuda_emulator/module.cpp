// The CUDA kernels and launchers, compiled by the host compiler, as a Python module.
#include "bindings/bindings.h"
#include "cuda_runtime.h"

PYBIND11_MODULE(_cuda_emulated, m) {
  m.doc() = "The CUDA kernels of mfd_fast on the CPU, for checking.";
  mfd::bind_problems(m);
  mfd::bind_cuda(m);
  // Which device is emulated: compute capability as 90, processors, bytes of shared memory per block.
  m.def("launches", &mfd_emulator::launches);
  m.def("set_device", [](int capability, int processors, int shared_bytes) {
    mfd_emulator::device() = {capability, processors, shared_bytes};
  });
  // (stream, device) of every launch since the last call.
  m.def("take_starts", [] {
    pybind11::list found;
    for (const mfd_emulator::Start& start : mfd_emulator::take_starts())
      found.append(pybind11::make_tuple(reinterpret_cast<uintptr_t>(start.stream), start.device));
    return found;
  });
  m.def("current_device", [] { return mfd_emulator::current_device(); });
}
