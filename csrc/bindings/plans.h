// Plans: what the checks of one call have found, for later calls that are like it. mfd_fast/backends/plans.py
// says what "like it" means and what a plan may hold.
#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <string>
#include <vector>

#include "bindings/dlpack.h"
#include "common/problems/rows.h"

namespace mfd {

// The arguments of a call; everything is borrowed from the tuple they came in.
struct Call {
  std::vector<PyObject*> objects;  // the tensors, in the order in which they stand in the arguments
  std::vector<DLTensor> tensors;   // the same as memory
  std::vector<bool> needs;         // whether a gradient of the tensor is recorded
  std::vector<double> numbers;     // those that a plan reads anew each time, in order
  int threads = 1;
  bool needs_grad = false;  // of any tensor

  template <class T = void>
  T* data(int tensor) const {
    return tensor < 0 ? nullptr : static_cast<T*>(tensors[static_cast<size_t>(tensor)].data);
  }
  double number(int number, double otherwise) const {
    return number < 0 ? otherwise : numbers[static_cast<size_t>(number)];
  }
};

// Of the first tensor or number of an argument; -1 where there is none.
using Places = std::map<std::string, int>;
inline int place(const Places& places, const char* argument) {
  const auto found = places.find(argument);
  return found == places.end() ? -1 : found->second;
}

// What one op does with a call. A plan holds no tensor.
class Plan {
 public:
  virtual ~Plan() = default;
  // The op's results, or None where a value is out of its range: then the full checks say so.
  virtual pybind11::object run(const Call& call) const = 0;
};

// PyTorch, as a plan needs it.

// Reads a tensor that is nothing but memory: no subclass, no view that negates, enough storage. False: it is
// not.
bool read_tensor(pybind11::handle object, DLTensor& tensor);
// Adds its dtype, device, shape and strides to `text`.
void describe(const DLTensor& tensor, std::string& text);
bool is_contiguous(const DLTensor& tensor);
// The kernels' name of a floating dtype; false: they have none.
bool dtype_of(const DLTensor& tensor, Dtype& dtype);
DLDataType dl_dtype(Dtype dtype);
// Whether somebody else looks at every operation, or a backward is recorded: then no plan runs.
bool is_watched();
bool is_grad_enabled();
int thread_count();
// Uninitialised contiguous tensors, as backends/allocate.py gives them.
pybind11::object new_tensor(DLDataType dtype, DLDevice device, const std::vector<int64_t>& shape);
pybind11::object new_like(pybind11::handle object, const DLTensor& tensor);

constexpr uint8_t kFloating = 2, kBFloat16 = 4;  // DLDataType::code
constexpr int32_t kCPU = 1;                      // DLDevice::device_type
// Outputs of at least this many bytes are written past the caches.
constexpr int64_t kStreamBytes = 4 << 20;

int64_t bytes_of(const DLTensor& tensor);

inline void* data_of(pybind11::handle tensor) {
  DLTensor view;
  return read_tensor(tensor, view) ? view.data : nullptr;
}

}  // namespace mfd
