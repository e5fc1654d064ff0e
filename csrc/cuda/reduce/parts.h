// The parts of a loss, from the values per row that its launch has written.
#pragma once

#include "cuda/distill/distill.h"
#include "cuda/reduce/kinds.cuh"

namespace mfd {
namespace cuda {

constexpr int64_t kPartsBlocks = 128;

// As ScalarWorkspace.
struct PartsWorkspace {
  double partial[kPartSums * kPartsBlocks];
  unsigned ticket;
};

struct Parts {
  const void* rows[kParts];  // null for zeros
  Scalar divisor, hard_divisor;
  bool count_rows;  // the divisors are the numbers of counted rows and, where ignored ones count, of labels
  PartsWorkspace* workspace;
  void* out;  // [kParts], compute dtype
};

void reduce_parts(const RowProblem& problem, const RowScalar& weight, const Parts& parts, const Where& where);

}  // namespace cuda
}  // namespace mfd
