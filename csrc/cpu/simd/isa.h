// Which instruction set a translation unit is compiled for: MFD_ISA, its namespace, and MFD_LANES, the floats
// of a vector. Kernels live in an unnamed namespace inside mfd::MFD_ISA: the linker must never merge code of
// two instruction sets.
#pragma once

#if !defined(MFD_ISA)
#define MFD_ISA isa_baseline
#define MFD_ISA_NAME "baseline"
#define MFD_LANES 4
#endif

#if defined(__AVX512F__)
#define MFD_AVX512 (MFD_LANES == 16)
#define MFD_AVX2 0
#elif defined(__AVX2__)
#define MFD_AVX512 0
#define MFD_AVX2 (MFD_LANES == 8)
#else
#define MFD_AVX512 0
#define MFD_AVX2 0
#endif

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#pragma clang fp contract(off)
#endif
