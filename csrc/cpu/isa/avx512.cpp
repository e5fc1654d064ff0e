#define MFD_ISA isa_avx512
#define MFD_ISA_NAME "avx512"
#define MFD_LANES 16

#include "cpu/isa/kernels.h"
