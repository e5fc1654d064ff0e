// The instruction sets compiled into this module and the one in use.
#pragma once

#include <string>
#include <vector>

#include "cpu/runtime/kernels.h"

namespace mfd {

// The fastest set this machine runs, or the one named (empty: not named). Throws std::invalid_argument, in
// one sentence, for a name that is unknown or that this machine cannot run.
void select_isa(const std::string& name);
const char* current_isa();
std::vector<std::string> supported_isas();

const Kernels& kernels();

// The product of matrices whose elements are pairs of bfloat16 numbers along the depth; null where avx512 is
// not in use or the processor has no instruction for it.
ProductKernel product_of_pairs();

}  // namespace mfd
