// Rows with a sparse teacher: one pass over the student's logits and, for the gradient, another over the row
// parked in shared memory; the listed classes and the rest, as one class, are a short row of their own. The
// loss with d loss/d student, the terms, or any of the gradients: nothing is saved between them.
//
// A class listed twice, an index out of range, and a label that the divergence needs and the list lacks make
// NaN of their row.
#pragma once

#include "cuda/topk/row.cuh"

namespace mfd {
namespace device {

template <class S, class Group>
__global__ void __launch_bounds__(Residency<Group>::kThreads, sizeof(typename S::T) == 4 ? 2 : 1)
    topk_rows(const __grid_constant__ TopKLaunch launch) {
  unsigned char* shared = dynamic_shared();
  const Group group(reinterpret_cast<typename Group::Shared*>(shared));
  const RowProblem& p = launch.forward.problem;
  const int mine = group.index_in_block();
  TopKState* state = reinterpret_cast<TopKState*>(shared + launch.states_at) + mine;
  unsigned char* place = shared + launch.parking_at + mine * launch.parking_bytes;
  const Factors factors = find_factors<typename S::T>(launch);
  const bool fast = size_of(p.student.dtype) == 2 && size_of(p.teacher.dtype) == 2;
  const int64_t groups = static_cast<int64_t>(gridDim.x) / group.parts() * group.in_block();
  const int64_t own = static_cast<int64_t>(blockIdx.x) / group.parts() * group.in_block() + mine;
  double loss = 0;
  for (int64_t row = own; row < p.n_rows; row += groups) {
    TopKRow<S, Group> of_row(launch, group, state, place, own, row, fast);
    if (is_counted(p, row)) {
      loss += of_row.run(factors, place);
    } else {
      of_row.skip();
    }
  }
  if (launch.partial) {
    if (group.rank() == 0 && group.part() == 0) launch.partial[own] = loss;
    finish_loss<typename S::T>(launch, groups);
  }
  group.leave();
}

}  // namespace device
}  // namespace mfd
