// Planted faults and sound kernels: `self_test NAME` runs one kernel and prints what came of it.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "cuda_runtime.h"

namespace {

constexpr int kThreads = 64;

// Each block adds up its inputs through shared memory; `barrier` says whether the threads wait for each
// other.
__global__ void block_sum(const float* in, float* out, bool barrier, int excess) {
  float* shared = reinterpret_cast<float*>(mfd_emulator::shared_memory());
  const int t = static_cast<int>(threadIdx.x);
  shared[t + excess] = in[blockIdx.x * blockDim.x + threadIdx.x];
  if (barrier) __syncthreads();
  if (t == 0) {
    float sum = 0;
    for (int k = 0; k < kThreads; ++k) sum += shared[k];
    out[blockIdx.x] = sum;
  }
}

__global__ void warp_sum(const float* in, float* out) {
  float v = in[threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  const unsigned odd = __ballot_sync(0xffffffffu, threadIdx.x & 1);
  out[threadIdx.x] = odd == 0xaaaaaaaau ? v : -1.0f;
}

// Half of a warp exchanges values under its own mask.
__global__ void half_warps(const float* in, float* out) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  float v = in[threadIdx.x];
  for (int lanes = 8; lanes > 0; lanes /= 2) v += __shfl_xor_sync(mask, v, lanes);
  __syncwarp();
  out[threadIdx.x] = v;
}

// Each block reads what its right neighbour in the cluster has written.
__global__ void cluster_ring(float* out) {
  float* shared = reinterpret_cast<float*>(mfd_emulator::shared_memory());
  shared[threadIdx.x] = static_cast<float>(blockIdx.x);
  mfd_emulator::cluster_barrier({__FILE__, __LINE__});
  const unsigned right = (mfd_emulator::cluster_rank() + 1) % mfd_emulator::cluster_size();
  const float value = *static_cast<float*>(mfd_emulator::peer_shared(shared + threadIdx.x, right));
  mfd_emulator::cluster_barrier({__FILE__, __LINE__});
  out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

__global__ void some_threads_wait() {
  if (threadIdx.x < 8) __syncthreads();
}

__global__ void two_barriers() {
  if (threadIdx.x < 8) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void barrier_against_shuffle(float* out) {
  float v = 1;
  if (threadIdx.x < 8) {
    __syncthreads();
  } else {
    v = __shfl_xor_sync(0xffffffffu, v, 1);
  }
  out[threadIdx.x] = v;
}

__global__ void unequal_masks(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(threadIdx.x < 16 ? 0xffffffffu : 0x00ffffffu, 1.0f, 1);
}

template <class Kernel, class... Arguments>
void launch(unsigned blocks, unsigned threads, unsigned cluster, size_t shared, Kernel kernel,
            Arguments... arguments) {
  cudaLaunchConfig_t config;
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  cudaLaunchAttribute attribute;
  attribute.val.clusterDim = dim3(cluster);
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

void expect(bool truth) {
  if (!truth) {
    std::puts("wrong result");
    std::exit(1);
  }
}

void run(const std::string& name) {
  std::vector<float> in(2 * kThreads), out(2 * kThreads);
  for (size_t k = 0; k < in.size(); ++k) in[k] = static_cast<float>(k);
  const size_t bytes = kThreads * sizeof(float);
  if (name == "sound") {
    launch(2, kThreads, 1, bytes, block_sum, in.data(), out.data(), true, 0);
    expect(out[0] == 2016 && out[1] == 6112);
    launch(1, 32, 1, 0, warp_sum, in.data(), out.data());
    expect(out[0] == 496 && out[31] == 496);
    launch(1, 64, 1, 0, half_warps, in.data(), out.data());
    expect(out[0] == 120 && out[16] == 376 && out[63] == 888);
    launch(4, 16, 4, bytes, cluster_ring, out.data());
    expect(out[0] == 1 && out[16] == 2 && out[48] == 0);
  } else if (name == "missing_barrier") {
    launch(2, kThreads, 1, bytes, block_sum, in.data(), out.data(), false, 0);
  } else if (name == "shared_overrun") {
    launch(1, kThreads, 1, bytes, block_sum, in.data(), out.data(), true, 1);
  } else if (name == "global_overrun") {
    launch(3, kThreads, 1, bytes, block_sum, in.data(), out.data(), true, 0);
  } else if (name == "some_threads_wait") {
    launch(1, kThreads, 1, 0, some_threads_wait);
  } else if (name == "two_barriers") {
    launch(1, kThreads, 1, 0, two_barriers);
  } else if (name == "barrier_against_shuffle") {
    launch(1, 32, 1, 0, barrier_against_shuffle, out.data());
  } else if (name == "unequal_masks") {
    launch(1, 32, 1, 0, unequal_masks, out.data());
  } else if (name == "too_much_shared") {
    launch(1, 32, 1, 64 << 10, warp_sum, in.data(), out.data());
  } else if (name == "cluster_on_sm_80") {
    mfd_emulator::device().capability = 80;
    launch(4, 16, 4, bytes, cluster_ring, out.data());
  } else {
    std::puts("no such kernel");
    std::exit(2);
  }
}

}  // namespace

int main(int, char** arguments) {
  try {
    run(arguments[1]);
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
    return 1;
  }
  std::puts("done");
}
