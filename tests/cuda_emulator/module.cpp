// The CUDA kernels and launchers, compiled by the host compiler, as a Python module.
#include <pybind11/functional.h>

#include "bindings/bindings.h"
#include "cuda/runtime/occupancy.h"
#include "cuda_runtime.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda_emulated, m) {
  m.doc() = "The CUDA kernels of mfd_fast on the CPU, for checking.";
  mfd::bind_problems(m);
  mfd::bind_cuda(m);
  // Which device is emulated: compute capability as 90, processors, bytes of shared memory per block.
  m.def("launches", &mfd_emulator::launches);
  m.def("set_device", [](int capability, int processors, int shared_bytes) {
    mfd_emulator::device() = {capability, processors, shared_bytes};
    mfd::cuda::forget_occupancies();
  });
  // (stream, device) of every launch since the last call.
  m.def("take_starts", [] {
    py::list found;
    for (const mfd_emulator::Start& start : mfd_emulator::take_starts())
      found.append(py::make_tuple(reinterpret_cast<uintptr_t>(start.stream), start.device));
    return found;
  });
  m.def("current_device", [] { return mfd_emulator::current_device(); });
  // Called as (address of the kernel, blocks, threads, cluster, shared bytes, parameters) in place of every
  // launch; None: the emulator runs them.
  m.def("intercept", [](const py::object& taken) {
    mfd_emulator::interceptor() = nullptr;
    if (taken.is_none()) return;
    mfd_emulator::interceptor() = [taken](void* kernel, const mfd_emulator::Grid& grid,
                                          const std::vector<unsigned char>& parameters) {
      const py::gil_scoped_acquire lock;
      taken(reinterpret_cast<uintptr_t>(kernel), grid.blocks.x, grid.threads.x, grid.cluster,
            grid.shared_bytes,
            py::bytes(reinterpret_cast<const char*>(parameters.data()), parameters.size()));
    };
  });
  // Registers of a kernel by its address, for the occupancy; None: few.
  m.def("set_registers", [](const py::object& known) {
    mfd_emulator::registers() = nullptr;
    mfd::cuda::forget_occupancies();
    if (known.is_none()) return;
    mfd_emulator::registers() = [known](void* kernel) {
      const py::gil_scoped_acquire lock;
      return known(reinterpret_cast<uintptr_t>(kernel)).cast<int>();
    };
  });
}
