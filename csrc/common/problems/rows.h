// Plain data that crosses between bindings, dispatch and kernels. All strides are in elements.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mfd {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Divergences of teacher p and student q; the numbers are those of Python. DKD and NKD decouple the label's
// class: their maxima and sums run over the other classes. kCrossEntropy is -sum p*log q.
enum class Divergence : int {
  kForwardKL = 0,
  kReverseKL = 1,
  kJSD = 2,            // beta
  kSkewKL = 3,         // lam
  kSkewReverseKL = 4,  // lam
  kTVD = 5,
  kAlphaBeta = 6,  // alpha, beta
  kDKD = 7,        // alpha, beta
  kNKD = 8,        // gamma
  kCrossEntropy = 9,
};

// Columns of a saved-statistics row; the layout is common to all backends. Maxima and sums leave out the
// label's class where the divergence decouples it.
constexpr int kStats = 11;
enum Stat : int {
  kStudentMax = 0,  // max x
  kStudentLse = 1,  // log sum exp((x - max x)/Ts)
  kTeacherMax = 2,  // max y
  kTeacherLse = 3,  // log sum exp((y - max y)/Tt)
  kHardLse = 4,     // log sum exp(x - max x)
  kDivergence = 5,  // what the factor T^2 multiplies
  // What rounding to the compute dtype took from the two lse; 0 from backends that do not keep it.
  kStudentLseLow = 6,
  kTeacherLseLow = 7,
  // E_q[df/dq] and E_p[df/dp] of the pointwise divergences, with df/dq and df/dp shifted to 0 at p = q.
  // kTeacherMean is E_p[r] for DKD, the cross-entropy -E_p[log q] for NKD.
  kStudentMean = 8,
  kTeacherMean = 9,
  kTeacherHardLse = 10,  // log sum exp(y - max y) of NKD
  kFar = 10,             // of the skew divergences: 1 where df/dq or df/dp goes without its shift
};

// Logits [N, width]: row i starts at element (i / inner)*outer_stride + (i % inner)*row_stride.
// Values are scale*x, then softcap*tanh(x/softcap) where softcap > 0, then (x - mean)/(deviation + 1e-7)
// where standardize.
struct Side {
  const void* data;
  Dtype dtype;
  int64_t inner, outer_stride, row_stride;
  int64_t width;
  double scale, softcap;
  bool standardize;
};

// One value per row (compute dtype), or one for all where `rows` is null.
struct RowScalar {
  const void* rows;
  int64_t stride;
  double value;
};

// Several teachers of one transform; the teacher is the weighted mean of their softened probabilities.
struct Mixture {
  const Side* teachers;
  int64_t count;
  const void* weights;  // [count] or [N, count] in the compute dtype, summing to 1; null for equal ones
  int64_t row_stride;   // 0 where all rows share the weights
};

struct RowProblem {
  int64_t n_rows, classes;
  bool is_double;  // arithmetic in float64, else float32
  Side student, teacher;
  RowScalar student_temperature, teacher_temperature;
  const int64_t* labels;      // [N] or null
  const unsigned char* mask;  // [N] or null
  int64_t ignore_index;
  bool keeps_ignored;  // a row whose label is ignored counts, without its hard term
  double smoothing;
  bool scale_by_temperature;
  Divergence divergence;
  double first, second;    // its parameters
  const Mixture* mixture;  // null for one teacher; `teacher` is the first
};

struct Forward {
  RowProblem problem;
  bool use_soft, use_hard;
  RowScalar weight;
  double soft_factor, hard_factor;  // weights of the two terms, already divided by the normalizer
  void* grad;                       // [N, student.width], student's dtype; null when not wanted
  double* row_loss;                 // [N] weighted losses; null when not wanted
  // Per-row outputs in the compute dtype; null when not wanted.
  void *soft, *hard, *stats;
  void *student_entropy, *teacher_entropy, *student_label_prob, *teacher_label_prob;
  unsigned char* agreement;
  bool stream;  // write the gradient past the caches
};

struct Backward {
  RowProblem problem;
  const void* stats;
  RowScalar grad_soft, grad_hard;
  void *d_student, *d_teacher;                  // logits' dtypes, contiguous; null when not wanted
  void *d_temperature, *d_teacher_temperature;  // [N]; null when not wanted
  bool stream;
  // Of several teachers, in place of d_teacher; each entry, and both, may be null.
  void* const* d_teachers;
  void* d_weights;  // [N, count], up to a constant per row
};

// What becomes of the classes that a sparse teacher does not list; the numbers are those of Python.
enum class Tail : int { kBucket = 0, kRenormalize = 1, kZero = 2 };

// A teacher of which `listed` classes per row are known, at most kBlock; RowProblem::teacher holds their
// values [N, listed].
struct TopK {
  const int64_t* indices;  // [N, listed]
  int64_t listed;
  Tail tail;
  bool logprobs;  // the values are log-probabilities, else logits
};

// Values and gradients of rows with a sparse teacher, always from the logits: no statistics are kept.
struct TopKPass {
  Forward forward;  // grad is d loss/d student
  TopK teacher;
  RowScalar grad_soft, grad_hard;               // further factors of the two terms' gradients
  void* d_values;                               // [N, listed], the values' dtype; null when not wanted
  void *d_temperature, *d_teacher_temperature;  // [N]; null when not wanted
};

// Elements of a row that share one reference value; partial sums are merged in double precision.
constexpr int64_t kBlock = 1024;
// Short rows share a scratch row at multiples of this many elements: one widest vector.
constexpr int64_t kRowAlign = 16;

// Mean and 1/(deviation + 1e-7) of a standardised row. The compute type rounds the mean: see drift.
struct Centre {
  double mean, inverse;
  double fold;  // (deviation + 1e-7)/(deviation*(classes - 1)); 0 in a constant row
};

// Sums over one block, relative to the block's own maxima mx, my (s = student, t = teacher, h = student and u
// = teacher at T = 1).
struct BlockSums {
  double max_s, max_t;
  double sum_s, sum_t, sum_h, sum_u;
  double cross;             // sum e_t*(ratio*(y - my) - (x - mx)), ratio = Ts/Tt; 0 for cross-entropies
  double dot_s, dot_t;      // sum e_s*(x - mx), sum e_t*(y - my): for the entropies
  double sum_x;             // sum (x - mx)
  double value, g, h;       // sum f, sum q*df/dq, sum p*df/dp of the pointwise divergences
  Centre student, teacher;  // of the whole row, in its first block
};

// One row of one of several teachers.
struct TeacherRow {
  double max, lse;  // of the softened logits, as Stat has them
  double weight;
  double unit_max, unit_lse, unit_label, unit_rest;  // for NKD: max over the others, log-sum-exp of all, and
                                                     // the label's probability at T = 1 and what it leaves
  Centre centre;
  double share, dot;  // backward: dD/dw, and sum gradient*y of a standardised row
};

}  // namespace mfd
