// What the rows of a sparse teacher come to, in double precision: the rest of the classes, which the teacher
// does not list, is one class of their mass wherever f(q, 0) is proportional to q.
#pragma once

#include "common/rows/row_terms.h"

namespace mfd {

// The index of a candidate that only pads a list: neither it nor its value is one of a class.
constexpr int64_t kPadding = INT64_MIN;

MFD_ROW_FN bool is_padding(int64_t index) {
  return index == kPadding;
}

// Sums over the other classes relative to `max`, little more than their largest logit: e_s of (x - max)/T, h
// at T = 1, and e_s^degree.
struct RestSums {
  double max;
  double sum_s, sum_h, powers;
  double dot_s, dot_powers;  // sum e*(x - max)
  double sum_x;              // sum x over all classes
};

// Values and slopes of the soft term. Maxima and sums are over the classes the tail leaves, without the label
// where the divergence decouples it.
struct SoftTerm {
  double value;                       // what T^2 multiplies
  double max_s, sum_s, max_t, sum_t;  // with the rest
  double lse_s, lse_t;                // 0 where the sum is
  double rest;                        // y of the rest: log(1 - sum of the listed); -inf for none
  double q, p, log_q, log_p;          // of the rest
  double rest_x;                      // its largest logit minus max_s
  bool far;                           // of a skew divergence; see with_divergence
  double mean_g, mean_h;              // E_q[df/dq], E_p[df/dp]
  double rest_u, rest_v;              // dD/du and dD/dv of the rest
  double label_x, label_y;            // minus the maxima, where the label is decoupled
  double sum_h, sum_u;                // at temperature 1, of NKD
  Target target;
  TargetSlopes slopes;
};

// Of all the student's classes besides a decoupled label, where they matter.
struct AllClasses {
  double max;
  RestSums rest;
  double label;    // logit
  double lse_h;    // log sum exp(x - max) of all
  Odds hard_odds;  // of a decoupled label, at temperature 1
};

// What the gradient's two passes need: d loss/dx_j = soft*to_u + at_one*softmax(x)_j - shift, with the
// label's own.
struct TopKSlopes {
  double soft, hard, unit, at_one, shift;
  double rest,
      powers;  // factors of e_s (relative to the rest's maximum) and e_s^degree of the classes not listed
};

// f, q*df/dq and p*df/dp, of one class or summed.
struct ClassPoint {
  double value, g, h;
};

// How much of q - p the functors add to f beyond the sum's needs where p is no whole distribution, and minus
// the constant they add to df/dp.
MFD_ROW_FN double whole_shift(const RowProblem& p) {
  switch (p.divergence) {
    case Divergence::kForwardKL:
      return 1.0;
    case Divergence::kSkewKL:
      return 1.0 - p.first;
    case Divergence::kSkewReverseKL:
      return p.first - 1.0;
    default:
      return 0.0;
  }
}

// log sum exp(x - max) over all classes, from the sum without a decoupled label.
MFD_ROW_FN void settle_hard(AllClasses& all, bool decoupled, double sum_h) {
  all.lse_h = log(decoupled || sum_h != 0 ? sum_h : kNan);
  if (!decoupled) return;
  all.hard_odds = odds_of(all.label - all.max, 1.0, all.lse_h);
  all.lse_h = whole_lse(all.hard_odds, all.label - all.max, all.lse_h);
}

// Logarithms and the rest's probabilities, from the sums; `beside` is the rest's part of sum_s, `rest_sum`
// its sum relative to its own maximum.
MFD_ROW_FN void settle_sums(const RowProblem& p, double ts, double tt, double beside, double rest_sum,
                            SoftTerm& s) {
  if (!decouples_target(p.divergence)) {
    if (s.sum_s == 0) s.sum_s = kNan;
    if (s.sum_t == 0) s.sum_t = kNan;
  }
  s.lse_s = s.sum_s == 0 ? 0.0 : log(s.sum_s);
  s.lse_t = s.sum_t == 0 ? 0.0 : log(s.sum_t);
  s.log_q = rest_sum == 0 ? -kInf : log(rest_sum) + s.rest_x / ts - s.lse_s;
  s.log_p = (s.rest - s.max_t) / tt - s.lse_t;
  s.q = s.sum_s == 0 ? 0.0 : beside / s.sum_s;
  s.p = exp(s.log_p);
}

// q^degree summed over the rest, from the sum relative to its own maximum.
MFD_ROW_FN double rest_powers(double powers, double degree, double ts, const SoftTerm& s) {
  return powers * exp(degree * (s.rest_x / ts - s.lse_s));
}

// The rest of AlphaBeta with the tail `zero`: sum q^degree is not (sum q)^degree.
MFD_ROW_FN ClassPoint power_point(const RowProblem& p, double powers) {
  return {powers / (p.first * (p.first + p.second)), powers / p.first, 0.0};
}

// sum f and the two means of a sum over the classes. `whole`: the teacher's rest counts.
MFD_ROW_FN void settle_points(const RowProblem& p, bool whole, const ClassPoint& listed, ClassPoint rest,
                              SoftTerm& s) {
  if (!whole) {
    const double shift = whole_shift(p) * s.p;
    rest.h = -shift;
    rest.value -= shift;
  }
  s.mean_g = listed.g + rest.g;
  s.mean_h = listed.h + rest.h;
  s.value = listed.value + rest.value;
  // With q - p, which g is, rounding of the logarithms of the sums has no part in the value near p = q.
  if (p.divergence == Divergence::kForwardKL) s.value += s.mean_g;
  if (s.value < 0 && (whole || p.divergence == Divergence::kAlphaBeta)) s.value = 0;
  // Without a distribution on one of the sides no class may be there to show it.
  if (s.lse_s != s.lse_s || s.lse_t != s.lse_t) s.value = kNan;
  if (s.value != s.value) s.mean_g = s.mean_h = kNan;
  s.rest_u = rest.g - s.q * s.mean_g;
  s.rest_v = rest.h - s.p * s.mean_h;
}

// Kullback-Leibler divergence or cross-entropy over the classes besides the label, and the pair's part.
// `listed`: sums of the forward KL's functor (value = h = p*r, g = q - p), or of -p*log q in h.
MFD_ROW_FN void settle_target(const RowProblem& p, double ts, double tt, const ClassPoint& listed,
                              SoftTerm& s) {
  const bool unit = p.divergence == Divergence::kNKD;
  const double rest_term = unit ? -s.log_q : s.log_p - s.log_q;
  double value = s.mean_h = listed.h + times(s.p, rest_term);
  if (!unit) {
    value = s.mean_h + listed.g + (s.q - s.p);
    if (value < 0) value = 0;
  }
  if (s.sum_t == 0) {
    value = s.mean_h = 0;
  } else if (s.sum_s == 0) {
    value = s.mean_h = kInf;
  }
  s.target.student = odds_of(s.label_x, ts, log(s.sum_s));
  s.target.teacher = odds_of(s.label_y, tt, log(s.sum_t));
  if (unit) {
    s.target.hard_student = odds_of(s.label_x, 1.0, log(s.sum_h));
    s.target.hard_teacher = odds_of(s.label_y, 1.0, log(s.sum_u));
  }
  s.value = target_divergence(p, s.target, value);
  s.slopes = target_slopes(p, s.target);
  s.rest_u = s.slopes.student * s.q - s.slopes.teacher * s.p;
  s.rest_v = s.p == 0 ? 0.0 : s.p * (times(s.slopes.rest_weight, rest_term - s.mean_h) + s.slopes.rest_shift);
}

// `soft`, `hard`: d loss/d soft and d loss/d hard of this row. `powers`: of AlphaBeta with the tail `zero`.
MFD_ROW_FN TopKSlopes topk_slopes(const RowProblem& p, bool renormalized, bool powers, double soft,
                                  double hard, double ts, const AllClasses& all, const SoftTerm& s) {
  TopKSlopes out{};
  out.soft = soft * (p.scale_by_temperature ? ts : 1.0 / ts);
  out.hard = hard;
  out.unit = soft * s.slopes.target_weight;
  out.at_one = out.hard + (renormalized ? 0.0 : out.unit);
  out.shift = out.hard * p.smoothing / static_cast<double>(p.classes);
  if (renormalized) return out;
  out.rest = ratio_or_zero(out.soft * (powers ? -s.q * s.mean_g : s.rest_u), all.rest.sum_s);
  if (powers) out.powers = -out.soft * exp(-(p.first + p.second) * s.lse_s) / p.first;
  return out;
}

// d loss/dx of the label of a decoupled target.
MFD_ROW_FN double decoupled_gradient(const RowProblem& p, const AllClasses& all, const SoftTerm& s,
                                     const TopKSlopes& slopes) {
  return times(slopes.soft, s.slopes.label) - times(slopes.unit, s.target.hard_student.rest) -
         times(slopes.hard, all.hard_odds.rest) + (slopes.hard * p.smoothing - slopes.shift);
}

// Over the listed classes: sum to_u*(x - max), sum to_u, sum q*(x - max), and the same of the teacher.
struct ListedSums {
  double u_x, to_u, q_x, v_y, to_v, p_y;
};

// dD/dTs and dD/dTt: -sum dD/du*x/Ts^2 and the like, less what rounding left of sum dD/du = 0. `factor`: d
// loss/d soft.
MFD_ROW_FN double topk_temperature_gradient(const RowProblem& p, bool renormalized, bool powers,
                                            double factor, double ts, const RestSums& rest, const SoftTerm& s,
                                            const ListedSums& sums) {
  double slope = sums.u_x + times(s.slopes.label, s.label_x), excess = sums.to_u + s.slopes.label;
  double mean_x = sums.q_x;
  if (!renormalized) {
    const double rest_x = rest.sum_s == 0 ? 0.0 : rest.dot_s / rest.sum_s + s.rest_x;
    mean_x += s.q * rest_x;
    excess += s.rest_u;
    if (powers) {
      const double scale = rest_powers(1.0, p.first + p.second, ts, s) / p.first;
      slope += scale * (rest.dot_powers + times(rest.powers, s.rest_x)) - s.mean_g * s.q * rest_x;
    } else {
      slope += s.rest_u * rest_x;
    }
  }
  if (excess != 0) slope -= excess * mean_x;
  const double own = p.scale_by_temperature ? factor * 2.0 * ts * s.value : 0.0;
  return own - factor * (p.scale_by_temperature ? ts * ts : 1.0) * slope / (ts * ts);
}

MFD_ROW_FN double topk_teacher_temperature_gradient(const RowProblem& p, double factor, double ts, double tt,
                                                    const SoftTerm& s, const ListedSums& sums) {
  double slope = sums.v_y - times(s.slopes.rest_shift, s.label_y), excess = sums.to_v - s.slopes.rest_shift;
  double mean_y = sums.p_y;
  if (s.rest != -kInf) {
    slope += s.rest_v * (s.rest - s.max_t);
    excess += s.rest_v;
    mean_y += s.p * (s.rest - s.max_t);
  }
  if (excess != 0) slope -= excess * mean_y;
  return -factor * (p.scale_by_temperature ? ts * ts : 1.0) * slope / (tt * tt);
}

// d loss/dy of the listed values: soft*to_v - target_loss*softmax(y) at temperature 1, `label` for a
// decoupled label, and -rest*exp(y - y_rest): the rest r = log(1 - sum exp(y)) hands its own on, dr/dy_k =
// -exp(y_k - r).
struct ValueFactors {
  double soft, target_loss, lse_u, label, rest;
};

MFD_ROW_FN ValueFactors value_factors(const RowProblem& p, double factor, double ts, double tt,
                                      const SoftTerm& s) {
  const bool unit = p.divergence == Divergence::kNKD;
  ValueFactors f{};
  f.soft = factor * (p.scale_by_temperature ? ts * ts : 1.0) / tt;
  f.target_loss = factor * s.slopes.target_loss;
  f.lse_u = unit ? whole_lse(s.target.hard_teacher, s.label_y, log(s.sum_u)) : 0.0;
  f.label = times(-f.soft, s.slopes.rest_shift) + times(f.target_loss, s.target.hard_teacher.rest);
  if (s.rest != -kInf)
    f.rest = f.soft * s.rest_v - (unit ? f.target_loss * exp(s.rest - s.max_t - f.lse_u) : 0.0);
  return f;
}

}  // namespace mfd
