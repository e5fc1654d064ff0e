// How functions are marked that a host compiler and nvcc both compile.
#pragma once

#if defined(__CUDACC__)
#define MFD_HOST_DEVICE __host__ __device__
// Functions of the vector type: only device code has one there.
#define MFD_VECTOR_FN __device__
#else
#define MFD_HOST_DEVICE
#define MFD_VECTOR_FN
#endif

#define MFD_MEMBER MFD_VECTOR_FN __attribute__((always_inline)) inline
// `static`: each translation unit keeps its own copy, so that code compiled for one instruction set never
// runs on another.
#define MFD_INLINE static MFD_VECTOR_FN __attribute__((always_inline, unused)) inline
