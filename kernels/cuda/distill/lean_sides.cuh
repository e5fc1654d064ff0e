// What the rows of a launch of the lean kernels share, and the softened logits of one row.
#pragma once

#include "cuda/distill/launch.cuh"
#include "cuda/rows/softmax.cuh"

namespace mfd {
namespace device {

// Shared memory of find_factors and finish_loss, at `states_at`.
constexpr int kScratchBytes = 34 * sizeof(double);

// What one pass over a row sums up: kStudent, kTeacher; kCross, E_p[v - u], E_q[u - v] or (NKD) E_p[-u];
// kHard and, with labels, kShifted; kUnit, the teacher's exponentials at temperature 1.
template <Divergence kDivergence, bool kLabels>
struct LeanSums {
  static constexpr bool kOfStudent = kDivergence == Divergence::kReverseKL;
  static constexpr bool kCrossEntropy = kDivergence == Divergence::kNKD;
  // Skew KL asks it whether p is far from q.
  static constexpr bool kOfTeacher = kDivergence == Divergence::kForwardKL ||
                                     kDivergence == Divergence::kSkewKL || kDivergence == Divergence::kDKD;
  static constexpr bool kHasCross = kOfStudent || kOfTeacher || kCrossEntropy;
  static constexpr bool kAtOne = kLabels || kCrossEntropy;
  static constexpr int kStudent = 0, kTeacher = 1, kCross = 2, kHard = kHasCross ? 3 : 2,
                       kShifted = kHard + 1, kUnit = kHard + (kLabels ? 2 : 1);
  static constexpr int kCount = kHard + (kAtOne ? 1 : 0) + (kLabels ? 1 : 0) + (kCrossEntropy ? 1 : 0);
};

// In shared memory, so that it takes no registers.
template <Dtype kDtype, bool kLabels>
struct LeanTerms {
  typedef Softmax<kDtype> S;
  typedef typename S::Total Total;

  Factors factors;
  S student, teacher, unit;  // unit: the student at temperature 1
  float ts, ratio;           // Ts, Ts/Tt
  int squarings;             // exp(x) is exp(x/Ts) squared so often; -1: Ts is not 1, 2 or 4
  int teacher_squarings;
  Total soft, hard;                            // weights of the two values
  float soft_slope, share, smooth, smoothing;  // share: of the label in its smoothed distribution
  float teacher_share;                         // of the teacher in a mean of p and q

  MFD_DEVICE LeanTerms(const Forward& f, const Factors& of)
      : factors(of),
        student(at<float>(f.problem.student_temperature, 0)),
        teacher(at<float>(f.problem.teacher_temperature, 0)),
        unit(1.0) {
    const RowProblem& p = f.problem;
    const double t = at<float>(p.student_temperature, 0);
    ts = static_cast<float>(t);
    ratio = static_cast<float>(t / at<float>(p.teacher_temperature, 0));
    squarings = squarings_of(t);
    teacher_squarings = squarings_of(at<float>(p.teacher_temperature, 0));
    soft = static_cast<Total>(factors.soft * (p.scale_by_temperature ? t * t : 1.0));
    soft_slope = static_cast<float>(factors.soft * (p.scale_by_temperature ? t : 1.0 / t));
    hard = static_cast<Total>(factors.hard);
    share = static_cast<float>(label_share(p));
    smoothing = static_cast<float>(p.smoothing);
    smooth = static_cast<float>(p.smoothing / static_cast<double>(p.classes));
    teacher_share = static_cast<float>(p.divergence == Divergence::kSkewReverseKL ? 1 - p.first : p.first);
  }

  static MFD_DEVICE int squarings_of(double t) { return t == 1.0 ? 0 : t == 2.0 ? 1 : t == 4.0 ? 2 : -1; }

  // Computed by one thread of the block, behind the scratch of find_factors and finish_loss.
  static MFD_DEVICE const LeanTerms& shared(const ForwardLaunch& launch) {
    const Factors factors = find_factors<float>(launch);
    LeanTerms* const terms =
        reinterpret_cast<LeanTerms*>(dynamic_shared() + launch.states_at + kScratchBytes);
    if (threadIdx.x == 0) *terms = LeanTerms(launch.forward, factors);
    __syncthreads();
    return *terms;
  }
};

// The softened logits of one row, with its maxima.
template <Dtype kDtype, Divergence kDivergence, bool kLabels>
struct LeanSides {
  typedef LeanTerms<kDtype, kLabels> Terms;
  typedef LeanSums<kDivergence, kLabels> Sums;
  typedef typename Terms::S S;
  typedef Packed<kDtype> Pack;
  static constexpr bool kDecouples = decouples_target(kDivergence);
  typedef PackedRow<kDtype, kDecouples> Row;
  S student, teacher, unit;
  float ts, ratio;
  int squarings, teacher_squarings;
  float max_t;
  bool smooths;

  MFD_DEVICE LeanSides(const Terms& terms, float max_s, float of_teacher)
      : student(terms.student),
        teacher(terms.teacher),
        unit(terms.unit),
        ts(terms.ts),
        ratio(terms.ratio),
        squarings(terms.squarings),
        teacher_squarings(terms.teacher_squarings),
        max_t(of_teacher),
        smooths(terms.smoothing != 0.0f) {
    student.set_max(max_s);
    teacher.set_max(max_t);
    unit.set_max(max_s);
  }

  // Exponentials at temperature 1 of eight columns, of which `e` has those at Ts.
  MFD_DEVICE void hard_exponentials(const float (&e)[8], const Pack& x, float (&h)[8]) const {
    if (squarings == 1) {
#pragma unroll
      for (int k = 0; k < 8; ++k) h[k] = e[k] * e[k];
    } else if (squarings < 0) {
#pragma unroll
      for (int k = 0; k < 8; ++k) h[k] = unit.exponential(unit.distance(x.value(k)));
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k) h[k] = squarings == 0 ? e[k] : (e[k] * e[k]) * (e[k] * e[k]);
    }
  }
  // The same of the teacher.
  MFD_DEVICE void unit_exponentials(const float (&f)[8], const Pack& y, float (&h)[8]) const {
    S at_one = unit;
    at_one.set_max(max_t);
#pragma unroll
    for (int k = 0; k < 8; ++k)
      h[k] = teacher_squarings == 1   ? f[k] * f[k]
             : teacher_squarings == 0 ? f[k]
             : teacher_squarings == 2 ? (f[k] * f[k]) * (f[k] * f[k])
                                      : at_one.exponential(at_one.distance(y.value(k)));
  }
  // Of one logit from the maximum, as hard_exponentials counts them.
  MFD_DEVICE float hard_distance(float x) const {
    if (squarings < 0 || kDtype == Dtype::kFloat32) return unit.distance(x);
    return student.distance(x) * ts;
  }

  // Distances u and w of column `k`; kEdge: it may not count.
  template <bool kEdge>
  MFD_DEVICE void distances(const Row& row, int first, const Pack& x, const Pack& y, int k, float& u,
                            float& w) const {
    u = student.distance(x.value(k));
    w = teacher.distance(y.value(k));
    if (kEdge && !row.counts(first + k)) {
      u = student.nothing();
      w = teacher.nothing();
    }
  }

  // Exponentials e, f of student and teacher, and their part in the sums. kEdge: some columns do not count.
  template <bool kEdge>
  MFD_DEVICE void add(const Row& row, int first, const Pack& x, const Pack& y, float (&e)[8], float (&f)[8],
                      float (&sums)[Sums::kCount]) const {
    // An infinity or a NaN among float32 logits shows in the distances alone.
    constexpr bool kShows = kDivergence == Divergence::kTVD && kDtype == Dtype::kFloat32;
    float s = 0, t = 0, cross = 0, shown = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      float u, w;
      distances<kEdge>(row, first, x, y, k, u, w);
      e[k] = student.exponential(u);
      f[k] = teacher.exponential(w);
      s += e[k];
      t += f[k];
      if constexpr (kShows) shown += u + w;
      if constexpr (Sums::kOfTeacher) cross = fmaf(f[k], S::difference(w, u, ratio), cross);
      if constexpr (Sums::kOfStudent) cross = fmaf(e[k], -S::difference(w, u, ratio), cross);
      if constexpr (Sums::kCrossEntropy) cross = fmaf(f[k], -u, cross);
    }
    sums[Sums::kStudent] += kShows ? fmaf(shown, 0.0f, s) : s;
    sums[Sums::kTeacher] += t;
    if constexpr (Sums::kHasCross) sums[Sums::kCross] += cross;
    if constexpr (Sums::kAtOne) {
      float h[8];
      hard_exponentials(e, x, h);
      sums[Sums::kHard] += sum_of_counted<kEdge>(row, first, h);
    }
    if constexpr (Sums::kCrossEntropy) {
      float h[8];
      unit_exponentials(f, y, h);
      sums[Sums::kUnit] += sum_of_counted<kEdge>(row, first, h);
    }
    if constexpr (kLabels) {
      if (smooths) {
#pragma unroll
        for (int k = 0; k < 8; ++k)
          if (!kEdge || row.counts(first + k)) sums[Sums::kShifted] += student.distance(x.value(k));
      }
    }
  }

  // Exponentials of columns beyond the row are 0 already.
  template <bool kEdge>
  MFD_DEVICE float sum_of_counted(const Row& row, int first, const float (&h)[8]) const {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) sum += kEdge && kDecouples && !row.counts(first + k) ? 0.0f : h[k];
    return sum;
  }
};

}  // namespace device
}  // namespace mfd
