// The parts of DLPack (https://dmlc.github.io/dlpack, version 1.x) that are used here: a CPU buffer is handed
// to a tensor library, and a table of C functions reads and makes that library's tensors.
#pragma once

#include <cstdint>

namespace mfd {

struct DLDevice {
  int32_t device_type;  // 1: CPU
  int32_t device_id;
};

struct DLDataType {
  uint8_t code;  // 0: int, 1: unsigned, 2: IEEE floating point, 4: bfloat16, 6: bool
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // null: contiguous
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

struct DLManagedTensorVersioned;

// What `__dlpack_c_exchange_api__` of a tensor class points to. Every function returns 0, or sets a Python
// error.
struct DLPackExchangeAPI {
  uint32_t major, minor;
  const void* previous;
  int (*allocate)(DLTensor* prototype, DLManagedTensorVersioned** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*own)(void* object, DLManagedTensorVersioned** out);
  int (*to_object)(DLManagedTensorVersioned* tensor, void** object);  // takes the tensor over
  int (*view)(void* object, DLTensor* out);                           // borrowed; may be null
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace mfd
