// Two faults that compute-sanitizer must find, in kernels that its filter takes for ours: the control of its
// silence.
//   planted memcheck    writes behind the end of an allocation
//   planted racecheck   reads shared memory that another warp writes, without a barrier
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace mfd {
namespace device {

__global__ void planted_write(float* out, int count) {
  out[count + threadIdx.x] = 1.0f;
}

__global__ void planted_race(float* out) {
  __shared__ float held[64];
  held[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = held[63 - threadIdx.x];
}

}  // namespace device
}  // namespace mfd

int main(int count, char** words) {
  float* out = nullptr;
  const int held = 64;
  if (count != 2 || cudaMalloc(&out, held * sizeof(float)) != cudaSuccess) return 3;
  if (std::strcmp(words[1], "memcheck") == 0)
    mfd::device::planted_write<<<1, 32>>>(out, held);
  else
    mfd::device::planted_race<<<1, held>>>(out);
  const cudaError_t error = cudaDeviceSynchronize();
  std::printf("planted %s: %s\n", words[1], cudaGetErrorString(error));
  return 0;
}
