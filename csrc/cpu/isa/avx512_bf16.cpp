// What avx512 gains where the processor multiplies bfloat16: one kernel, over the tiles that float32 has.
#define MFD_ISA isa_avx512_bf16
#define MFD_LANES 16

#include <immintrin.h>

#include "common/fusion.h"

namespace mfd {
namespace MFD_ISA {
namespace {

// clang-format off: the order is that of use.
#include "cpu/vec.inl.h"
#include "cpu/row_ends.inl.h"
#include "cpu/product.inl.h"
// clang-format on

}  // namespace

void product_of_pairs(const Product& p, int64_t begin, int64_t end, int64_t column) {
  product_of<BFloat16Pair>(p, begin, end, column);
}

}  // namespace MFD_ISA
}  // namespace mfd
