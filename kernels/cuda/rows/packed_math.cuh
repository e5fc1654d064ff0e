// Pairs of 16-bit numbers, fast functions of float32 and float32 reductions of a group, each with a portable
// twin for the emulator of tests/cuda_emulator.
#pragma once

#include "cuda/rows/group.cuh"

namespace mfd {
namespace device {

#if defined(MFD_CUDA_EMULATOR)

MFD_DEVICE float log2_fast(float x) {
  return log2f(x);
}
MFD_DEVICE float divide_fast(float a, float b) {
  return a / b;
}
MFD_DEVICE float reciprocal_fast(float x) {
  return 1.0f / x;
}

MFD_DEVICE uint32_t pack_bfloats(float low, float high) {
  return float_to_bfloat(low) | static_cast<uint32_t>(float_to_bfloat(high)) << 16;
}
MFD_DEVICE uint32_t pack_halves(float low, float high) {
  return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
}

// The larger in each half; a NaN counts as nothing.
MFD_DEVICE uint32_t larger_bfloats(uint32_t a, uint32_t b) {
  return pack_bfloats(fmaxf(bits_as<float>(a << 16), bits_as<float>(b << 16)),
                      fmaxf(bits_as<float>(a & 0xffff0000u), bits_as<float>(b & 0xffff0000u)));
}
MFD_DEVICE uint32_t larger_halves(uint32_t a, uint32_t b) {
  const auto low = [](uint32_t x) { return half_to_float(static_cast<uint16_t>(x & 0xffffu)); };
  return pack_halves(fmaxf(low(a), low(b)), fmaxf(low(a >> 16), low(b >> 16)));
}

MFD_DEVICE uint4 load_16_bytes_once(const void* from) {
  return *static_cast<const uint4*>(from);
}
MFD_DEVICE void store_16_bytes_once(void* to, const uint4& value) {
  *static_cast<uint4*>(to) = value;
}

MFD_DEVICE float largest_in_warp(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

MFD_DEVICE float load_float_from_peer(float* shared, unsigned rank) {
  return *static_cast<float*>(mfd_emulator::peer_shared(shared, rank));
}

#else

// 2 ulp, but within 2^-22 near 1.
MFD_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 2 ulp.
MFD_DEVICE float divide_fast(float a, float b) {
  return __fdividef(a, b);
}
// 1 ulp, of a normal number.
MFD_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

MFD_DEVICE uint32_t pack_bfloats(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
MFD_DEVICE uint32_t pack_halves(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The larger in each half; a NaN counts as nothing.
MFD_DEVICE uint32_t larger_bfloats(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}
MFD_DEVICE uint32_t larger_halves(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

// Of data that nobody reads again soon: the first to leave the caches.
MFD_DEVICE uint4 load_16_bytes_once(const void* from) {
  return __ldcs(static_cast<const uint4*>(from));
}
MFD_DEVICE void store_16_bytes_once(void* to, const uint4& value) {
  __stcs(static_cast<uint4*>(to), value);
}

// The largest of the warp's values; NaN anywhere may show or not. Bits of floats order as integers do, those
// of negative ones the other way round.
MFD_DEVICE float largest_in_warp(float x) {
  int bits = __float_as_int(x);
  bits = __reduce_max_sync(kAllLanes, bits ^ (bits >> 31 & 0x7fffffff));
  return __int_as_float(bits ^ (bits >> 31 & 0x7fffffff));
}

MFD_DEVICE float load_float_from_peer(float* shared, unsigned rank) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  uint32_t address;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(shared)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
#else
  return *shared;
#endif
}

#endif

struct FloatSum {
  static constexpr bool kIsMax = false;
  static constexpr float kIdentity = 0.0f;
};
struct FloatMax {
  static constexpr bool kIsMax = true;
  static constexpr float kIdentity = -3.402823466e38f;
};

template <class Op>
MFD_DEVICE float float_over_warp(float value) {
  if constexpr (Op::kIsMax) {
    return largest_in_warp(value);
  } else {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) value = value + __shfl_xor_sync(kAllLanes, value, lanes);
    return value;
  }
}

// As Group::reduce, in float32.
template <class Op, int K>
MFD_DEVICE void reduce_floats(const Warp&, float (&values)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = float_over_warp<Op>(values[k]);
}

// Each lane reads one of the cluster's blocks, so that their latencies overlap.
template <class Op, int K>
MFD_DEVICE void reduce_floats(const Blocks& group, float (&values)[K]) {
  static_assert(K <= kMaxReduced, "scratch is sized for kMaxReduced");
  float (*of_warp)[32] = reinterpret_cast<float (*)[32]>(group.shared->of_warp);
  float* const total = reinterpret_cast<float*>(group.shared->total[group.turn]);
  group.turn ^= 1;
  const int warps = group.threads() / 32, parts = static_cast<int>(group.parts());
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const float value = float_over_warp<Op>(values[k]);
    if (lane_of() == 0) of_warp[k][warp_of()] = value;
  }
  __syncthreads();
  for (int k = warp_of(); k < K; k += warps) {
    const float value = float_over_warp<Op>(lane_of() < warps ? of_warp[k][lane_of()] : Op::kIdentity);
    if (lane_of() == 0) total[k] = value;
  }
  if (parts == 1) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) values[k] = total[k];
    return;
  }
  cluster_barrier();
  float of_block[K];
#pragma unroll
  for (int k = 0; k < K; ++k)
    of_block[k] =
        lane_of() < parts ? load_float_from_peer(total + k, static_cast<unsigned>(lane_of())) : Op::kIdentity;
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = float_over_warp<Op>(of_block[k]);
}

// What was reduced so far may be overwritten.
template <class Group>
MFD_DEVICE void sync_parts(const Group& group) {
  if (group.parts() > 1) cluster_barrier();
}

}  // namespace device
}  // namespace mfd
