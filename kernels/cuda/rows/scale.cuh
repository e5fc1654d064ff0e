// Multiplication of a saved gradient by the gradient of the loss.
#pragma once

#include "cuda/rows/rows.cuh"

namespace mfd {
namespace device {

// grad *= factor by the threads of a grid.
MFD_INLINE void scale_by(void* grad, Dtype dtype, int64_t n, double wide, Dtype factor_dtype) {
  unsigned char* bytes = static_cast<unsigned char*>(grad);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  if (dtype == Dtype::kFloat64 || factor_dtype == Dtype::kFloat64) {
    const int size = size_of(dtype);
    for (int64_t k = thread; k < n; k += threads)
      store_one(bytes + k * size, dtype, load_one<double>(bytes + k * size, dtype) * wide);
    return;
  }
  const float single = static_cast<float>(wide);
  const int size = size_of(dtype);
  const bool aligned = is_aligned(grad);
  for (int64_t k = thread * 8; k < n; k += threads * 8) {
    float x[8];
    if (aligned && k + 8 <= n) {
      load_wide(bytes + k * size, dtype, x);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = x[i] * single;
      store_wide(bytes + k * size, dtype, x);
    } else {
      for (int64_t i = k; i < k + 8 && i < n; ++i)
        store_one(bytes + i * size, dtype, load_one<float>(bytes + i * size, dtype) * single);
    }
  }
}

// grad *= factor; returns at once where the factor is 1.
template <int kUnused = 0>
__global__ void __launch_bounds__(256)
    scale_in_place(void* grad, Dtype dtype, int64_t n, const void* factor, Dtype factor_dtype) {
  const double wide = load_one<double>(static_cast<const unsigned char*>(factor), factor_dtype);
  if (wide != 1.0) scale_by(grad, dtype, n, wide, factor_dtype);
}

constexpr int kMaxScaled = 64;

struct Gradients {
  void* grad[kMaxScaled];
  Dtype dtype[kMaxScaled];
  int64_t n[kMaxScaled];
  int count;
};

// The same for several gradients.
template <int kUnused = 0>
__global__ void __launch_bounds__(256)
    scale_all(const __grid_constant__ Gradients all, const void* factor, Dtype factor_dtype) {
  const double wide = load_one<double>(static_cast<const unsigned char*>(factor), factor_dtype);
  if (wide == 1.0) return;
  for (int k = 0; k < all.count; ++k) scale_by(all.grad[k], all.dtype[k], all.n[k], wide, factor_dtype);
}

}  // namespace device
}  // namespace mfd
