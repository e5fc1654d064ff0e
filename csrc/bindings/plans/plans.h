// Plans: what the checks of one call have found, for later calls that are like it. mfd_fast/backends/plans.py
// says what "like it" means and what a plan may hold.
#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <string>
#include <vector>

#include "bindings/plans/dlpack.h"
#include "common/problems/fusion.h"

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

// Where the rows of a call are. Temperatures are numbers between `least` and `most`.
struct RowPlaces {
  int student, teacher, labels, mask, temperature, teacher_temperature;
  double least, most;

  // Sets what differs between the calls of a plan; false: a number is out of its range.
  bool fill(const Call& call, RowProblem& problem) const {
    if (student >= 0) problem.student.data = call.data(student);
    problem.teacher.data = call.data(teacher);
    problem.labels = call.data<int64_t>(labels);
    problem.mask = call.data<unsigned char>(mask);
    const double of_student = call.number(temperature, 1.0);
    const double of_teacher = call.number(teacher_temperature, of_student);
    problem.student_temperature = {nullptr, 0, of_student};
    problem.teacher_temperature = {nullptr, 0, of_teacher};
    return least <= of_student && of_student <= most && least <= of_teacher && of_teacher <= most;
  }
};

// Where the modalities of a call are: one tensor each from `features` on, or `stacked` in one.
struct PoolPlaces {
  bool stacked;
  int features, query, scores, bias, present;
  std::vector<int64_t> steps;  // bytes from the first modality

  PoolPlaces(const PoolProblem& pool, bool is_stacked, const Places& tensors)
      : stacked(is_stacked),
        features(place(tensors, "features")),
        query(place(tensors, "query")),
        scores(place(tensors, "scores")),
        bias(place(tensors, "bias")),
        present(place(tensors, "present")) {
    for (int m = 0; m < pool.modalities; ++m)
      steps.push_back(static_cast<const char*>(pool.features[m].data) -
                      static_cast<const char*>(pool.features[0].data));
  }

  void fill(const std::vector<DLTensor>& tensors, double temperature, PoolProblem& pool) const {
    const auto data = [&tensors](int k) { return k < 0 ? nullptr : tensors[static_cast<size_t>(k)].data; };
    for (int m = 0; m < pool.modalities; ++m)
      pool.features[m].data = stacked
                                  ? static_cast<const char*>(data(features)) + steps[static_cast<size_t>(m)]
                                  : data(features + m);
    pool.query = data(query);
    pool.scores = data(scores);
    pool.bias = data(bias);
    pool.present = static_cast<const unsigned char*>(data(present));
    pool.temperature = {nullptr, 0, temperature};
  }

  // [...] of the features.
  std::vector<int64_t> leading(const std::vector<DLTensor>& tensors) const {
    const DLTensor& first = tensors[static_cast<size_t>(features)];
    return {first.shape, first.shape + first.ndim - (stacked ? 2 : 1)};
  }

  // A pool's backward writes the gradient of the features' tensor number k to `data`, contiguous.
  void set_gradient(size_t k, void* data, const PoolProblem& pool, int64_t element, PoolBackward& g) const {
    if (!stacked) g.d_features[k] = data;
    for (int m = 0; stacked && m < pool.modalities; ++m)
      g.d_features[m] = static_cast<char*>(data) + m * pool.width * element;
    g.d_row_stride = stacked ? pool.modalities * pool.width : pool.width;
  }
};

// What one op does with a call. A plan holds no tensor.
class CallPlan {
 public:
  virtual ~CallPlan() = default;
  // The op's results, or None where a value is out of its range: then the full checks say so.
  virtual pybind11::object run(const Call& call) const = 0;
  // Of an op whose backward is planned too, with what autograd has saved of the call, its arguments without
  // their tensors, the upstream gradients and which gradients are wanted: these, or None as above.
  virtual pybind11::object backward(const pybind11::tuple& saved, const pybind11::tuple& rest,
                                    const pybind11::object& d_first, const pybind11::object& d_second,
                                    const pybind11::tuple& needs) const;
  // Multiplies the last `count` of `saved`, gradients of a scalar loss, by the gradient of that loss. False:
  // nothing has happened.
  virtual bool scale(const pybind11::tuple& saved, size_t count, const pybind11::object& factor) const;
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
// Whether `factor` is the number 1 in a CPU's memory, and no backward is recorded.
bool is_plain_one(const pybind11::object& factor);
// The stream on which PyTorch works now; null on a CPU.
void* current_stream(DLDevice device);
// Uninitialised contiguous tensors, as backends/allocate.py gives them.
pybind11::object new_tensor(DLDataType dtype, DLDevice device, const std::vector<int64_t>& shape);
pybind11::object new_like(pybind11::handle object, const DLTensor& tensor);

constexpr uint8_t kFloating = 2, kBFloat16 = 4;  // DLDataType::code
constexpr int32_t kCPU = 1, kCUDA = 2;           // DLDevice::device_type
// Outputs of at least this many bytes are written past the caches.
constexpr int64_t kStreamBytes = 4 << 20;

int64_t bytes_of(const DLTensor& tensor);
inline bool operator==(const DLDevice& a, const DLDevice& b) {
  return a.device_type == b.device_type && a.device_id == b.device_id;
}

inline void* data_of(pybind11::handle tensor) {
  DLTensor view;
  return read_tensor(tensor, view) ? view.data : nullptr;
}

}  // namespace mfd
