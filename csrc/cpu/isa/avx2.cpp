#define MFD_ISA isa_avx2
#define MFD_ISA_NAME "avx2"
#define MFD_LANES 8

#include "cpu/isa/kernels.h"
