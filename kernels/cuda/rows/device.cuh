// The hardware behind the kernels, one function each, with a portable twin for the emulator of
// tests/cuda_emulator.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/annotations.h"

namespace mfd {
namespace device {

#define MFD_DEVICE __device__ __forceinline__

template <class To, class From>
MFD_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

#if defined(MFD_CUDA_EMULATOR)

constexpr bool kHasClusters = true;

MFD_DEVICE unsigned char* dynamic_shared() {
  return mfd_emulator::shared_memory();
}

MFD_DEVICE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_as<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u) return bits_as<float>(sign | ((magnitude << 13) + 0x38000000u));
  return bits_as<float>(sign | bits_as<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));
}

// Round to nearest even.
MFD_DEVICE uint16_t float_to_half(float f) {
  const uint32_t bits = bits_as<uint32_t>(f), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7fffu;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: multiples of 2^-24
    half = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

MFD_DEVICE uint16_t float_to_bfloat(float f) {
  const uint32_t bits = bits_as<uint32_t>(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// 2^x to about 2 ulp.
MFD_DEVICE float exp2_fast(float x) {
  return exp2f(x);
}

// Copies 16 bytes from global to shared memory behind the back of the registers; both ends are aligned.
MFD_DEVICE void copy_16_bytes(void* shared, const void* global) {
  memcpy(shared, global, 16);
}
MFD_DEVICE void await_copies() {}

// What other blocks have written before their __threadfence(): not from the processor's own cache.
MFD_DEVICE double load_shared_by_all(const double* from) {
  return *static_cast<const volatile double*>(from);
}

MFD_DEVICE void cluster_barrier() {
  mfd_emulator::cluster_barrier({__FILE__, __LINE__});
}
MFD_DEVICE unsigned cluster_rank() {
  return mfd_emulator::cluster_rank();
}
MFD_DEVICE unsigned cluster_size() {
  return mfd_emulator::cluster_size();
}
MFD_DEVICE double load_from_peer(double* shared, unsigned rank) {
  return *static_cast<double*>(mfd_emulator::peer_shared(shared, rank));
}

#else

MFD_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char shared[];
  return shared;
}

MFD_DEVICE float half_to_float(uint16_t h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

MFD_DEVICE uint16_t float_to_half(float f) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}

MFD_DEVICE uint16_t float_to_bfloat(float f) {
  uint16_t h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}

MFD_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

MFD_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

MFD_DEVICE void copy_16_bytes(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global)
               : "memory");
}
MFD_DEVICE void await_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

MFD_DEVICE double load_shared_by_all(const double* from) {
  return __ldcg(from);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

constexpr bool kHasClusters = true;

MFD_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
MFD_DEVICE unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
MFD_DEVICE unsigned cluster_size() {
  unsigned size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
MFD_DEVICE double load_from_peer(double* shared, unsigned rank) {
  uint32_t address;
  double value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(shared)), "r"(rank));
  asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(value) : "r"(address) : "memory");
  return value;
}

#else  // No clusters: the launcher never starts the kernels that would need them.

constexpr bool kHasClusters = false;

MFD_DEVICE void cluster_barrier() {}
MFD_DEVICE unsigned cluster_rank() {
  return 0;
}
MFD_DEVICE unsigned cluster_size() {
  return 1;
}
MFD_DEVICE double load_from_peer(double* shared, unsigned) {
  return *shared;
}

#endif
#endif

MFD_DEVICE float bfloat_to_float(uint16_t h) {
  return bits_as<float>(static_cast<uint32_t>(h) << 16);
}

}  // namespace device
}  // namespace mfd
