// Plans of calls whose launches Python has written down: mfd_fast/backends/triton/program.py says how and
// when.
#include <dlfcn.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/plans/plans.h"

namespace py = pybind11;

namespace mfd {
namespace {

// What is used of the CUDA driver, once a program is made; null where launches do nothing.
struct Driver {
  using Launch = int(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                     unsigned shared_bytes, void* stream, void** parameters, void** extra);
  Launch* launch = nullptr;
  int (*current_device)(int*) = nullptr;
};
Driver driver;
bool has_driver = false;

// `path` "" stands for a driver that does nothing.
void use_driver(const std::string& path) {
  driver = {};
  has_driver = true;
  if (path.empty()) return;
  has_driver = false;
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(std::string("mfd_fast: ") + dlerror());
  driver.launch = reinterpret_cast<Driver::Launch*>(dlsym(library, "cuLaunchKernel"));
  driver.current_device = reinterpret_cast<int (*)(int*)>(dlsym(library, "cuCtxGetDevice"));
  if (!driver.launch || !driver.current_device)
    throw std::runtime_error("mfd_fast: " + path + " has no cuLaunchKernel");
  has_driver = true;
}

// Where a kernel's parameter comes from: `bits` as they are, the address of input or buffer number `index`
// plus `bits`, number `index` as float32 or float64, or what rounding it to float32 has lost.
enum class From : int { kConstant = 0, kInput = 1, kBuffer = 2, kNumber = 3, kLow = 4 };
struct KernelParameter {
  From from;
  size_t index;
  uint64_t bits;
  int bytes;
};

uint64_t bits_of(double value, int bytes) {
  uint64_t bits = 0;
  if (bytes == 8) {
    std::memcpy(&bits, &value, sizeof(value));
  } else {
    const float rounded = static_cast<float>(value);
    std::memcpy(&bits, &rounded, sizeof(rounded));
  }
  return bits;
}

struct BufferKind {
  DLDataType dtype;
  std::vector<int64_t> shape;
};

// A launch of the CUDA driver's `function`, or of Python's `call(inputs, buffers, numbers)`, whose result
// becomes buffer number `out` where that is not negative.
struct ProgramStep {
  void* function = nullptr;
  unsigned programs = 0, threads = 0, shared_bytes = 0;
  std::vector<KernelParameter> parameters;
  py::object call;  // or the owner of `function`
  int out = -1;
};

// Buffers that are made, launches in their order, and which of the buffers are results.
class Program {
 public:
  using ParameterFields = std::tuple<int, size_t, uint64_t, int>;

  // `inputs`: tensors like those of every run.
  Program(const py::list& inputs, const std::vector<std::tuple<int, int, std::vector<int64_t>>>& buffers,
          const py::list& steps, py::object results)
      : results_(std::move(results)) {
    for (const py::handle& input : inputs) {
      DLTensor t;
      if (!read_tensor(input, t)) throw py::value_error("a program reads plain tensors");
      describe(t, description_);
      alignments_.push_back(reinterpret_cast<Address>(t.data) % kAlignment);
    }
    for (const auto& [code, bits, shape] : buffers)
      buffers_.push_back({{static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1}, shape});
    for (const py::handle& each : steps) {
      const py::tuple fields = py::reinterpret_borrow<py::tuple>(each);
      ProgramStep step;
      step.call = fields[0];
      if (fields.size() == 2) {
        step.out = fields[1].cast<int>();
      } else {
        step.function = pointer(fields[1].cast<Address>());
        step.programs = fields[2].cast<unsigned>();
        step.threads = fields[3].cast<unsigned>();
        step.shared_bytes = fields[4].cast<unsigned>();
        for (const auto& [from, index, value, bytes] : fields[5].cast<std::vector<ParameterFields>>())
          step.parameters.push_back({static_cast<From>(from), index, value, bytes});
      }
      steps_.push_back(std::move(step));
    }
  }

  const std::string& description() const { return description_; }

  // The results, or None: something is not as it was when the program was written.
  py::object run(const std::vector<DLTensor>& inputs, const std::vector<PyObject*>& objects,
                 const std::vector<double>& numbers) const {
    const DLDevice device = inputs[0].device;
    // A kernel is compiled for the alignment of its pointers, and loaded for a device.
    for (size_t k = 0; k < inputs.size(); ++k)
      if (reinterpret_cast<Address>(inputs[k].data) % kAlignment != alignments_[k]) return py::none();
    if (!has_driver) return py::none();
    int current = device.device_id;
    if (device.device_type != kCPU && driver.current_device &&
        (driver.current_device(&current) || current != device.device_id))
      return py::none();
    std::vector<py::object> made(buffers_.size());
    std::vector<Address> addresses(buffers_.size(), 0);
    for (size_t k = 0; k < made.size(); ++k) {
      if (buffers_[k].dtype.bits == 0) continue;  // a call makes it
      made[k] = new_tensor(buffers_[k].dtype, device, buffers_[k].shape);
      addresses[k] = reinterpret_cast<Address>(data_of(made[k]));
      if (addresses[k] % kAlignment) return py::none();
    }
    void* const stream = current_stream(device);
    for (const ProgramStep& step : steps_) {
      if (!step.function) {
        py::object out = call(step, objects, made, numbers);
        if (step.out >= 0) made[static_cast<size_t>(step.out)] = std::move(out);
        continue;
      }
      const size_t count = step.parameters.size();
      std::vector<uint64_t> values(count);
      std::vector<void*> parameters(count);
      for (size_t k = 0; k < count; ++k) {
        const KernelParameter& p = step.parameters[k];
        parameters[k] = &values[k];
        switch (p.from) {
          case From::kConstant:
            values[k] = p.bits;
            break;
          case From::kInput:
            values[k] = reinterpret_cast<Address>(inputs[p.index].data) + p.bits;
            break;
          case From::kBuffer:
            values[k] = addresses[p.index] + p.bits;
            break;
          case From::kNumber:
            values[k] = bits_of(numbers[p.index], p.bytes);
            break;
          case From::kLow:
            values[k] = bits_of(numbers[p.index] - static_cast<float>(numbers[p.index]), p.bytes);
            break;
        }
      }
      if (!driver.launch) continue;
      const py::gil_scoped_release release;
      const int error = driver.launch(step.function, step.programs, 1, 1, step.threads, 1, 1,
                                      step.shared_bytes, stream, parameters.data(), nullptr);
      if (error) throw std::runtime_error("mfd_fast: cuLaunchKernel: error " + std::to_string(error));
    }
    return filled(results_, made);
  }

 private:
  static constexpr Address kAlignment = 16;

  static py::object call(const ProgramStep& step, const std::vector<PyObject*>& objects,
                         const std::vector<py::object>& made, const std::vector<double>& numbers) {
    py::list inputs, buffers, values;
    for (PyObject* object : objects) inputs.append(py::handle(object));
    for (const py::object& object : made) buffers.append(object ? object : py::none());
    for (const double number : numbers) values.append(number);
    return step.call(inputs, buffers, values);
  }

  // A nested tuple or list of numbers of buffers and of None.
  static py::object filled(const py::handle& results, const std::vector<py::object>& made) {
    if (results.is_none()) return py::none();
    if (PyLong_Check(results.ptr())) return made[results.cast<size_t>()];
    const py::sequence each = py::reinterpret_borrow<py::sequence>(results);
    py::tuple found(each.size());
    for (size_t k = 0; k < found.size(); ++k) found[k] = filled(each[k], made);
    if (PyTuple_Check(results.ptr())) return std::move(found);
    return py::list(found);
  }

  std::string description_;  // of the inputs
  std::vector<Address> alignments_;
  std::vector<BufferKind> buffers_;
  std::vector<ProgramStep> steps_;
  py::object results_;
};

// Labels that the host can read, and what they may be.
struct LabelPlaces {
  int labels, mask;
  int64_t classes, ignore_index;
};

class ProgramPlan final : public CallPlan {
 public:
  // `ranges`: (least, most) of each number; `arguments`: where each stands among the call's arguments.
  // `backward` takes what was saved and the first upstream gradient, if all of `needs` are wanted; `scale`
  // takes gradients and the factor. Both may be missing.
  ProgramPlan(Program forward, std::vector<std::pair<double, double>> ranges, std::vector<size_t> arguments,
              const std::tuple<int, int, int64_t, int64_t>& labels, std::optional<Program> backward,
              py::object needs, std::optional<Program> scale)
      : forward_(std::move(forward)),
        ranges_(std::move(ranges)),
        arguments_(std::move(arguments)),
        labels_{std::get<0>(labels), std::get<1>(labels), std::get<2>(labels), std::get<3>(labels)},
        backward_(std::move(backward)),
        needs_(std::move(needs)),
        scale_(std::move(scale)),
        runtime_(py::module_::import("triton.knobs").attr("runtime")) {}

  py::object run(const Call& call) const override {
    if (is_hooked() || !are_in_range(call.numbers) || has_bad_label(call)) return py::none();
    return forward_.run(call.tensors, call.objects, call.numbers);
  }

  py::object backward(const py::tuple& saved, const py::tuple& rest, const py::object& d_first,
                      const py::object& d_second, const py::tuple& needs) const override {
    if (!backward_ || !d_second.is_none() || d_first.is_none() || !needs.equal(needs_)) return py::none();
    std::vector<PyObject*> objects = objects_of(saved, 0);
    objects.push_back(d_first.ptr());
    std::vector<double> numbers;
    for (const size_t k : arguments_) numbers.push_back(rest[k].cast<double>());
    return run(*backward_, objects, numbers);
  }

  bool scale(const py::tuple& saved, size_t count, const py::object& factor) const override {
    if (!scale_) return false;
    std::vector<PyObject*> objects = objects_of(saved, saved.size() - count);
    objects.push_back(factor.ptr());
    return !run(*scale_, objects, {}).is_none();
  }

 private:
  static std::vector<PyObject*> objects_of(const py::tuple& saved, size_t from) {
    std::vector<PyObject*> objects;
    for (size_t k = from; k < saved.size(); ++k) {
      PyObject* const object = PyTuple_GET_ITEM(saved.ptr(), static_cast<Py_ssize_t>(k));
      if (object != Py_None) objects.push_back(object);
    }
    return objects;
  }

  py::object run(const Program& program, const std::vector<PyObject*>& objects,
                 const std::vector<double>& numbers) const {
    if (is_grad_enabled() || is_watched() || is_hooked()) return py::none();
    std::vector<DLTensor> tensors(objects.size());
    std::string found;
    for (size_t k = 0; k < objects.size(); ++k) {
      if (!read_tensor(objects[k], tensors[k])) return py::none();
      describe(tensors[k], found);
    }
    if (found != program.description()) return py::none();
    return program.run(tensors, objects, numbers);
  }

  bool are_in_range(const std::vector<double>& numbers) const {
    for (size_t k = 0; k < numbers.size(); ++k)
      if (!(ranges_[k].first <= numbers[k] && numbers[k] <= ranges_[k].second)) return false;
    return true;
  }

  bool has_bad_label(const Call& call) const {
    if (labels_.labels < 0) return false;
    const DLTensor& t = call.tensors[static_cast<size_t>(labels_.labels)];
    if (t.device.device_type != kCPU) return false;
    const int64_t* const labels = static_cast<const int64_t*>(t.data);
    const unsigned char* const mask = call.data<const unsigned char>(labels_.mask);
    for (int64_t i = 0; i < bytes_of(t) / 8; ++i)
      if ((!mask || mask[i]) && labels[i] != labels_.ignore_index &&
          (labels[i] < 0 || labels[i] >= labels_.classes))
        return true;
    return false;
  }

  // Whether somebody, a profiler, has asked Triton to be told of launches.
  bool is_hooked() const {
    for (const py::str* const name : {&enter_, &exit_}) {
      const py::object hook = runtime_.attr(*name);
      if (hook.is_none()) continue;
      const py::object calls = py::getattr(hook, "calls", py::none());
      if (!PyList_CheckExact(calls.ptr()) || PyList_GET_SIZE(calls.ptr())) return true;
    }
    return false;
  }

  Program forward_;
  std::vector<std::pair<double, double>> ranges_;
  std::vector<size_t> arguments_;
  LabelPlaces labels_;
  std::optional<Program> backward_;
  py::object needs_;
  std::optional<Program> scale_;
  py::object runtime_;
  py::str enter_{"launch_enter_hook"}, exit_{"launch_exit_hook"};
};

}  // namespace

void bind_programs(py::module_& m) {
  m.def("use_driver", &use_driver);
  m.def("has_driver", [] { return has_driver; });
  py::class_<Program>(m, "Program")
      .def(py::init<const py::list&, const std::vector<std::tuple<int, int, std::vector<int64_t>>>&,
                    const py::list&, py::object>());
  py::class_<ProgramPlan, CallPlan>(m, "ProgramPlan")
      .def(py::init<Program, std::vector<std::pair<double, double>>, std::vector<size_t>,
                    const std::tuple<int, int, int64_t, int64_t>&, std::optional<Program>, py::object,
                    std::optional<Program>>());
}

}  // namespace mfd
