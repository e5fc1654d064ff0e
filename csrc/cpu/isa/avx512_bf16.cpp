// What avx512 gains where the processor multiplies bfloat16: one kernel, over the tiles that float32 has.
#define MFD_ISA isa_avx512_bf16
#define MFD_LANES 16

#include "cpu/fusion/product.h"

namespace mfd::MFD_ISA {

void product_of_pairs(const Product& p, int64_t begin, int64_t end, int64_t column) {
  product_of<BFloat16Pair>(p, begin, end, column);
}

}  // namespace mfd::MFD_ISA
