// The instruction sets compiled into this module and the one in use.
#pragma once

#include <string>
#include <vector>

#include "common/types.h"

namespace mfd {

// The fastest set this machine runs, or the one named (empty: not named). Throws std::invalid_argument, in
// one sentence, for a name that is unknown or that this machine cannot run.
void select_isa(const std::string& name);
const char* current_isa();
std::vector<std::string> supported_isas();

const Kernels& kernels();

}  // namespace mfd
