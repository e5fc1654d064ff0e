// Buffers for gradients that the allocator would have to map afresh, lent to tensors through DLPack.
#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/plans/dlpack.h"
#include "cpu/runtime/buffer_pool.h"

namespace py = pybind11;

namespace mfd {
namespace {

// A pool buffer on its way to a tensor; the tensor's storage gives it back.
struct Lent {
  DLManagedTensor managed{};
  std::vector<int64_t> shape;
  Buffer buffer;
};

void give_back(DLManagedTensor* managed) {
  Lent* lent = static_cast<Lent*>(managed->manager_ctx);
  pool_give_back(lent->buffer);
  delete lent;
}

constexpr const char* kCapsule = "dltensor";

// DLPack capsule of an uninitialised contiguous tensor, or None when the pool declines.
py::object lend(const py::tuple& shape, bool bfloat16, int64_t item_size) {
  auto lent = std::make_unique<Lent>();
  size_t bytes = static_cast<size_t>(item_size);
  for (const py::handle& size : shape) {
    lent->shape.push_back(size.cast<int64_t>());
    bytes *= static_cast<size_t>(lent->shape.back());
  }
  lent->buffer = pool_take(bytes);
  if (!lent->buffer.data) return py::none();
  DLManagedTensor& managed = lent->managed;
  managed.dl_tensor = {lent->buffer.data,
                       {1, 0},
                       static_cast<int32_t>(lent->shape.size()),
                       {static_cast<uint8_t>(bfloat16 ? 4 : 2), static_cast<uint8_t>(8 * item_size), 1},
                       lent->shape.data(),
                       nullptr,
                       0};
  managed.manager_ctx = lent.get();
  managed.deleter = give_back;
  PyObject* capsule = PyCapsule_New(&lent.release()->managed, kCapsule, [](PyObject* self) {
    // A consumer renames the capsule; one that was never consumed gives the buffer back here.
    if (!PyCapsule_IsValid(self, kCapsule)) return;
    auto* unused = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(self, kCapsule));
    unused->deleter(unused);
  });
  return py::reinterpret_steal<py::object>(capsule);
}

py::tuple stats_of_pool() {
  const PoolStats s = pool_stats();
  return py::make_tuple(s.limit, s.idle_bytes, s.live_bytes, s.idle_buffers, s.live_buffers, s.reused,
                        s.mapped);
}

}  // namespace

void bind_gradient_buffers(py::module_& m) {
  m.def("pool_lend", &lend);
  m.def("pool_set_limit", &pool_set_limit, py::call_guard<py::gil_scoped_release>());
  m.def("pool_clear", &pool_clear, py::call_guard<py::gil_scoped_release>());
  m.def("pool_stats", &stats_of_pool);
}

}  // namespace mfd
