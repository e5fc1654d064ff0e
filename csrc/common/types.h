// Plain data that crosses between bindings, dispatch and kernels. All strides are in elements.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mfd {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Columns of a saved-statistics row; the layout is common to all backends.
constexpr int kStats = 8;
enum Stat : int {
  kStudentMax = 0,  // max x
  kStudentLse = 1,  // log sum exp((x - max x)/Ts)
  kTeacherMax = 2,  // max y
  kTeacherLse = 3,  // log sum exp((y - max y)/Tt)
  kHardLse = 4,     // log sum exp(x - max x)
  kDivergence = 5,  // K = KL(p || q)
  // What rounding to the compute dtype took from the two lse; 0 from backends that do not keep it.
  kStudentLseLow = 6,
  kTeacherLseLow = 7,
};

// Logits [N, width]: row i starts at element (i / inner)*outer_stride + (i % inner)*row_stride.
// Values are scale*x, then softcap*tanh(x/softcap) where softcap > 0.
struct Side {
  const void* data;
  Dtype dtype;
  int64_t inner, outer_stride, row_stride;
  int64_t width;
  double scale, softcap;
};

// One value per row (compute dtype), or one for all where `rows` is null.
struct PerRow {
  const void* rows;
  int64_t stride;
  double value;
};

struct Problem {
  int64_t n_rows, classes;
  bool is_double;  // arithmetic in float64, else float32
  Side student, teacher;
  PerRow student_temperature, teacher_temperature;
  const int64_t* labels;      // [N] or null
  const unsigned char* mask;  // [N] or null
  int64_t ignore_index;
  double smoothing;
  bool scale_by_temperature;
};

struct Forward {
  Problem problem;
  bool use_soft, use_hard;
  PerRow weight;
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
  Problem problem;
  const void* stats;
  PerRow grad_soft, grad_hard;
  void *d_student, *d_teacher;                  // logits' dtypes, contiguous; null when not wanted
  void *d_temperature, *d_teacher_temperature;  // [N]; null when not wanted
  bool stream;
};

// Elements of a row that share one reference value; partial sums are merged in double precision.
constexpr int64_t kBlock = 1024;
// Short rows share a scratch row at multiples of this many elements: one widest vector.
constexpr int64_t kRowAlign = 16;

// Sums over one block, relative to the block's own maxima mx, my (s = student, t = teacher, h = student at T
// = 1).
struct BlockSums {
  double max_s, max_t;
  double sum_s, sum_t, sum_h;
  double cross;         // sum e_t*(ratio*(y - my) - (x - mx)), ratio = Ts/Tt
  double dot_s, dot_t;  // sum e_s*(x - mx), sum e_t*(y - my): for the entropies
  double sum_x;         // sum (x - mx)
};

// Memory of one worker; sized for one row.
struct Scratch {
  void *exp_s, *exp_t, *exp_h, *capped;  // padded rows of the compute dtype; exp_h and capped may be null
  void *block_x, *block_y, *block_out;   // kBlock elements each
  BlockSums* sums;                       // one per block, at least kBlock/kRowAlign
};

struct FusionKernels;  // common/fusion.h

// One instruction set's kernels. Rows and blocks not covered by [begin, end) are left alone.
struct Kernels {
  const char* name;
  int lanes;
  void (*forward_rows)(const Forward&, int64_t begin, int64_t end, const Scratch&);
  // The same for one row whose blocks are shared between workers: sums, then (after a barrier) outputs.
  void (*forward_sums)(const Forward&, int64_t row, int64_t begin, int64_t end, const Scratch&);
  void (*forward_outputs)(const Forward&, int64_t row, int64_t begin, int64_t end, const Scratch&);
  void (*backward_rows)(const Backward&, int64_t begin, int64_t end, const Scratch&);
  void (*add)(const float* a, const float* b, float* out, int64_t n);  // a streaming ceiling for benchmarks
  const FusionKernels* fusion;
};

}  // namespace mfd
