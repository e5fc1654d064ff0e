// Gradients of the per-row terms of several teachers: those of the student as in backward.cuh, and
// with b = dD/d(log p), which sums to 0,
//   dD/dv_k = w_k*((p_k/p)*b - p_k*S_k),  S_k = sum (p_k/p)*b = dD/dw_k up to a constant, which weights that
//   sum to 1 do not notice.
#pragma once

#include "common/rows/unheard_teacher.h"
#include "cuda/distill/backward.cuh"
#include "cuda/distill/mixture.cuh"

namespace mfd {
namespace device {

// The problem's teacher is the mixture: float32 or float64, at temperature 1.
struct MixtureBackward {
  Backward rows;  // without the teacher's gradients
  DeviceMixture teachers;
  void* d_teachers[kMaxTeachers];  // each, and all, may be null
  void *d_weights, *d_temperature;
  bool mixes;              // whether any of these is there
  int teachers_at;         // the groups' TeacherState in shared memory
  int mixed_at;            // and their rows of log p and of b,
  unsigned char* scratch;  // or where these lie instead
  int64_t row_bytes;       // of one of the two rows
};

template <class S, class Group>
struct TeacherGradients {
  typedef typename S::T T;
  static constexpr int N = VectorOf<S>::kColumns;
  enum class TeacherPass { kShare, kDot, kGradient };

  const MixtureBackward& g;
  const RowProblem& p;
  const Group& group;
  const SavedRow& row;
  const MixedTeacher<S>& mixed;
  View student;
  int64_t index;
  Span span;
  double temperature, inverse;

  static MFD_DEVICE unsigned char* output(const MixtureBackward& g, int k, int64_t index) {
    const Side& side = g.teachers.sides[k];
    return static_cast<unsigned char*>(g.d_teachers[k]) + index * side.width * size_of(side.dtype);
  }

  // Columns from `first` on.
  static MFD_DEVICE void write_zeros(const MixtureBackward& g, const Group& group, int k, int64_t index,
                                     int64_t first) {
    const Side& side = g.teachers.sides[k];
    if (!g.d_teachers[k]) return;
    for (int64_t c = first + group.rank(); c < side.width; c += group.threads())
      store_one<T>(output(g, k, index) + c * size_of(side.dtype), side.dtype, T(0));
  }

  // The sum of the shares of a teacher of weight 0.
  MFD_DEVICE double unheard(int k, const TeacherState& t) const {
    const View view = teacher_view(g.teachers.sides[k], t);
    const LinearSlopes linear = row_linear_slopes(row, p);
    double sum[1] = {0.0};
    for (int64_t c = group.rank(); c < p.classes; c += group.threads()) {
      const double x = logit_at<S>(student, student.data, c), y = logit_at<S>(view, view.data, c);
      const double log_p = load_one<double>(mixed.mixed + c * int64_t{sizeof(T)}, MixedTeacher<S>::kDtype);
      const double log_pk = (y - t.max) * inverse - t.lse;
      sum[0] += unheard_share(p, row, linear, x, log_pk, log_p, row.decoupled && c == row.label);
    }
    group.template reduce<Sum>(sum);
    return sum[0];
  }

  // One pass over the row of one teacher, and what it adds up: its shares; or gradient*y of a standardised
  // one; or dD/dv_k*(y - max).
  MFD_DEVICE double pass(TeacherPass kind, int k, const TeacherState& t, double share, double dot) const {
    double v[1] = {0.0};
    const Side& side = g.teachers.sides[k];
    const View view = teacher_view(side, t);
    const bool unit = p.divergence == Divergence::kNKD,
               writes = kind == TeacherPass::kGradient && g.d_teachers[k];
    const T max = static_cast<T>(t.max), by_t = static_cast<T>(inverse), lse = static_cast<T>(t.lse);
    const T weight = static_cast<T>(t.weight), total = static_cast<T>(share);
    const T soft = static_cast<T>(row.grad_soft * row.soft_scale * inverse);
    const double target_loss =
        unit ? row.grad_soft * times(t.weight * t.unit_label, -row.target.hard_student.log_label) : 0.0;
    const T drive_scale = static_cast<T>(target_loss * (unit ? inverse_mass(t.unit_lse) : 0.0)),
            unit_max = static_cast<T>(t.unit_max), at_label = static_cast<T>(times(target_loss, t.unit_rest));
    const Exponent<S> at_one(1.0, false);
    unsigned char* out = output(g, k, index);
    const bool wide = sizeof(T) == 4 && is_aligned(out);
    over_vectors<S>(group, span, [&](int64_t start) {
      T y[N], log_p[N], b[N];
      load_logits<S, false>(view, start, p.classes, y);
      load_wide(mixed.mixed + start * int64_t{sizeof(T)}, MixedTeacher<S>::kDtype, log_p);
      load_wide(mixed.slopes + start * int64_t{sizeof(T)}, MixedTeacher<S>::kDtype, b);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const bool inside = start + i < p.classes;
        const T log_pk = S::fma(y[i] - max, by_t, -lse);
        const T part = inside ? share_of<S>(log_pk, log_p[i], b[i]) : T(0);
        if (kind == TeacherPass::kShare) {
          v[0] += static_cast<double>(part);
          continue;
        }
        const T slope = weight == T(0) ? T(0) : weight * (part - exp_of(log_pk) * total);
        T gradient = soft * slope;
        if (unit)
          gradient =
              start + i == row.label ? gradient + at_label : gradient - drive_scale * at_one(y[i] - unit_max);
        if (kind == TeacherPass::kDot) {
          if (inside && gradient != T(0)) v[0] += static_cast<double>(gradient * y[i]);
          continue;
        }
        if (inside && slope != T(0)) v[0] += static_cast<double>(slope * (y[i] - max));
        if (changes_gradient(side)) gradient = raw_gradient<S>(view, gradient, y[i], dot);
        b[i] = inside ? gradient : T(0);
      }
      if (writes) store_gradient<S>(out, side.dtype, start, side.width, wide, b);
    });
    group.template reduce<Sum>(v);
    return v[0];
  }

  MFD_DEVICE void run(const TeacherState* states) const {
    double of_temperature = 0;
    for (int k = 0; k < g.teachers.count; ++k) {
      const TeacherState& t = states[k];
      const double unit =
          p.divergence == Divergence::kNKD ? times(t.unit_label, -row.target.hard_student.log_label) : 0.0;
      double share = 0, dot = 0;
      if (t.weight != 0) share = pass(TeacherPass::kShare, k, t, 0.0, 0.0);
      if (t.weight == 0 && g.d_weights) share = unheard(k, t);
      if (g.d_teachers[k] && g.teachers.sides[k].standardize) dot = pass(TeacherPass::kDot, k, t, share, 0.0);
      if (g.d_teachers[k] || g.d_temperature)
        of_temperature += pass(TeacherPass::kGradient, k, t, share, dot);
      write_zeros(g, group, k, index, (p.classes + N - 1) / N * N);
      if (group.rank() == 0 && g.d_weights)
        static_cast<T*>(g.d_weights)[index * g.teachers.count + k] =
            static_cast<T>(row.grad_soft * row.soft_scale * share + row.grad_soft * unit);
    }
    SlopeSums sums{};
    sums.v_y = of_temperature;
    if (group.rank() == 0 && g.d_temperature)
      static_cast<T*>(g.d_temperature)[index] =
          static_cast<T>(mixed_temperature_gradient(row, temperature, sums));
  }

  // Zeros for a row that is not counted.
  static MFD_DEVICE void skip(const MixtureBackward& g, const Group& group, int64_t index) {
    const int count = g.teachers.count;
    for (int k = 0; k < count; ++k) write_zeros(g, group, k, index, 0);
    if (group.rank() != 0) return;
    for (int k = 0; g.d_weights && k < count; ++k) static_cast<T*>(g.d_weights)[index * count + k] = T(0);
    if (g.d_temperature) static_cast<T*>(g.d_temperature)[index] = T(0);
  }
};

template <class S, class Group>
__global__ void __launch_bounds__(256, sizeof(typename S::T) == 8 ? 1 : 0)
    mixture_backward(const __grid_constant__ MixtureBackward g) {
  typedef BackwardRow<S, Group, MixedTeacher<S>> Row;
  unsigned char* shared = dynamic_shared();
  const Group group(reinterpret_cast<typename Group::Shared*>(shared));
  const RowProblem& p = g.rows.problem;
  const int mine = group.index_in_block();
  TeacherState* states = reinterpret_cast<TeacherState*>(shared + g.teachers_at) + mine * g.teachers.count;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * group.in_block();
  const int64_t own = static_cast<int64_t>(blockIdx.x) * group.in_block() + mine;
  unsigned char* mixed =
      g.scratch ? g.scratch + own * 2 * g.row_bytes : shared + g.mixed_at + mine * 2 * g.row_bytes;
  const Span span = span_of<S>(group, p.classes);
  for (int64_t index = own; index < p.n_rows; index += groups) {
    if (!is_counted(p, index)) {
      Row::skip(g.rows, group, index);
      TeacherGradients<S, Group>::skip(g, group, index);
      continue;
    }
    MixedTeacher<S> teacher =
        mix_teachers<S>(group, g.teachers, p, index, readable_label(p, index), span, states, mixed);
    if (g.mixes) teacher.slopes = mixed + g.row_bytes;
    Row row(g.rows, group, index, false, teacher);
    row.run();
    if (g.mixes) {
      group.sync();
      const double t = at<typename S::T>(g.teachers.temperature, index);
      const TeacherGradients<S, Group> gradients{g, p, group, row.row, row, row.x, index, span, t, 1.0 / t};
      gradients.run(states);
    }
    group.sync();
  }
}

}  // namespace device
}  // namespace mfd
