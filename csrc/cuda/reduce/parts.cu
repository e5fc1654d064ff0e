#include "cuda/reduce/parts.cuh"
#include "cuda/reduce/parts.h"
#include "cuda/runtime/launch.h"

namespace mfd {
namespace cuda {

void reduce_parts(const RowProblem& problem, const RowScalar& weight, const Parts& parts,
                  const Where& where) {
  const DeviceGuard guard(where.device);
  constexpr int kThreads = 256;
  const int64_t needed = (problem.n_rows + kThreads - 1) / kThreads;
  device::PartsLaunch launch{};
  launch.problem = problem;
  for (int k = 0; k < kParts; ++k) launch.rows[k] = parts.rows[k];
  launch.weight = weight;
  launch.divisor = parts.divisor;
  launch.hard_divisor = parts.hard_divisor;
  launch.count_rows = parts.count_rows;
  launch.partial = parts.workspace->partial;
  launch.ticket = &parts.workspace->ticket;
  launch.parts = parts.out;
  const Shape shape = {needed < kPartsBlocks ? needed : kPartsBlocks, kThreads, 34 * sizeof(double)};
  start(where, shape, problem.is_double ? device::reduce_parts<double> : device::reduce_parts<float>, launch);
}

}  // namespace cuda
}  // namespace mfd
