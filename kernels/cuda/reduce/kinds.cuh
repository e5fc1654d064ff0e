// What a loss has beside its value.
#pragma once

namespace mfd {

constexpr int kParts = 4;              // soft, hard, student's and teacher's entropy
constexpr int kPartSums = kParts + 2;  // and the rows counted and labelled

}  // namespace mfd
