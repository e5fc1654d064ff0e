// Forward KL, with or without the hard term of labels, of rows of one dtype that nothing transforms: the loss
// and d loss/d student in one launch. Everything else is forward.cuh's.
//   K = sum p*(v - u) - log(sum_t/sum_s),  d loss/dx = slope*(q - p) + hard*(softmax(x) - onehot)
// A warp per row keeps a short row in registers and computes each exponential once; a block or a cluster
// parks a longer one in shared memory. A row with an infinity or a NaN shows in `cross`, and alone takes the
// road of careful_kl.cuh. Equal rows give exactly 0: u = v, sum_s = sum_t, the ratio is 1, fma(e, 1, -e) = 0.
#pragma once

#include "cuda/distill/careful_kl.cuh"
#include "cuda/rows/softmax.cuh"

namespace mfd {
namespace device {

// Shared memory of find_factors and finish_loss, at `states_at`.
constexpr int kScratchBytes = 34 * sizeof(double);

// As find_factors; the loads that count rows are in flight together.
MFD_INLINE Factors find_factors_in_batches(const ForwardLaunch& launch) {
  const RowProblem& p = launch.forward.problem;
  if (!launch.count_rows || launch.counts) return find_factors<float>(launch);
  constexpr int kBatch = 8;
  const int64_t step = blockDim.x;
  int counted = 0;
  for (int64_t row = threadIdx.x; row < p.n_rows; row += kBatch * step) {
    int64_t labels[kBatch];
    bool on[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t at = row + k * step;
      on[k] = at < p.n_rows && (!p.mask || p.mask[at]);
      labels[k] = p.labels && at < p.n_rows ? p.labels[at] : p.ignore_index + 1;
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) counted += on[k] && labels[k] != p.ignore_index;
  }
  double* scratch = reinterpret_cast<double*>(dynamic_shared() + launch.states_at);
  const double total = over_block<Sum>(static_cast<double>(counted), scratch),
               divisor = total < 1 ? 1.0 : total;
  return {value_of<float>(launch.soft_weight) / divisor, value_of<float>(launch.hard_weight) / divisor};
}

// What all rows of a launch share; in shared memory, so that it takes no registers.
template <Dtype kDtype, bool kLabels>
struct KlTerms {
  typedef Softmax<kDtype> S;
  typedef typename S::Total Total;
  typedef Packed<kDtype> Pack;
  static constexpr int kSums = kLabels ? 5 : 3;

  Factors factors;
  S student, teacher, unit;  // unit: the student at temperature 1
  float ts, ratio;           // Ts, Ts/Tt
  int squarings;             // exp(x) is exp(x/Ts) squared so often; -1: Ts is not 1, 2 or 4
  Total soft, hard;          // weights of the two values
  float soft_slope, share, smooth, smoothing;  // share: of the label in its smoothed distribution

  MFD_DEVICE KlTerms(const Forward& f, const Factors& of)
      : factors(of),
        student(at<float>(f.problem.student_temperature, 0)),
        teacher(at<float>(f.problem.teacher_temperature, 0)),
        unit(1.0) {
    const RowProblem& p = f.problem;
    const double t = at<float>(p.student_temperature, 0);
    ts = static_cast<float>(t);
    ratio = static_cast<float>(t / at<float>(p.teacher_temperature, 0));
    squarings = t == 1.0 ? 0 : t == 2.0 ? 1 : t == 4.0 ? 2 : -1;
    soft = static_cast<Total>(factors.soft * (p.scale_by_temperature ? t * t : 1.0));
    soft_slope = static_cast<float>(factors.soft * (p.scale_by_temperature ? t : 1.0 / t));
    hard = static_cast<Total>(factors.hard);
    share = static_cast<float>(label_share(p));
    smoothing = static_cast<float>(p.smoothing);
    smooth = static_cast<float>(p.smoothing / static_cast<double>(p.classes));
  }

  // Computed by one thread of the block, behind the scratch of find_factors and finish_loss.
  static MFD_DEVICE const KlTerms& shared(const ForwardLaunch& launch) {
    const Factors factors = find_factors_in_batches(launch);
    KlTerms* const terms = reinterpret_cast<KlTerms*>(dynamic_shared() + launch.states_at + kScratchBytes);
    if (threadIdx.x == 0) *terms = KlTerms(launch.forward, factors);
    __syncthreads();
    return *terms;
  }
};

// The softened logits of one row, with its maxima.
template <Dtype kDtype, bool kLabels>
struct KlSides {
  typedef KlTerms<kDtype, kLabels> Terms;
  typedef typename Terms::S S;
  typedef typename Terms::Pack Pack;
  static constexpr int kSums = Terms::kSums;
  S student, teacher, unit;
  float ts, ratio;
  int squarings;
  bool smooths;

  MFD_DEVICE KlSides(const Terms& terms, float max_s, float max_t)
      : student(terms.student),
        teacher(terms.teacher),
        unit(terms.unit),
        ts(terms.ts),
        ratio(terms.ratio),
        squarings(terms.squarings),
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
  // Of one logit from the maximum, as hard_exponentials counts them.
  MFD_DEVICE float hard_distance(float x) const {
    if (squarings < 0 || kDtype == Dtype::kFloat32) return unit.distance(x);
    return student.distance(x) * ts;
  }

  // Exponentials e, f of student and teacher, and their part in the sums: s, t, cross and, for the labels, h
  // and x. kEdge: some columns are beyond the row.
  template <bool kEdge>
  MFD_DEVICE void add(const PackedRow<kDtype>& row, int first, const Pack& x, const Pack& y, float (&e)[8],
                      float (&f)[8], float (&sums)[kSums]) const {
    float s = 0, t = 0, cross = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      float u = student.distance(x.value(k)), w = teacher.distance(y.value(k));
      if (kEdge && !row.holds(first + k)) {
        u = student.nothing();
        w = teacher.nothing();
      }
      e[k] = student.exponential(u);
      f[k] = teacher.exponential(w);
      s += e[k];
      t += f[k];
      cross = fmaf(f[k], S::difference(w, u, ratio), cross);
    }
    sums[0] += s;
    sums[1] += t;
    sums[2] += cross;
    if constexpr (kLabels) {
      float h[8], of_h = 0;
      hard_exponentials(e, x, h);
#pragma unroll
      for (int k = 0; k < 8; ++k) of_h += h[k];
      sums[3] += of_h;
      if (smooths) {
#pragma unroll
        for (int k = 0; k < 8; ++k)
          if (!kEdge || row.holds(first + k)) sums[4] += student.distance(x.value(k));
      }
    }
  }
};

// Slopes of a row, and its part of the loss.
template <Dtype kDtype, bool kLabels>
struct KlRow {
  typedef KlTerms<kDtype, kLabels> Terms;
  typedef typename Terms::S S;
  typedef typename Terms::Total Total;
  float quotient, teacher, hard, shift, label_shift;  // gradient = (e*quotient - f)*teacher + h*hard - shift
  int label;
  Total loss;

  MFD_DEVICE KlRow(const Terms& terms, const KlSides<kDtype, kLabels>& sides, const Total (&v)[Terms::kSums],
                   float weight, int of_label, float label_logit, int classes)
      : label(of_label) {
    const Total kl = S::nats(S::divide(v[2], v[1]), terms.ts) - S::log(v[1] / v[0]);
    quotient = static_cast<float>(v[1] / v[0]);
    teacher = static_cast<float>(S::divide(terms.soft_slope * weight, v[1]));
    loss = terms.soft * weight * (kl < 0 ? Total(0) : kl);
    if constexpr (kLabels) {
      const float from_max = sides.hard_distance(label_logit);
      const Total mean = v[4] * (kDtype == Dtype::kFloat32 ? Total(1) : Total(terms.ts)) / Total(classes);
      const Total off = Total(1 - terms.smoothing) * from_max + terms.smoothing * mean;
      loss += terms.hard * weight * (S::log(v[3]) - S::nats(off, 1.0f));
      const float own = static_cast<float>(terms.hard) * weight;
      hard = static_cast<float>(S::divide(own, v[3]));
      shift = own * terms.smooth;
      label_shift = own * terms.share - shift;
    }
  }

  MFD_DEVICE void write(const KlSides<kDtype, kLabels>& sides, const PackedRow<kDtype>& row,
                        unsigned char* at, int first, const Packed<kDtype>& x, const float (&e)[8],
                        const float (&f)[8]) const {
    float g[8];
    // Without labels the shift is 0 and takes no instruction.
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float difference = fmaf(e[k], quotient, -f[k]);
      g[k] = kLabels ? fmaf(difference, teacher, -shift) : difference * teacher;
    }
    if constexpr (kLabels) {
      float h[8];
      sides.hard_exponentials(e, x, h);
#pragma unroll
      for (int k = 0; k < 8; ++k) g[k] = fmaf(h[k], hard, g[k]);
      if (static_cast<unsigned>(label - first) < 8u) {
#pragma unroll
        for (int k = 0; k < 8; ++k)
          if (first + k == label) g[k] = g[k] - label_shift;
      }
    }
    row.store(at, first, g);
  }
};

// Sums of float32 rows are merged in float64.
template <class Group, int K>
MFD_INLINE void merge_sums(const Group& group, const float (&sums)[K], float (&totals)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) totals[k] = sums[k];
  reduce_floats<FloatSum>(group, totals);
}
template <class Group, int K>
MFD_INLINE void merge_sums(const Group& group, const float (&sums)[K], double (&totals)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) totals[k] = sums[k];
  group.template reduce<Sum>(totals);
}

MFD_INLINE bool is_special(double cross) {
  return !(fabs(cross) < kInf);
}

// Columns [first, width) of a gradient row.
template <Dtype kDtype, class Group>
MFD_INLINE void write_zeros(const Group& group, unsigned char* grad, int64_t first, int64_t width) {
  if (!grad || group.part() != 0) return;
  for (int64_t k = first + group.rank(); k < width; k += group.threads())
    store_one<float>(grad + k * Packed<kDtype>::kBytes, kDtype, 0.0f);
}

struct KlLabel {
  int label;  // -1 for none
  bool bad;   // out of range
};
MFD_INLINE KlLabel label_of(const RowProblem& p, bool wanted, int64_t row) {
  if (!wanted) return {-1, false};
  const int64_t label = p.labels[row];
  const bool bad = label < 0 || label >= p.classes;
  return {bad ? 0 : static_cast<int>(label), bad};
}

// Walks over the rows of a group: `of_row(row, packed, label)` gives the row's part of the loss, or NaN for a
// row that has to be done with care.
template <Dtype kDtype, bool kLabels, class Group, class OfRow>
MFD_INLINE void over_rows(const ForwardLaunch& launch, const Group& group,
                          const KlTerms<kDtype, kLabels>& terms, const OfRow& of_row) {
  const Forward& f = launch.forward;
  const RowProblem& p = f.problem;
  const int64_t groups = static_cast<int64_t>(gridDim.x) / group.parts() * group.in_block();
  const int64_t block = static_cast<int64_t>(blockIdx.x) / group.parts();
  double loss = 0;
  for (int64_t row = block * group.in_block() + group.index_in_block(); row < p.n_rows; row += groups) {
    const PackedRow<kDtype> packed(p, f.grad, row);
    const bool counted = is_counted(p, row);
    write_zeros<kDtype>(group, packed.grad, counted ? p.classes : 0, p.student.width);
    if (!counted) continue;
    const KlLabel label = label_of(p, kLabels, row);
    const double special = static_cast<double>(kNan);
    double of = label.bad ? special : of_row(row, packed, label.label);
    if (of != of) of = careful_row<kDtype, Group>(f, terms.factors, row);
    loss += of;
  }
  if (!launch.partial) return;
  double* scratch = reinterpret_cast<double*>(dynamic_shared() + launch.states_at);
  const bool counts = group.rank() == 0 && group.part() == 0;
  __syncthreads();
  loss = over_block<Sum>(counts ? loss : 0.0, scratch);
  if (threadIdx.x == 0 && group.part() == 0) launch.partial[block] = loss;
  finish_loss<float>(launch, static_cast<int64_t>(gridDim.x) / group.parts());
}

// Blocks of 128 threads that share a processor: as many as need no spill on any architecture.
constexpr int kl_blocks(Dtype dtype, bool labels, int vectors) {
  if (vectors == 1) return dtype == Dtype::kFloat32 ? 4 : 5;
  return dtype == Dtype::kFloat32 || (dtype == Dtype::kFloat16 && labels) ? 3 : 4;
}

// A warp per row of at most 32*kVectors vectors.
template <Dtype kDtype, bool kLabels, int kVectors>
__global__ void __launch_bounds__(128, kl_blocks(kDtype, kLabels, kVectors))
    forward_kl_warp(const __grid_constant__ ForwardLaunch launch) {
  typedef KlTerms<kDtype, kLabels> Terms;
  typedef Packed<kDtype> Pack;
  const Warp group(nullptr);
  const Forward& f = launch.forward;
  const Terms& terms = Terms::shared(launch);
  const auto of_row = [&](int64_t index, const PackedRow<kDtype>& row, int label) -> double {
    Pack x[kVectors], y[kVectors];
    Largest<kDtype> top_s, top_t;
    const int begin = row.column(group.rank());
    const int64_t offset = int64_t{begin} * row.kBytes;
    const float label_logit = kLabels ? load_one<float>(row.student + label * row.kBytes, kDtype) : 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      x[v] = row.load(row.student + offset + 256 * v * row.kBytes, begin + 256 * v);
      y[v] = row.load(row.teacher + offset + 256 * v * row.kBytes, begin + 256 * v);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      top_s.take(x[v]);
      top_t.take(y[v]);
    }
    float maxima[2] = {top_s.value(), top_t.value()};
    reduce_floats<FloatMax>(group, maxima);
    const KlSides<kDtype, kLabels> sides(terms, maxima[0], maxima[1]);

    float e[kVectors][8], t[kVectors][8], sums[Terms::kSums] = {};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int first = begin + 256 * v;
      if (row.is_whole(first)) {
        sides.template add<false>(row, first, x[v], y[v], e[v], t[v], sums);
      } else if (first < row.classes) {
        sides.template add<true>(row, first, x[v], y[v], e[v], t[v], sums);
      } else {
#pragma unroll
        for (int k = 0; k < 8; ++k) e[v][k] = t[v][k] = 0;
      }
    }
    typename Terms::Total totals[Terms::kSums];
    merge_sums(group, sums, totals);
    if (is_special(totals[2])) return kNan;

    const KlRow<kDtype, kLabels> of(terms, sides, totals, static_cast<float>(at<float>(f.weight, index)),
                                    label, label_logit, row.classes);
    if (!row.grad) return of.loss;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int first = begin + 256 * v;
      if (first < row.classes)
        of.write(sides, row, row.grad + offset + 256 * v * row.kBytes, first, x[v], e[v], t[v]);
    }
    return of.loss;
  };
  over_rows<kDtype, kLabels>(launch, group, terms, of_row);
}

// A block or a cluster per row; each thread reads back only what it has parked itself.
template <Dtype kDtype, bool kLabels>
__global__ void __launch_bounds__(256, 2) forward_kl_block(const __grid_constant__ ForwardLaunch launch) {
  typedef KlTerms<kDtype, kLabels> Terms;
  typedef Packed<kDtype> Pack;
  constexpr int kPack = sizeof(Pack);
  unsigned char* const shared = dynamic_shared();
  const Blocks group(reinterpret_cast<Blocks::Shared*>(shared));
  const Forward& f = launch.forward;
  const Terms& terms = Terms::shared(launch);
  const auto of_row = [&](int64_t index, const PackedRow<kDtype>& row, int label) -> double {
    const int all = row.vectors(),
              each = (all + static_cast<int>(group.parts()) - 1) / static_cast<int>(group.parts());
    const int from = each * static_cast<int>(group.part()), count = each < all - from ? each : all - from;
    unsigned char *const xs = shared + launch.parking_at, *const ys = xs + launch.teacher_at;
    const float label_logit = kLabels ? load_one<float>(row.student + label * row.kBytes, kDtype) : 0.0f;
    // Act on the vectors of this thread.
    const auto over_own = [&](const auto& act) {
      for (int v = group.rank(); v < count; v += group.threads()) act(v * kPack, row.column(from + v));
    };
    over_own([&](int place, int first) {
      if (row.is_whole(first)) {
#pragma unroll
        for (int k = 0; k < kPack; k += 16) {
          copy_16_bytes(xs + place + k, row.student + first * row.kBytes + k);
          copy_16_bytes(ys + place + k, row.teacher + first * row.kBytes + k);
        }
      } else {
        row.load_edge(row.student + first * row.kBytes, first).store(xs + place);
        row.load_edge(row.teacher + first * row.kBytes, first).store(ys + place);
      }
    });
    await_copies();
    Largest<kDtype> top_s, top_t;
    over_own([&](int place, int) {
      top_s.take(Pack::load(xs + place));
      top_t.take(Pack::load(ys + place));
    });
    float maxima[2] = {top_s.value(), top_t.value()};
    reduce_floats<FloatMax>(group, maxima);
    const KlSides<kDtype, kLabels> sides(terms, maxima[0], maxima[1]);

    float sums[Terms::kSums] = {};
    over_own([&](int place, int first) {
      const Pack x = Pack::load(xs + place), y = Pack::load(ys + place);
      float e[8], t[8];
      if (row.is_whole(first)) {
        sides.template add<false>(row, first, x, y, e, t, sums);
      } else {
        sides.template add<true>(row, first, x, y, e, t, sums);
      }
    });
    typename Terms::Total totals[Terms::kSums];
    merge_sums(group, sums, totals);
    if (is_special(totals[2])) return kNan;

    const KlRow<kDtype, kLabels> of(terms, sides, totals, static_cast<float>(at<float>(f.weight, index)),
                                    label, label_logit, row.classes);
    if (!row.grad) return of.loss;
    over_own([&](int place, int first) {
      const Pack x = Pack::load(xs + place), y = Pack::load(ys + place);
      float e[8], t[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        e[k] = sides.student.exponential(sides.student.distance(x.value(k)));
        t[k] = sides.teacher.exponential(sides.teacher.distance(y.value(k)));
      }
      of.write(sides, row, row.grad + int64_t{first} * row.kBytes, first, x, e, t);
    });
    return of.loss;
  };
  over_rows<kDtype, kLabels>(launch, group, terms, of_row);
  group.leave();
}

}  // namespace device
}  // namespace mfd
