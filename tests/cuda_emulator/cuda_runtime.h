// The part of the CUDA runtime and language that kernels/cuda and csrc/cuda use, for a host compiler: found
// in place of the toolkit's header by -I. Blocks run one after the other, the blocks of a cluster together;
// device memory is host memory, and every launch has finished when it returns.
//
// Found and reported as std::runtime_error by the launch: a barrier that part of a block never reaches or
// reaches at another place, a shuffle whose mask its lanes do not agree on, an impossible launch. Shared
// memory is a heap block of exactly the size asked for, filled with 0xff, so that sanitizers see every access
// beyond it and reads before a write give NaN. There is no `__shared__` variable here: kernels use dynamic
// shared memory.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#define MFD_CUDA_EMULATOR 1

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned ax = 1, unsigned ay = 1, unsigned az = 1) : x(ax), y(ay), z(az) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

#include "emulator.h"

// threadIdx.x and the like, as objects: gridDim and blockDim are also members of cudaLaunchConfig_t. Kernels
// use one dimension.
template <dim3 mfd_emulator::Thread::* kMember>
struct MfdIndex {
  struct {
    operator unsigned() const { return (mfd_emulator::self().*kMember).x; }
  } x;
};
constexpr MfdIndex<&mfd_emulator::Thread::index> threadIdx{};
constexpr MfdIndex<&mfd_emulator::Thread::block_index> blockIdx{};
constexpr MfdIndex<&mfd_emulator::Thread::block_size> blockDim{};
constexpr MfdIndex<&mfd_emulator::Thread::grid_size> gridDim{};

// ------------------------------------------------------------------------------------------------ device

#define MFD_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(MFD_HERE) {
  mfd_emulator::block_barrier({file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, MFD_HERE) {
  const int nothing = 0;
  mfd_emulator::exchange(mask, &nothing, sizeof nothing, {file, line});
}

template <class T>
inline T mfd_emulated_shuffle(unsigned mask, T value, unsigned source, const mfd_emulator::Place& place) {
  static_assert(sizeof(T) <= mfd_emulator::kMaxValue, "a shuffle moves at most 8 bytes");
  const mfd_emulator::Values& all = mfd_emulator::exchange(mask, &value, sizeof value, place);
  // A lane outside the mask or past the warp leaves its own value undefined; here it keeps it.
  if (source < 32 && (mask >> source & 1u)) std::memcpy(&value, all.of_lane[source], sizeof value);
  return value;
}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int = 32, MFD_HERE) {
  return mfd_emulated_shuffle(mask, value, static_cast<unsigned>(source) & 31u, {file, line});
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int = 32, MFD_HERE) {
  return mfd_emulated_shuffle(mask, value, mfd_emulator::lane() ^ static_cast<unsigned>(lanes), {file, line});
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int = 32, MFD_HERE) {
  return mfd_emulated_shuffle(mask, value, mfd_emulator::lane() + lanes, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, MFD_HERE) {
  const unsigned char bit = predicate != 0;
  const mfd_emulator::Values& all = mfd_emulator::exchange(mask, &bit, sizeof bit, {file, line});
  unsigned votes = 0;
  for (unsigned k = 0; k < 32; ++k)
    if ((mask >> k & 1u) && all.of_lane[k][0]) votes |= 1u << k;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, MFD_HERE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, MFD_HERE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

template <class T>
inline T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}
template <class T>
inline T atomicOr(T* address, T value) {
  return __atomic_fetch_or(address, value, __ATOMIC_ACQ_REL);
}
inline void __threadfence() {}  // the emulated atomics order memory
template <class T>
inline T __ldg(const T* address) {
  return *address;
}

// ------------------------------------------------------------------------------------------------ runtime

enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101 };
typedef struct mfd_emulated_stream* cudaStream_t;

enum cudaDeviceAttr : int {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute : int { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID : int { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    dim3 clusterDim;
  } val;
  cudaLaunchAttribute() : id(cudaLaunchAttributeClusterDimension), val{dim3()} {}
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess              ? "no error"
         : error == cudaErrorInvalidDevice ? "invalid device"
                                           : "invalid argument";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = mfd_emulator::current_device();
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= mfd_emulator::kDevices) return cudaErrorInvalidDevice;
  mfd_emulator::current_device() = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= mfd_emulator::kDevices) return cudaErrorInvalidDevice;
  const mfd_emulator::Device& d = mfd_emulator::device();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = d.processors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = d.capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = d.capability % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = d.shared_bytes + 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = d.shared_bytes;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

template <class... Parameters>
inline cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes > mfd_emulator::device().shared_bytes) return cudaErrorInvalidValue;
  mfd_emulator::allow_shared(reinterpret_cast<void*>(kernel), static_cast<size_t>(bytes));
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                                      Arguments&&... arguments) {
  unsigned cluster = 1;
  for (unsigned k = 0; k < config->numAttrs; ++k)
    if (config->attrs[k].id == cudaLaunchAttributeClusterDimension)
      cluster = config->attrs[k].val.clusterDim.x;
  if (config->dynamicSmemBytes > mfd_emulator::allowed_shared(reinterpret_cast<void*>(kernel)))
    return cudaErrorInvalidValue;
  mfd_emulator::note_start(config->stream);
  const mfd_emulator::Grid grid{config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes};
  if (mfd_emulator::interceptor()) {
    const std::vector<unsigned char> parameters = mfd_emulator::packed<Parameters...>(arguments...);
    mfd_emulator::interceptor()(reinterpret_cast<void*>(kernel), grid, parameters);
    return cudaSuccess;
  }
  return mfd_emulator::launch(grid, [&] { kernel(arguments...); }) ? cudaSuccess : cudaErrorInvalidValue;
}

template <class... Parameters>
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(Parameters...),
                                                                 int threads, size_t shared) {
  *blocks = mfd_emulator::resident_blocks(reinterpret_cast<void*>(kernel), threads, shared);
  return cudaSuccess;
}

// As if every cluster found its blocks anywhere on the device.
template <class... Parameters>
inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(Parameters...),
                                                  const cudaLaunchConfig_t* config) {
  const int blocks = mfd_emulator::resident_blocks(
      reinterpret_cast<void*>(kernel), static_cast<int>(config->blockDim.x), config->dynamicSmemBytes);
  const unsigned cluster = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  *clusters = blocks * mfd_emulator::device().processors / static_cast<int>(cluster);
  return cudaSuccess;
}
