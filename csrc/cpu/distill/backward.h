// Gradients of the per-row terms, recomputed from the saved statistics: one pass over the logits, and another
// within the caches for the gradients that need exact sums.
#pragma once

#include "common/rows/saved_row.h"
#include "cpu/distill/forward.h"
#include "cpu/distill/mixture_backward.h"
#include "cpu/distill/slopes.h"

namespace mfd::MFD_ISA {
namespace {

enum class BackwardPass { kMeans, kShares, kDots, kGradients };

template <class S>
struct RowGradients {
  typedef typename S::T T;
  BackwardRow<S> row;
  const Exponent<S> by_ts, by_tt;
  const Scratch& scratch;
  SlopeSums sums{};
  char *d_student, *d_teacher;

  RowGradients(const Backward& g, int64_t index, const Scratch& s, char* to_student, char* to_teacher)
      : row(g, index, s),
        by_ts(row.ts),
        by_tt(row.tt),
        scratch(s),
        d_student(to_student),
        d_teacher(to_teacher) {}

  // d/dx of a block of transformed logits, in scratch.block_out.
  T* student(const BlockSlopes<S>& b, const T* x, int64_t start, int64_t n) const {
    const RowProblem& problem = row.g.problem;
    T* out = static_cast<T*>(scratch.block_out);
    const StudentFactors f = student_factors(row, problem);
    T* h = problem.labels ? static_cast<T*>(scratch.exp_h) : nullptr;
    if (h) probabilities<S>(x, n, row.max_s, row.lse_h, Exponent<S>(1.0), h);
    combine_slopes<S>(b.to_u, h, n, f.soft, f.hard, f.shift, out);
    const int64_t label = row.label - start;
    if (label < 0 || label >= n) return out;
    if (row.decoupled) {
      out[label] = static_cast<T>(f.decoupled);
    } else if (h) {
      out[label] = static_cast<T>(f.soft) * b.to_u[label] +
                   (static_cast<T>(f.hard) * h[label] - static_cast<T>(f.share));
    }
    return out;
  }

  // d/dy of a block of transformed logits, in scratch.block_out.
  T* teacher(const BlockSlopes<S>& b, const T* y, int64_t start, int64_t n) const {
    T* out = static_cast<T*>(scratch.block_out);
    const TeacherFactors f = teacher_factors(row);
    combine_slopes<S>(b.to_v, nullptr, n, f.soft, 0.0, 0.0, out);
    if (row.g.problem.divergence == Divergence::kNKD) {
      T* h = static_cast<T*>(scratch.to_u);
      probabilities<S>(y, n, row.max_t, row.lse_u, Exponent<S>(1.0), h);
      combine_slopes<S>(b.to_v, h, n, f.soft, -f.unit, 0.0, out);
    }
    const int64_t label = row.label - start;
    if (row.decoupled && label >= 0 && label < n) out[label] += static_cast<T>(f.decoupled);
    return out;
  }

  void block(BackwardPass pass, int64_t start, int64_t n) {
    const Backward& g = row.g;
    const RowProblem& problem = g.problem;
    T* block_x = static_cast<T*>(scratch.block_x);
    T* block_y = static_cast<T*>(scratch.block_y);
    T* x = const_cast<T*>(load_block<S>(row.x, start, n, block_x).x);
    T* y = const_cast<T*>(load_block<S>(row.y, start, n, block_y).x);
    const BlockSlopes<S> b = block_slopes<S>(row, by_ts, by_tt, x, y, n, scratch);
    if (pass == BackwardPass::kMeans) {
      sums.to_u += plain_sum<S>(b.to_u, n);
      sums.to_v += plain_sum<S>(b.to_v, n);
      return;
    }
    if (pass == BackwardPass::kShares) return teachers(pass, b, start, n);
    if (pass == BackwardPass::kGradients && g.d_temperature) {
      sums.u_x += weighted_sum<S>(b.to_u, x, n, row.max_s);
      sums.to_u += plain_sum<S>(b.to_u, n);
      sums.mean_x += weighted_sum<S>(b.q, x, n, row.max_s);
    }
    if (pass == BackwardPass::kGradients && g.d_teacher_temperature && !problem.mixture)
      sums.v_y += weighted_sum<S>(b.to_v, y, n, row.max_t);
    const bool dots = pass == BackwardPass::kDots;
    if (d_student && (!dots || problem.student.standardize)) {
      T* out = student(b, x, start, n);
      if (dots) {
        sums.x_dot += dot(out, x, row.label_x + row.max_s, start, n);
      } else {
        emit(row.x, x, row.label_x + row.max_s, sums.x_dot, start, n, out, d_student);
      }
    }
    if (d_teacher && (!dots || problem.teacher.standardize)) {
      T* out = teacher(b, y, start, n);
      if (dots) {
        sums.y_dot += dot(out, y, row.label_y + row.max_t, start, n);
      } else {
        emit(row.y, y, row.label_y + row.max_t, sums.y_dot, start, n, out, d_teacher);
      }
    }
    if (problem.mixture && of_teachers()) teachers(pass, b, start, n);
  }

  // Whether several teachers, their weights or their temperature want gradients.
  bool of_teachers() const {
    const Backward& g = row.g;
    for (int64_t k = 0; k < g.problem.mixture->count; ++k)
      if (g.d_teachers[k]) return true;
    return g.d_weights || g.d_teacher_temperature;
  }

  // One block of every teacher; takes the student's scratch.
  void teachers(BackwardPass pass, const BlockSlopes<S>& b, int64_t start, int64_t n) {
    const Backward& g = row.g;
    const int64_t label = row.label - start;
    const bool holds_label = row.decoupled && label >= 0 && label < n;
    if (holds_label) b.to_v[label] = static_cast<T>(-row.slopes.rest_shift);
    const T* log_p = static_cast<const T*>(scratch.mixture) + start;
    T* const slopes = static_cast<T*>(scratch.to_u);
    T* const out = static_cast<T*>(scratch.block_out);
    for (int64_t k = 0; k < g.problem.mixture->count; ++k) {
      TeacherRow& t = scratch.teachers[k];
      const View view = teacher_view<S>(g.problem, k, row.index, t.centre);
      const T* y = load_block<S>(view, start, n, static_cast<T*>(scratch.block_x)).x;
      if (pass == BackwardPass::kShares) {
        if (t.weight == 0 && g.d_weights) {
          const T* x = load_block<S>(row.x, start, n, static_cast<T*>(scratch.block_y)).x;
          t.share += unheard_sum<S>(row, t, x, y, log_p, n, row.label - start);
        } else {
          t.share += share_sum<S>(t, row.mix_t, y, log_p, b.to_v, n);
        }
        continue;
      }
      teacher_slopes<S>(t, row.mix_t, y, log_p, b.to_v, n, slopes);
      if (pass == BackwardPass::kGradients && g.d_teacher_temperature)
        sums.v_y += weighted_sum<S>(slopes, y, n, t.max);
      if (!g.d_teachers[k]) continue;
      const double soft = row.grad_soft * row.soft_scale / row.mix_t;
      const double unit = row.grad_soft * times(t.weight * t.unit_label, -row.target.hard_student.log_label);
      T* const h = row.g.problem.divergence == Divergence::kNKD ? static_cast<T*>(scratch.exp_s) : nullptr;
      if (h) probabilities<S>(y, n, t.unit_max, t.unit_lse, Exponent<S>(1.0), h);
      combine_slopes<S>(slopes, h, n, soft, -unit, 0.0, out);
      if (h && holds_label) out[label] = static_cast<T>(soft * slopes[label] + times(unit, t.unit_rest));
      if (pass == BackwardPass::kDots) {
        if (view.side->standardize) t.dot += weighted_sum<S>(out, y, n, 0.0);
        continue;
      }
      const int64_t size = dtype_size(view.side->dtype), width = view.side->width;
      char* const row_out = static_cast<char*>(g.d_teachers[k]) + row.index * width * size;
      if (changes_gradient(*view.side)) transform_backward<S>(view, y, n, t.dot, out);
      convert_out(out, n, view.side->dtype, g.stream, row_out + start * size);
      const int64_t end = start + n;
      if (end == g.problem.classes) write_zeros(row_out + end * size, (width - end) * size, false);
    }
  }

  // The logit that was excluded takes its place again.
  void restore(T* x, double label, int64_t start, int64_t n) const {
    const int64_t at = row.label - start;
    if (row.decoupled && at >= 0 && at < n) x[at] = static_cast<T>(label);
  }

  double dot(const T* gradient, T* x, double label, int64_t start, int64_t n) const {
    restore(x, label, start, n);
    return weighted_sum<S>(gradient, x, n, 0.0);
  }

  // One side's gradient of a block, through the transform and into its dtype.
  void emit(const View& view, T* x, double label, double x_dot, int64_t start, int64_t n, T* gradient,
            char* out) const {
    if (changes_gradient(*view.side)) {
      restore(x, label, start, n);
      transform_backward<S>(view, x, n, x_dot, gradient);
    }
    convert_out(gradient, n, view.side->dtype, row.g.stream, out + start * dtype_size(view.side->dtype));
  }

  void run(BackwardPass pass) {
    const int64_t classes = row.g.problem.classes;
    for (int64_t start = 0; start < classes; start += kBlock)
      block(pass, start, classes - start < kBlock ? classes - start : kBlock);
  }

  void settle() {
    run(BackwardPass::kMeans);
    settle_means(row, row.g.problem, sums);
    sums = {};
  }
};

// Zeros for a row that is not counted.
template <class S>
static void skip_teachers(const Backward& g, int64_t row) {
  const Mixture& m = *g.problem.mixture;
  for (int64_t k = 0; k < m.count; ++k) {
    const int64_t bytes = m.teachers[k].width * dtype_size(m.teachers[k].dtype);
    if (g.d_teachers[k]) write_zeros(static_cast<char*>(g.d_teachers[k]) + row * bytes, bytes, g.stream);
    if (g.d_weights) put<typename S::T>(g.d_weights, row * m.count + k, 0.0);
  }
}

template <class S>
static void backward_row(const Backward& g, int64_t index, const Scratch& scratch) {
  typedef typename S::T T;
  const RowProblem& problem = g.problem;
  const int64_t classes = problem.classes;
  const int64_t x_size = dtype_size(problem.student.dtype), y_size = dtype_size(problem.teacher.dtype);
  char* d_student =
      g.d_student ? static_cast<char*>(g.d_student) + index * problem.student.width * x_size : nullptr;
  char* d_teacher =
      g.d_teacher ? static_cast<char*>(g.d_teacher) + index * problem.teacher.width * y_size : nullptr;
  if (!is_counted(problem, index)) {
    if (problem.mixture) skip_teachers<S>(g, index);
    if (d_student) write_zeros(d_student, problem.student.width * x_size, g.stream);
    if (d_teacher) write_zeros(d_teacher, problem.teacher.width * y_size, g.stream);
    if (g.d_temperature) static_cast<T*>(g.d_temperature)[index] = T(0);
    if (g.d_teacher_temperature) static_cast<T*>(g.d_teacher_temperature)[index] = T(0);
    return;
  }
  RowGradients<S> gradients(g, index, scratch, d_student, d_teacher);
  const BackwardRow<S>& row = gradients.row;
  const SlopeSums& sums = gradients.sums;
  const bool exact_g = g.d_temperature && is_pointwise(problem.divergence);
  const bool mixed = problem.mixture && gradients.of_teachers();
  if (d_teacher || mixed || g.d_teacher_temperature || exact_g) gradients.settle();
  if (mixed) gradients.run(BackwardPass::kShares);
  if ((d_student && problem.student.standardize) || ((d_teacher || mixed) && problem.teacher.standardize))
    gradients.run(BackwardPass::kDots);
  gradients.run(BackwardPass::kGradients);
  if (d_student) write_zeros(d_student + classes * x_size, (problem.student.width - classes) * x_size, false);
  if (d_teacher) write_zeros(d_teacher + classes * y_size, (problem.teacher.width - classes) * y_size, false);
  if (g.d_temperature)
    static_cast<T*>(g.d_temperature)[index] = static_cast<T>(temperature_gradient(row, problem, sums));
  if (g.d_teacher_temperature)
    static_cast<T*>(g.d_teacher_temperature)[index] =
        static_cast<T>(problem.mixture ? mixed_temperature_gradient(row, row.mix_t, sums)
                                       : teacher_temperature_gradient(row, sums));
  if (!problem.mixture || !g.d_weights) return;
  for (int64_t k = 0; k < problem.mixture->count; ++k) {
    const TeacherRow& t = scratch.teachers[k];
    const double unit = times(t.unit_label, -row.target.hard_student.log_label);
    static_cast<T*>(g.d_weights)[index * problem.mixture->count + k] =
        static_cast<T>(row.grad_soft * row.soft_scale * t.share + row.grad_soft * unit);
  }
}

template <class S>
static void backward_rows_of(const Backward& g, int64_t begin, int64_t end, const Scratch& scratch) {
  for (int64_t row = begin; row < end; ++row) backward_row<S>(g, row, scratch);
}

}  // namespace
}  // namespace mfd::MFD_ISA
