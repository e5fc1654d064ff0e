// Rows with a sparse teacher: one pass over the student's logits, and one over its exponentials for the
// gradient, which is proportional to them besides the listed classes.
#pragma once

#include "cpu/distill/backward.h"
#include "cpu/topk/gradient.h"
#include "cpu/topk/rest.h"
#include "cpu/topk/soft.h"

namespace mfd::MFD_ISA {
namespace {

// Position of the largest value among the candidates; -1 without one, or where one is NaN.
template <class S>
static int64_t first_listed_argmax(const TopKRow<S>& c) {
  const auto* y = c.listed.y;
  int64_t best = -1;
  for (int64_t k = 0; k < c.listed.count; ++k) {
    if (y[k] != y[k]) return -1;
    if (!c.pads(k) && (best < 0 || y[k] > y[best])) best = k;
  }
  return best;
}

template <class S>
static void write_topk_by_products(const TopKRow<S>& c) {
  typedef typename S::T T;
  const Forward& f = c.f;
  const Listed<S>& l = c.listed;
  const double rest_y = load_values<S>(c);
  const RestSums rest = merge_rest<S>(c);
  const double max = max_with<S>(l.x, l.count, rest.max), max_t = max_with<S>(l.y, l.count, rest_y);
  const double weight = block_weight(rest.max, max, c.ts);
  const double sum = weight * rest.sum_s + exponential_sum<S>(l.x, l.count, max, Exponent<S>(c.ts), l.q);
  const double rest_dot = rest.sum_s == 0 ? 0.0 : weight * (rest.dot_s + rest.sum_s * (rest.max - max));
  const double dot = rest_dot + weighted_sum<S>(l.q, l.x, l.count, max);
  const double listed_t = exponential_sum<S>(l.y, l.count, max_t, Exponent<S>(c.tt), l.p);
  const double beside = rest_y == -kInf ? 0.0 : exp((rest_y - max_t) / c.tt);
  const double sum_t = listed_t + beside;
  const double dot_t = weighted_sum<S>(l.p, l.y, l.count, max_t) + times(beside, rest_y - max_t);
  put<T>(f.student_entropy, c.row, sum == 0 ? kNan : log(sum) - dot / (c.ts * sum));
  put<T>(f.teacher_entropy, c.row, sum_t == 0 ? kNan : log(sum_t) - dot_t / (c.tt * sum_t));
  if (c.label < 0) {
    put<T>(f.student_label_prob, c.row, 0.0);
    put<T>(f.teacher_label_prob, c.row, 0.0);
  } else if (f.student_label_prob) {
    const double logit = logit_at<S>(c.x, c.label, c.scratch);
    const double teacher = l.label < 0 ? 0.0 : exp((l.y[l.label] - max_t) / c.tt) / sum_t;
    put<T>(f.student_label_prob, c.row, exp((logit - max) / c.ts) / sum);
    put<T>(f.teacher_label_prob, c.row, teacher);
  }
  if (!f.agreement) return;
  const int64_t best = first_argmax<S>(c.x, c.p.classes, c.scratch), choice = first_listed_argmax<S>(c);
  f.agreement[c.row] = best >= 0 && choice >= 0 && best == l.indices[choice];
}

// The sums over all classes, after the pass over them.
template <class S>
static AllClasses all_classes(const TopKRow<S>& c, double label) {
  const Listed<S>& l = c.listed;
  AllClasses all{};
  all.label = label;
  if (!c.all_classes) return all;
  all.rest = merge_rest<S>(c);
  all.max = max_with<S>(l.x, l.count, all.rest.max);
  if (!c.hard) return all;
  const double sum_h = all.rest.sum_h * block_weight(all.rest.max, all.max, 1.0) +
                       exponential_sum<S>(l.x, l.count, all.max, Exponent<S>(1.0));
  settle_hard(all, c.decoupled, sum_h);
  return all;
}

template <class S>
static double hard_term(const TopKRow<S>& c, const AllClasses& all) {
  RowSums sums{};
  sums.mean_x = all.rest.sum_x / static_cast<double>(c.p.classes) - all.max;
  return cross_entropy(sums, all.lse_h, all.label - all.max, c.p.smoothing);
}

// d loss/d soft.
template <class S>
static double soft_factor(const TopKRow<S>& c) {
  typedef typename S::T T;
  return at<T>(c.f.weight, c.row) * c.f.soft_factor * at<T>(c.pass.grad_soft, c.row);
}

template <class S>
static TopKSlopes topk_slopes(const TopKRow<S>& c, const AllClasses& all, const SoftTerm& s) {
  typedef typename S::T T;
  const double hard = at<T>(c.f.weight, c.row) * c.f.hard_factor * at<T>(c.pass.grad_hard, c.row);
  return topk_slopes(c.p, c.renormalized, c.powers, soft_factor<S>(c), c.use_hard ? hard : 0.0, c.ts, all, s);
}

// d loss/dx of the listed classes, in Listed::out.
template <class S>
static void listed_gradient(const TopKRow<S>& c, const AllClasses& all, const SoftTerm& s,
                            const TopKSlopes& slopes) {
  typedef typename S::T T;
  const Listed<S>& l = c.listed;
  const Exponent<S> at_one(1.0);
  T* h = c.hard ? l.q : nullptr;  // q is not needed any more
  if (h) probabilities<S>(l.x, l.count, all.max, all.lse_h, at_one, h);
  combine_slopes<S>(l.to_u, h, l.count, slopes.soft, slopes.at_one, slopes.shift, l.out);
  if (c.unit && c.renormalized) {
    const double lse = whole_lse(s.target.hard_student, s.label_x, log(s.sum_h));
    probabilities<S>(l.x, l.count, s.max_s, lse, at_one, l.to_u);
    for (int64_t k = 0; k < l.count; ++k) l.out[k] += static_cast<T>(slopes.unit) * l.to_u[k];
  }
  if (l.label < 0) return;
  T& label = l.out[l.label];
  if (c.decoupled) {
    label = static_cast<T>(decoupled_gradient(c.p, all, s, slopes));
  } else if (c.use_hard) {
    label = static_cast<T>(slopes.soft) * l.to_u[l.label] +
            (static_cast<T>(slopes.hard) * h[l.label] - static_cast<T>(slopes.hard * label_share(c.p)));
  }
}

template <class S>
static void temperature_gradients(const TopKRow<S>& c, const AllClasses& all, const SoftTerm& s) {
  typedef typename S::T T;
  const Listed<S>& l = c.listed;
  const double factor = soft_factor<S>(c);
  ListedSums sums{};
  if (c.pass.d_temperature) {
    sums.u_x = weighted_sum<S>(l.to_u, l.x, l.count, s.max_s);
    sums.to_u = plain_sum<S>(l.to_u, l.count);
    sums.q_x = weighted_sum<S>(l.q, l.x, l.count, s.max_s);
    put<T>(c.pass.d_temperature, c.row,
           topk_temperature_gradient(c.p, c.renormalized, c.powers, factor, c.ts, all.rest, s, sums));
  }
  if (c.pass.d_teacher_temperature) {
    sums.v_y = weighted_sum<S>(l.to_v, l.y, l.count, s.max_t);
    sums.to_v = plain_sum<S>(l.to_v, l.count);
    sums.p_y = weighted_sum<S>(l.p, l.y, l.count, s.max_t);
    put<T>(c.pass.d_teacher_temperature, c.row,
           topk_teacher_temperature_gradient(c.p, factor, c.ts, c.tt, s, sums));
  }
}

template <class S>
static void write_values_gradient(const TopKRow<S>& c, const SoftTerm& s) {
  typedef typename S::T T;
  const Listed<S>& l = c.listed;
  const Side& side = c.p.teacher;
  const ValueFactors f = value_factors(c.p, soft_factor<S>(c), c.ts, c.tt, s);
  if (c.decoupled) l.y[l.label] = static_cast<T>(s.label_y + s.max_t);
  for (int64_t k = 0; k < l.count; ++k) {
    const double y = l.y[k];
    double g = f.label;
    if (!c.decoupled || k != l.label)
      g = f.soft * l.to_v[k] - (c.unit ? f.target_loss * exp(y - s.max_t - f.lse_u) : 0.0);
    if (f.rest != 0) g -= f.rest * exp(y - s.rest);
    l.out[k] = static_cast<T>(c.pads(k) ? 0.0 : g);
  }
  convert_out(l.out, l.count, side.dtype, false,
              static_cast<char*>(c.pass.d_values) + c.row * side.width * dtype_size(side.dtype));
}

template <class S>
static void topk_row(const TopKPass& pass, int64_t row, const Scratch& scratch) {
  typedef typename S::T T;
  const TopKRow<S> c(pass, row, scratch);
  const Forward& f = pass.forward;
  const Listed<S>& l = c.listed;
  if (c.all_classes || f.grad) group_by_block<S>(c);
  if (c.all_classes) {
    const Scales<S> scales(c.pass_t, 1.0, false);
    for (int64_t b = 0; b < c.blocks; ++b) rest_block<S>(c, scales, b);
  } else {
    gather_listed<S>(c);
  }
  c.clear_padding(l.x);
  if (c.entropies) write_topk_by_products<S>(c);
  const double label = c.label >= 0 ? logit_at<S>(c.x, c.label, scratch) : 0.0;
  if (c.decoupled) l.x[l.label] = static_cast<T>(-kInf);
  const AllClasses all = all_classes<S>(c, label);
  const SoftTerm s = soft_term<S>(c, all.max, all.rest, label);
  const double soft =
      (c.p.scale_by_temperature ? c.ts * c.ts : 1.0) * s.value + (c.unit ? s.slopes.target_loss : 0.0);
  const double hard = c.use_hard ? hard_term<S>(c, all) : 0.0;
  if (f.row_loss)
    f.row_loss[row] =
        at<T>(f.weight, row) * (f.soft_factor * soft + (c.use_hard ? f.hard_factor * hard : 0.0));
  put<T>(f.soft, row, soft);
  put<T>(f.hard, row, hard);
  if (!(f.grad || pass.d_values || pass.d_temperature || pass.d_teacher_temperature)) return;
  listed_slopes<S>(c, s);
  temperature_gradients<S>(c, all, s);
  if (f.grad) {
    const TopKSlopes slopes = topk_slopes<S>(c, all, s);
    listed_gradient<S>(c, all, s, slopes);
    if (c.all_classes) {
      write_topk_gradient<S>(c, all, slopes);
    } else {
      scatter_gradient<S>(c, label);
    }
  }
  if (pass.d_values) write_values_gradient<S>(c, s);
}

// Zeros for a row that is not counted.
template <class S>
static void skip_topk_row(const TopKPass& pass, int64_t row) {
  typedef typename S::T T;
  skip_row<S>(pass.forward, row);
  put<T>(pass.d_temperature, row, 0.0);
  put<T>(pass.d_teacher_temperature, row, 0.0);
  const Side& side = pass.forward.problem.teacher;
  const int64_t bytes = side.width * dtype_size(side.dtype);
  if (pass.d_values) write_zeros(static_cast<char*>(pass.d_values) + row * bytes, bytes, false);
}

template <class S>
static void topk_rows_of(const TopKPass& pass, int64_t begin, int64_t end, const Scratch& scratch) {
  for (int64_t row = begin; row < end; ++row) {
    if (is_counted(pass.forward.problem, row)) {
      topk_row<S>(pass, row, scratch);
    } else {
      skip_topk_row<S>(pass, row);
    }
  }
}

}  // namespace
}  // namespace mfd::MFD_ISA
