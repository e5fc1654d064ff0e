#include "bindings/plans/plans.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace mfd {
namespace {

// Outputs of at least this many bytes may come from the pool of gradient buffers, which Python asks.
constexpr int64_t kLarge = 1 << 20;

// PyTorch by its C table and by functions that cost some 30 ns a call. Never destroyed: Python may be gone by
// then.
struct Torch {
  DLPackExchangeAPI* exchange;
  py::object tensor, parameter;
  py::object is_neg, is_inference, requires_grad, untyped_storage, nbytes, storage_offset;
  py::object is_grad_enabled, is_inference_mode_enabled, get_num_threads;
  // Whether somebody else looks at every operation: dispatch modes, torch.func, torch.jit.trace, torch
  // functions.
  py::object dispatch_stack, transforms, tracing, function_mode, forward_ad;
  py::object allocate;
  py::str current_level{"_current_level"}, hook{"_hook"};

  Torch() {
    const py::module_ torch = py::module_::import("torch"), core = torch.attr("_C");
    tensor = torch.attr("Tensor");
    parameter = torch.attr("nn").attr("Parameter");
    const py::object table = tensor.attr("__dlpack_c_exchange_api__");
    exchange = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
    if (!exchange) throw py::error_already_set();
    if (exchange->major != 1 || !exchange->view)
      throw py::type_error("not the DLPack exchange table of version 1");
    is_neg = tensor.attr("is_neg");
    is_inference = tensor.attr("is_inference");
    requires_grad = py::str("requires_grad");
    untyped_storage = tensor.attr("untyped_storage");
    nbytes = torch.attr("UntypedStorage").attr("nbytes");
    storage_offset = tensor.attr("storage_offset");
    is_grad_enabled = core.attr("is_grad_enabled");
    is_inference_mode_enabled = core.attr("is_inference_mode_enabled");
    get_num_threads = core.attr("get_num_threads");
    dispatch_stack = core.attr("_len_torch_dispatch_stack");
    transforms = core.attr("_are_functorch_transforms_active");
    tracing = core.attr("_is_tracing");
    function_mode = core.attr("_is_torch_function_mode_enabled");
    forward_ad = py::module_::import("torch.autograd.forward_ad");
    allocate = py::module_::import("mfd_fast.backends.allocate");
  }

  // Constant initialisation and the GIL in place of a guard, which imports could turn into a deadlock.
  static const Torch& get() {
    static const Torch* torch = nullptr;
    if (!torch) torch = new Torch();
    return *torch;
  }

  // A call without arguments, or of a method of `self`.
  static py::object call(const py::object& function, py::handle self = {}) {
    PyObject* found =
        self ? PyObject_CallOneArg(function.ptr(), self.ptr()) : PyObject_CallNoArgs(function.ptr());
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
  }
  static int64_t integer(const py::object& function, py::handle self = {}) {
    const int64_t found = PyLong_AsLongLong(call(function, self).ptr());
    if (found == -1 && PyErr_Occurred()) throw py::error_already_set();
    return found;
  }
  static bool is_true(const py::object& function, py::handle self = {}) {
    return integer(function, self) != 0;
  }

  // Of no subclass but Parameter, which has no behaviour of its own.
  bool is_tensor(py::handle value) const {
    const py::handle type = py::type::handle_of(value);
    return type.is(tensor) || type.is(parameter);
  }

  bool is_watched() const {
    return is_true(dispatch_stack) || is_true(transforms) || is_true(tracing) || is_true(function_mode) ||
           forward_ad.attr(current_level).cast<int64_t>() >= 0;
  }

  // What poisons the outputs in tests sees those of plans too.
  py::object hooked(py::object fresh) const {
    const py::object with = allocate.attr(hook);
    return with.is_none() ? fresh : with(fresh);
  }
};

// From the first to the last element that is addressed, both included.
int64_t extent(const DLTensor& t) {
  int64_t last = 0;
  for (int k = 0; k < t.ndim; ++k) {
    if (t.shape[k] == 0) return 0;
    last += (t.shape[k] - 1) * t.strides[k];
  }
  return last + 1;
}

// Reads a call and writes down what it is: all that the checks look at but values.
class Reader {
 public:
  Reader(const std::vector<bool>& numbers, const py::set& options) : numbers_(numbers), options_(options) {}

  // False: it holds something that no plan covers.
  bool read(const py::tuple& arguments, const py::object& context) {
    const Torch& torch = Torch::get();
    if (torch.is_watched()) return false;
    grad_enabled_ = Torch::is_true(torch.is_grad_enabled);
    put(grad_enabled_);
    put(Torch::is_true(torch.is_inference_mode_enabled));
    PyObject* backend = nullptr;
    if (PyContextVar_Get(context.ptr(), Py_None, &backend) < 0) throw py::error_already_set();
    if (!argument(py::reinterpret_steal<py::object>(backend), false)) return false;
    const char* variable = std::getenv("MFD_FAST_BACKEND");
    put_text(variable ? variable : "", variable ? std::char_traits<char>::length(variable) : 0);
    for (size_t k = 0; k < arguments.size(); ++k)
      if (!argument(PyTuple_GET_ITEM(arguments.ptr(), k), numbers_[k])) return false;
    call_.threads = thread_count();
    return true;
  }

  const Call& call() const { return call_; }

  py::object key() const {
    py::object bytes = py::bytes(text_);
    if (found_.empty()) return bytes;
    py::tuple both(found_.size() + 1);
    both[0] = bytes;
    for (size_t k = 0; k < found_.size(); ++k) both[k + 1] = found_[k];
    return std::move(both);
  }

 private:
  template <class T>
  void put(T value) {
    text_.append(reinterpret_cast<const char*>(&value), sizeof(T));
  }
  void put_text(const char* text, size_t size) {
    put(size);
    text_.append(text, size);
  }

  bool argument(py::handle value, bool is_number) {
    PyTypeObject* const type = Py_TYPE(value.ptr());
    if (Torch::get().is_tensor(value)) return tensor(value);
    if (value.is_none()) return put('-'), true;
    if (type == &PyBool_Type) return put(value.ptr() == Py_True ? 'y' : 'n'), true;
    if (type == &PyFloat_Type || type == &PyLong_Type) return number(value, is_number);
    if (type == &PyUnicode_Type) {
      Py_ssize_t size;
      const char* text = PyUnicode_AsUTF8AndSize(value.ptr(), &size);
      if (!text) return PyErr_Clear(), false;
      put('s');
      put_text(text, static_cast<size_t>(size));
      return true;
    }
    if (type == &PyList_Type || type == &PyTuple_Type) {
      put(type == &PyList_Type ? '[' : '(');
      const Py_ssize_t size = PySequence_Fast_GET_SIZE(value.ptr());
      put(size);
      for (Py_ssize_t k = 0; k < size; ++k)
        if (!argument(PySequence_Fast_GET_ITEM(value.ptr(), k), is_number)) return false;
      return true;
    }
    const int known = PySet_Contains(options_.ptr(), reinterpret_cast<PyObject*>(type));
    if (known != 1) return PyErr_Clear(), false;
    put('o');
    found_.push_back(value);
    return true;
  }

  // A number that is read anew in each call counts by whether it is 0, any other by its value.
  bool number(py::handle value, bool is_read) {
    const double found = PyFloat_AsDouble(value.ptr());
    if (found == -1.0 && PyErr_Occurred()) return PyErr_Clear(), false;
    if (is_read) {
      put(found == 0 ? '0' : '1');
      call_.numbers.push_back(found);
    } else if (PyFloat_CheckExact(value.ptr())) {
      put('f');
      put(found);
    } else {
      const long long whole = PyLong_AsLongLong(value.ptr());
      if (whole == -1 && PyErr_Occurred()) return PyErr_Clear(), false;
      put('i');
      put(whole);
    }
    return true;
  }

  bool tensor(py::handle value) {
    DLTensor t;
    if (!read_tensor(value, t)) return false;
    bool needs = false;
    if (grad_enabled_) needs = value.attr(Torch::get().requires_grad).ptr() == Py_True;
    call_.needs_grad |= needs;
    put(needs ? 'T' : 't');
    describe(t, text_);
    call_.needs.push_back(needs);
    call_.objects.push_back(value.ptr());
    call_.tensors.push_back(t);
    return true;
  }

  const std::vector<bool>& numbers_;
  const py::set& options_;
  std::string text_;
  std::vector<py::handle> found_;
  Call call_;
  bool grad_enabled_ = false;
};

// The plans of one op.
class Plans {
 public:
  // `numbers`: which arguments' numbers are read anew; `context`: the variable of use_backend; `options`:
  // types of the arguments that are compared as values; `saved` stands in the place of a tensor.
  Plans(std::vector<bool> numbers, py::object context, py::set options, py::object saved)
      : numbers_(std::move(numbers)),
        context_(std::move(context)),
        options_(std::move(options)),
        saved_(std::move(saved)) {
    Torch::get();
  }

  // None, or (results, backend, the tensors, the arguments without them, the plan); without gradients None
  // for tensors and arguments.
  py::object run(const py::tuple& arguments) {
    check(arguments);
    Reader reader(numbers_, options_);
    if (!reader.read(arguments, context_)) return py::none();
    PyObject* const kept = PyDict_GetItemWithError(kept_.ptr(), reader.key().ptr());
    if (!kept) {
      if (PyErr_Occurred()) throw py::error_already_set();
      return py::none();
    }
    const py::object plan = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(kept, 0));
    if (plan.is_none()) return plan;
    const py::object backend = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(kept, 1));
    py::object results = plan.cast<const CallPlan&>().run(reader.call());
    if (results.is_none()) return results;
    ++hits_;
    if (!reader.call().needs_grad) return py::make_tuple(results, backend, py::none(), py::none(), plan);
    py::tuple tensors(reader.call().objects.size());
    for (size_t k = 0; k < tensors.size(); ++k) tensors[k] = py::handle(reader.call().objects[k]);
    return py::make_tuple(results, backend, tensors, without_tensors(arguments), plan);
  }

  // Keeps `plan`, or None: there cannot be one, for calls like this one, of which kMost are remembered.
  void learn(const py::tuple& arguments, const py::object& plan, const py::str& backend) {
    check(arguments);
    if (!plan.is_none() && !py::isinstance<CallPlan>(plan))
      throw py::type_error("a plan is made by the native module");
    Reader reader(numbers_, options_);
    if (!reader.read(arguments, context_)) return;
    if (PyDict_GET_SIZE(kept_.ptr()) >= kMost) kept_.clear();
    kept_[reader.key()] = py::make_tuple(plan, backend);
  }

  // What was learned of such calls: the plan or None; False: nothing yet.
  py::object known(const py::tuple& arguments) const {
    check(arguments);
    Reader reader(numbers_, options_);
    if (!reader.read(arguments, context_)) return py::none();
    PyObject* const kept = PyDict_GetItemWithError(kept_.ptr(), reader.key().ptr());
    if (!kept && PyErr_Occurred()) throw py::error_already_set();
    return kept ? py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(kept, 0)) : py::bool_(false);
  }

  void clear() { kept_.clear(); }
  // Plans that are kept.
  size_t size() const {
    size_t found = 0;
    for (const auto& [key, kept] : kept_) found += !py::reinterpret_borrow<py::tuple>(kept)[0].is_none();
    return found;
  }
  int64_t hits() const { return hits_; }

 private:
  static constexpr Py_ssize_t kMost = 256;

  void check(const py::tuple& arguments) const {
    if (arguments.size() != numbers_.size()) throw py::value_error("a plan needs all arguments of its op");
  }

  py::object without_tensors(py::handle value) const {
    if (Torch::get().is_tensor(value)) return saved_;
    if (!PyTuple_CheckExact(value.ptr()) && !PyList_CheckExact(value.ptr()))
      return py::reinterpret_borrow<py::object>(value);
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(value.ptr());
    py::tuple copy(size);
    for (Py_ssize_t k = 0; k < size; ++k)
      copy[static_cast<size_t>(k)] = without_tensors(PySequence_Fast_GET_ITEM(value.ptr(), k));
    if (PyTuple_CheckExact(value.ptr())) return std::move(copy);
    return py::list(copy);
  }

  std::vector<bool> numbers_;
  py::object context_;
  py::set options_;
  py::object saved_;
  py::dict kept_;  // key -> (plan, backend), so that threads see both or neither
  int64_t hits_ = 0;
};

void set_error(void*, const char*, const char* message) {
  PyErr_SetString(PyExc_RuntimeError, message);
}

}  // namespace

bool read_tensor(py::handle object, DLTensor& t) {
  const Torch& torch = Torch::get();
  if (!torch.is_tensor(object)) return false;
  if (torch.exchange->view(object.ptr(), &t)) return PyErr_Clear(), false;
  if (Torch::is_true(torch.is_neg, object)) return false;
  if (Torch::is_true(torch.is_inference, object) && !Torch::is_true(torch.is_inference_mode_enabled))
    return false;
  const int64_t held = Torch::integer(torch.nbytes, Torch::call(torch.untyped_storage, object));
  const int64_t elements = extent(t);
  return elements == 0 ||
         (Torch::integer(torch.storage_offset, object) + elements) * (t.dtype.bits / 8) <= held;
}

int64_t bytes_of(const DLTensor& t) {
  int64_t bytes = t.dtype.bits / 8;
  for (int k = 0; k < t.ndim; ++k) bytes *= t.shape[k];
  return bytes;
}

void describe(const DLTensor& t, std::string& text) {
  const auto put = [&text](const auto* value, size_t count) {
    text.append(reinterpret_cast<const char*>(value), count * sizeof(*value));
  };
  const size_t dims = static_cast<size_t>(t.ndim);
  put(&t.dtype, 1);
  put(&t.device, 1);
  put(&t.ndim, 1);
  put(t.shape, dims);
  put(t.strides, dims);
}

bool is_contiguous(const DLTensor& t) {
  int64_t stride = 1;
  for (int k = t.ndim - 1; k >= 0; --k) {
    if (t.shape[k] != 1 && t.strides[k] != stride) return bytes_of(t) == 0;
    stride *= t.shape[k];
  }
  return true;
}

bool dtype_of(const DLTensor& t, Dtype& dtype) {
  if (t.dtype.code == kBFloat16) return dtype = Dtype::kBFloat16, true;
  if (t.dtype.code != kFloating) return false;
  dtype = t.dtype.bits == 64 ? Dtype::kFloat64 : t.dtype.bits == 32 ? Dtype::kFloat32 : Dtype::kFloat16;
  return t.dtype.bits >= 16;
}

DLDataType dl_dtype(Dtype dtype) {
  const bool narrow = dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16;
  const uint8_t bits = narrow ? 16 : dtype == Dtype::kFloat64 ? 64 : 32;
  return {dtype == Dtype::kBFloat16 ? kBFloat16 : kFloating, bits, 1};
}

bool is_watched() {
  return Torch::get().is_watched();
}
bool is_grad_enabled() {
  return Torch::is_true(Torch::get().is_grad_enabled);
}
int thread_count() {
  return static_cast<int>(Torch::integer(Torch::get().get_num_threads));
}

void* current_stream(DLDevice device) {
  void* stream = nullptr;
  if (device.device_type != kCPU &&
      Torch::get().exchange->current_stream(device.device_type, device.device_id, &stream))
    throw py::error_already_set();
  return stream;
}

py::object CallPlan::backward(const py::tuple&, const py::tuple&, const py::object&, const py::object&,
                              const py::tuple&) const {
  return py::none();
}

bool CallPlan::scale(const py::tuple&, size_t, const py::object& factor) const {
  return is_plain_one(factor);
}

py::object new_tensor(DLDataType dtype, DLDevice device, const std::vector<int64_t>& shape) {
  const Torch& torch = Torch::get();
  DLTensor prototype = {
      nullptr, device, static_cast<int32_t>(shape.size()), dtype, const_cast<int64_t*>(shape.data()),
      nullptr, 0};
  DLManagedTensorVersioned* managed = nullptr;
  void* object = nullptr;
  if (torch.exchange->allocate(&prototype, &managed, nullptr, &set_error) ||
      torch.exchange->to_object(managed, &object))
    throw py::error_already_set();
  return torch.hooked(py::reinterpret_steal<py::object>(static_cast<PyObject*>(object)));
}

py::object new_like(py::handle object, const DLTensor& tensor) {
  if (tensor.device.device_type == kCPU && bytes_of(tensor) >= kLarge)
    return Torch::get().allocate.attr("empty_gradient")(object);
  return new_tensor(tensor.dtype, tensor.device, {tensor.shape, tensor.shape + tensor.ndim});
}

// Whether a backward may hand out what it has computed for an upstream gradient of 1: it is a number in
// memory, and the backward is not recorded itself.
bool is_plain_one(const py::object& factor) {
  const Torch& torch = Torch::get();
  if (is_grad_enabled() || torch.is_watched()) return false;
  DLTensor t;
  if (!read_tensor(factor, t) || t.ndim != 0 || t.device.device_type != kCPU || t.dtype.code != kFloating)
    return false;
  if (t.dtype.bits == 32) return *static_cast<const float*>(t.data) == 1;
  return t.dtype.bits == 64 && *static_cast<const double*>(t.data) == 1;
}

void bind_plans(py::module_& m) {
  m.def("is_plain_one", &is_plain_one);
  py::class_<CallPlan>(m, "Plan").def("backward", &CallPlan::backward).def("scale", &CallPlan::scale);
  py::class_<Plans>(m, "Plans")
      .def(py::init<std::vector<bool>, py::object, py::set, py::object>())
      .def("run", &Plans::run)
      .def("learn", &Plans::learn)
      .def("known", &Plans::known)
      .def("clear", &Plans::clear)
      .def_property_readonly("size", &Plans::size)
      .def_property_readonly("hits", &Plans::hits);
}

}  // namespace mfd
