// Row losses of several teachers and, in the same launch, d loss/d student.
#pragma once

#include "cuda/distill/forward.cuh"
#include "cuda/distill/mixture.cuh"

namespace mfd {
namespace device {

// The problem's teacher is the mixture: float32 or float64, at temperature 1.
struct MixtureLaunch : ForwardLaunch {
  DeviceMixture teachers;
  bool parked;             // whether rows lie in shared memory
  int teachers_at;         // the groups' TeacherState in shared memory
  unsigned char* scratch;  // rows of log p, one per group, where shared memory holds none
  int64_t scratch_bytes;   // of one row
};

template <class S, class Group>
__global__ void __launch_bounds__(Residency<Group>::kThreads, 1)
    mixture_forward(const __grid_constant__ MixtureLaunch launch) {
  unsigned char* shared = dynamic_shared();
  const Group group(reinterpret_cast<typename Group::Shared*>(shared));
  const Forward& f = launch.forward;
  const RowProblem& p = f.problem;
  const int mine = group.index_in_block();
  RowState* state = reinterpret_cast<RowState*>(shared + launch.states_at) + mine;
  TeacherState* teachers =
      reinterpret_cast<TeacherState*>(shared + launch.teachers_at) + mine * launch.teachers.count;
  unsigned char* parking = shared + launch.parking_at + mine * launch.parking_bytes;
  const Factors factors = find_factors<typename S::T>(launch);
  const int64_t groups = static_cast<int64_t>(gridDim.x) / group.parts() * group.in_block();
  const int64_t own = static_cast<int64_t>(blockIdx.x) / group.parts() * group.in_block() + mine;
  const Span span = span_of<S>(group, p.classes);
  constexpr int64_t kVectorBytes = VectorOf<S>::kColumns * sizeof(typename S::T);
  unsigned char* mixed = launch.parked ? parking + launch.teacher_at - span.begin * kVectorBytes
                                       : launch.scratch + own * launch.scratch_bytes;
  double loss = 0;
  for (int64_t row = own; row < p.n_rows; row += groups) {
    typedef ForwardRow<S, Group, false, false, MixedTeacher<S>> Row;
    if (is_counted(p, row)) {
      const MixedTeacher<S> teacher =
          mix_teachers<S>(group, launch.teachers, p, row, readable_label(p, row), span, teachers, mixed);
      Row of_row(f, group, state, row, teacher);
      if (launch.parked) of_row.park_pair(parking, launch.teacher_at);
      loss += of_row.run(factors, parking, launch.teacher_at);
    } else {
      Row(f, group, state, row).skip();
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
