// Gradients of the per-row terms, recomputed from the saved statistics: one pass over the logits, and one or
// two more before it for the gradients that need exact sums. A warp or a block per row.
#pragma once

#include "common/rows/saved_row.h"
#include "common/vector/slopes.h"
#include "cuda/distill/forward.cuh"

namespace mfd {
namespace device {

// What a pass over a row is for: E_q[g] and E_p[h], sum gradient*z of standardised logits z, the gradients.
enum class GradientPass { kMeans, kDots, kGradients };

template <class S, class Group, class Teacher = OneTeacher<S>>
struct BackwardRow : Teacher {
  typedef typename S::T T;
  static constexpr int N = VectorOf<S>::kColumns;

  const Backward& g;
  const RowProblem& p;
  const Group& group;
  int64_t index;
  bool bad;
  SavedRow row;
  View x, y;
  Span span;
  Exponent<S> by_ts, by_tt, by_one;

  MFD_DEVICE BackwardRow(const Backward& backward, const Group& threads, int64_t i, bool fast,
                         const Teacher& teacher = Teacher())
      : Teacher(teacher),
        g(backward),
        p(backward.problem),
        group(threads),
        index(i),
        row(saved_row<T>(backward, i)),
        by_ts(row.ts, fast),
        by_tt(Teacher::kMixed ? 1.0 : row.tt, fast),
        by_one(1.0, fast) {
    if (Teacher::kMixed) row.tt = 1.0;  // known here, it takes no registers
    bad = is_labelled(p, i) && (row.label < 0 || row.label >= p.classes);
    if (bad) row.label = 0;
    x = view_of<S>(p.student, i, row.decoupled ? row.label : -1);
    y = view_of<S>(p.teacher, i, x.excluded);
    if constexpr (Teacher::kMixed) y.data = this->mixed;
    span = {0, (p.classes + N - 1) / N};
    if (p.student.standardize) find_centre<S, false>(group, x, x.data, span, p.classes);
    if (p.teacher.standardize) find_centre<S, false>(group, y, y.data, span, p.classes);
    if (row.decoupled)
      set_label(row, p, logit_at<S>(x, x.data, row.label), this->teacher_logit(y, y.data, row.label),
                this->odds_at_one());
    // NaN for the row, wherever a slope enters.
    if (bad) row.grad_soft = row.grad_hard = kNan;
  }

  MFD_DEVICE unsigned char* output(void* gradient, const Side& side) const {
    if (!gradient) return nullptr;
    return static_cast<unsigned char*>(gradient) + index * side.width * size_of(side.dtype);
  }

  MFD_DEVICE void write_zeros(unsigned char* out, const Side& side, int64_t first) const {
    if (!out) return;
    for (int64_t k = first + group.rank(); k < side.width; k += group.threads())
      store_one<T>(out + k * size_of(side.dtype), side.dtype, T(0));
  }

  // One side's gradient of a vector: joins `dot`, or goes through the transform into memory.
  MFD_DEVICE void finish(bool dots, const View& view, int64_t start, double label, T (&gradient)[N],
                         T (&logits)[N], double x_dot, unsigned char* out, double& dot) const {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      // The logit that was excluded takes its place again.
      if (row.decoupled && start + k == row.label) logits[k] = static_cast<T>(label);
      if (dots) {
        if (start + k < p.classes && gradient[k] != T(0)) dot += static_cast<double>(gradient[k] * logits[k]);
      } else {
        if (changes_gradient(*view.side)) gradient[k] = raw_gradient<S>(view, gradient[k], logits[k], x_dot);
        if (start + k >= p.classes) gradient[k] = T(0);
      }
    }
    if (!dots)
      store_gradient<S>(out, view.side->dtype, start, view.side->width, sizeof(T) == 4 && is_aligned(out),
                        gradient);
  }

  // Adds this thread's part of the sums that the pass is for, or writes the gradients.
  MFD_DEVICE void pass(GradientPass kind, const SlopeSums& dots, SlopeSums& sums) const {
    const bool pointwise = is_pointwise(p.divergence), last = kind == GradientPass::kGradients;
    const bool near = row.ts == row.tt && fabs(row.max_t - row.max_s) <= 8.0;
    const T max_s = static_cast<T>(row.max_s), max_t = static_cast<T>(row.max_t), gap = max_t - max_s;
    const T q_scale = static_cast<T>(inverse_mass(row.lse_s)),
            p_scale = static_cast<T>(inverse_mass(row.lse_t));
    const T ratio = static_cast<T>(row.ts / row.tt);
    const T inverse_s = static_cast<T>(1.0 / row.ts), inverse_t = static_cast<T>(1.0 / row.tt);
    const T lse_s = static_cast<T>(row.lse_s), lse_t = static_cast<T>(row.lse_t);
    const T moved = static_cast<T>(row.lse_s - row.lse_t);
    const T mean_g = static_cast<T>(row.mean_g), mean_h = static_cast<T>(row.mean_h);
    const LinearSlopes slopes = row_linear_slopes(row, p);
    const LinearSlope<S> slope(slopes);
    const StudentFactors to_student = student_factors(row, p);
    const TeacherFactors to_teacher = teacher_factors(row);
    const T h_scale = static_cast<T>(p.labels ? inverse_mass(row.lse_h) : 0.0);
    const bool unit = p.divergence == Divergence::kNKD;
    const T u_scale = static_cast<T>(unit ? inverse_mass(row.lse_u) : 0.0);
    unsigned char* d_student = kind == GradientPass::kMeans ? nullptr : output(g.d_student, p.student);
    unsigned char* d_teacher =
        kind == GradientPass::kMeans || Teacher::kMixed ? nullptr : output(g.d_teacher, p.teacher);
    if (kind == GradientPass::kDots && !p.student.standardize) d_student = nullptr;
    if (kind == GradientPass::kDots && !p.teacher.standardize) d_teacher = nullptr;
    over_vectors<S>(group, span, [&](int64_t start) {
      T a[N], b[N], q[N], w[N], to_u[N], to_v[N];
      load_logits<S, false>(x, start, p.classes, a);
      load_logits<S, false>(y, start, p.classes, b);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        q[k] = by_ts(a[k] - max_s) * q_scale;
        w[k] = by_tt(b[k] - max_t) * p_scale;
        const T tx = a[k] - max_s, ty = b[k] - max_t;
        const T d = near ? b[k] - a[k] - gap : S::fma(ty, ratio, -tx);
        to_u[k] = S::fma(d, inverse_s, moved);  // r, for now
      }
      if (pointwise) {
        with_divergence<S>(p, row.far, [&](const auto& divergence) {
#pragma unroll
          for (int k = 0; k < N; ++k) {
            const bool logs = divergence.kTakesLogs;
            const Point<S> point =
                divergence(q[k], w[k], to_u[k], logs ? S::fma(a[k] - max_s, inverse_s, -lse_s) : T(0),
                           logs ? S::fma(b[k] - max_t, inverse_t, -lse_t) : T(0));
            to_u[k] = point.g - q[k] * mean_g;
            to_v[k] = point.h - w[k] * mean_h;
          }
        });
      } else {
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const T t = slopes.of_student ? -S::fma(a[k] - max_s, inverse_s, -lse_s) : to_u[k];
          const SlopePair<S> pair = slope(q[k], w[k], to_u[k], t);
          to_u[k] = pair.to_u;
          to_v[k] = pair.to_v;
        }
      }
      if constexpr (Teacher::kMixed) {
        if (last) this->keep_slopes(start, row.decoupled ? row.label : -1, row.slopes.rest_shift, to_v);
      }
      if (kind != GradientPass::kDots) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
          if (start + k >= p.classes) continue;
          sums.to_u += static_cast<double>(to_u[k]);
          sums.to_v += static_cast<double>(to_v[k]);
          if (last && g.d_temperature) {
            sums.u_x += to_u[k] == T(0) ? 0.0 : static_cast<double>(to_u[k] * (a[k] - max_s));
            sums.mean_x += q[k] == T(0) ? 0.0 : static_cast<double>(q[k] * (a[k] - max_s));
          }
          if (last && g.d_teacher_temperature)
            sums.v_y += to_v[k] == T(0) ? 0.0 : static_cast<double>(to_v[k] * (b[k] - max_t));
        }
      }
      if (d_student) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const bool own = start + k == row.label;
          T value = static_cast<T>(to_student.soft) * to_u[k];
          if (p.labels) {
            const T h = static_cast<T>(to_student.hard) * (by_one(a[k] - max_s) * h_scale);
            value = value + (h - static_cast<T>(own ? to_student.share : to_student.shift));
          }
          to_u[k] = row.decoupled && own ? static_cast<T>(to_student.decoupled) : value;
        }
        finish(!last, x, start, row.label_x + row.max_s, to_u, a, dots.x_dot, d_student, sums.x_dot);
      }
      if (d_teacher) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
          T value = static_cast<T>(to_teacher.soft) * to_v[k];
          if (unit) value = value - static_cast<T>(to_teacher.unit) * (by_one(b[k] - max_t) * u_scale);
          if (row.decoupled && start + k == row.label) value = value + static_cast<T>(to_teacher.decoupled);
          to_v[k] = value;
        }
        finish(!last, y, start, row.label_y + row.max_t, to_v, b, dots.y_dot, d_teacher, sums.y_dot);
      }
    });
  }

  MFD_DEVICE void run() {
    const bool exact_g = g.d_temperature && is_pointwise(p.divergence);
    const bool means = g.d_teacher || g.d_teacher_temperature || exact_g || this->wants_gradients();
    const bool dotted = (g.d_student && p.student.standardize) || (g.d_teacher && p.teacher.standardize);
    SlopeSums sums{};
    for (int k = 0; k < 3; ++k) {
      const GradientPass kind = static_cast<GradientPass>(k);
      if ((kind == GradientPass::kMeans && !means) || (kind == GradientPass::kDots && !dotted)) continue;
      const SlopeSums dots = sums;
      sums = {};
      pass(kind, dots, sums);
      double v[7] = {sums.to_u, sums.to_v, sums.u_x, sums.v_y, sums.mean_x, sums.x_dot, sums.y_dot};
      group.template reduce<Sum>(v);
      sums = {v[0], v[1], v[2], v[3], v[4], v[5], v[6]};
      if (kind == GradientPass::kMeans) settle_means(row, p, sums);
    }
    const int64_t first = (p.classes + N - 1) / N * N;
    write_zeros(output(g.d_student, p.student), p.student, first);
    write_zeros(output(g.d_teacher, p.teacher), p.teacher, first);
    if (group.rank() != 0) return;
    if (g.d_temperature)
      static_cast<T*>(g.d_temperature)[index] = static_cast<T>(temperature_gradient(row, p, sums));
    if (g.d_teacher_temperature)
      static_cast<T*>(g.d_teacher_temperature)[index] =
          static_cast<T>(teacher_temperature_gradient(row, sums));
  }

  // Zeros for a row that is not counted.
  static MFD_DEVICE void skip(const Backward& g, const Group& group, int64_t index) {
    const RowProblem& p = g.problem;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      void* gradient = side ? g.d_teacher : g.d_student;
      const Side& of = side ? p.teacher : p.student;
      if (!gradient) continue;
      unsigned char* out = static_cast<unsigned char*>(gradient) + index * of.width * size_of(of.dtype);
      for (int64_t k = group.rank(); k < of.width; k += group.threads())
        store_one<T>(out + k * size_of(of.dtype), of.dtype, T(0));
    }
    if (group.rank() != 0) return;
    if (g.d_temperature) static_cast<T*>(g.d_temperature)[index] = T(0);
    if (g.d_teacher_temperature) static_cast<T*>(g.d_teacher_temperature)[index] = T(0);
  }
};

template <class S, class Group>
__global__ void __launch_bounds__(256) distill_backward(const __grid_constant__ Backward g) {
  const Group group(reinterpret_cast<typename Group::Shared*>(dynamic_shared()));
  const bool fast = size_of(g.problem.student.dtype) == 2 && size_of(g.problem.teacher.dtype) == 2;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * group.in_block();
  const int64_t own = static_cast<int64_t>(blockIdx.x) * group.in_block() + group.index_in_block();
  for (int64_t row = own; row < g.problem.n_rows; row += groups) {
    if (is_counted(g.problem, row)) {
      BackwardRow<S, Group>(g, group, row, fast).run();
    } else {
      BackwardRow<S, Group>::skip(g, group, row);
    }
  }
}

}  // namespace device
}  // namespace mfd
