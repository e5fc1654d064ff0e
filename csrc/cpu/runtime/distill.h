// Spreads rows over threads. Every result is bitwise the same for any number of threads.
#pragma once

#include "common/problems/rows.h"

namespace mfd {

// Number of counted rows, or -1 - row for the first counted row whose label is out of range.
int64_t count_rows(const RowProblem& problem);

// Number of those that have a label.
int64_t count_labelled(const RowProblem& problem);

// Sum of the weighted row losses, in the fixed order of the rows; 0 where it is not wanted.
double forward(Forward f, bool wants_sum, int threads);
void backward(const Backward& g, int threads);

// Whether every counted row lists distinct classes in range and, where the divergence needs it, its label.
bool lists_are_valid(const RowProblem& problem, const TopK& teacher, int threads);
// Values and gradients of rows with a sparse teacher; returns as `forward`.
double topk(TopKPass pass, bool wants_sum, int threads);

// out = a + b past the caches: how fast this machine streams two inputs and one output.
void stream_add(const float* a, const float* b, float* out, int64_t n, int threads);

}  // namespace mfd
