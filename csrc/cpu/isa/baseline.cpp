#define MFD_ISA isa_baseline
#define MFD_ISA_NAME "baseline"
#define MFD_LANES 4

#include "cpu/isa/kernels.h"
