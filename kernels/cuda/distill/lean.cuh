// Row losses of one divergence, with or without the hard term of labels, of rows of one dtype that nothing
// transforms: the loss and d loss/d student in one launch. Everything else is forward.cuh's.
//   d loss/dx = slope of the divergence + hard*(softmax(x) - onehot)
// A warp per row keeps a short row in registers and computes each exponential once; a block or a cluster
// parks a longer one in shared memory. A row with an infinity or a NaN shows in the value, and alone takes
// the road of careful_row.cuh.
#pragma once

#include "cuda/distill/careful_row.cuh"
#include "cuda/distill/lean_target.cuh"

namespace mfd {
namespace device {

// Slopes of a row's hard term and of a decoupled label, and their part of the loss.
template <Dtype kDtype, Divergence kDivergence, bool kLabels>
struct LeanRow {
  typedef LeanTerms<kDtype, kLabels> Terms;
  typedef LeanSides<kDtype, kDivergence, kLabels> Sides;
  typedef LeanSums<kDivergence, kLabels> Sums;
  typedef typename Terms::S S;
  typedef typename Terms::Total Total;
  float hard = 0, shift = 0, label_shift = 0;  // gradient = slope + h*hard - shift
  int label;
  Total loss = 0;

  // A decoupled label has no other gradient than -label_shift.
  MFD_DEVICE LeanRow(const TargetState& state, int of_label)
      : hard(static_cast<float>(state.slopes.hard)),
        shift(static_cast<float>(state.slopes.shift)),
        label_shift(static_cast<float>(state.slopes.label_shift)),
        label(of_label),
        loss(static_cast<Total>(state.loss)) {}

  MFD_DEVICE LeanRow(const Terms& terms, const Sides& sides, const Total (&v)[Sums::kCount], float weight,
                     int of_label, float label_logit, int classes)
      : label(of_label) {
    if constexpr (kLabels) {
      const float from_max = sides.hard_distance(label_logit);
      const Total mean =
          v[Sums::kShifted] * (kDtype == Dtype::kFloat32 ? Total(1) : Total(terms.ts)) / Total(classes);
      const Total off = Total(1 - terms.smoothing) * from_max + terms.smoothing * mean;
      loss = terms.hard * weight * (S::log(v[Sums::kHard]) - S::nats(off, 1.0f));
      const float own = static_cast<float>(terms.hard) * weight;
      hard = static_cast<float>(S::divide(own, v[Sums::kHard]));
      shift = own * terms.smooth;
      label_shift = own * terms.share - shift;
    }
  }

  // `e`: exponentials of the student; `g`: the slope of the divergence less `shift`.
  MFD_DEVICE void write(const Sides& sides, const typename Sides::Row& row, unsigned char* at, int first,
                        const Packed<kDtype>& x, const float (&e)[8], float (&g)[8]) const {
    if constexpr (Sums::kAtOne) {
      float h[8];
      sides.hard_exponentials(e, x, h);
#pragma unroll
      for (int k = 0; k < 8; ++k) g[k] = fmaf(h[k], hard, g[k]);
    }
    if constexpr (kLabels || Sides::kDecouples) {
      if (static_cast<unsigned>(label - first) < 8u) {
#pragma unroll
        for (int k = 0; k < 8; ++k)
          if (first + k == label) g[k] = (Sides::kDecouples ? 0.0f : g[k]) - label_shift;
      }
    }
    row.store(at, first, g);
  }
};

template <Dtype kDtype, Divergence kDivergence, bool kLabels>
MFD_INLINE LeanRow<kDtype, kDivergence, kLabels> lean_row(
    const LeanTerms<kDtype, kLabels>& terms, const LeanSides<kDtype, kDivergence, kLabels>& sides,
    const typename LeanTerms<kDtype, kLabels>::Total (&v)[LeanSums<kDivergence, kLabels>::kCount],
    float weight, int label, float label_logit, int classes, const TargetState& state) {
  if constexpr (decouples_target(kDivergence)) {
    return {state, label};
  } else {
    return {terms, sides, v, weight, label, label_logit, classes};
  }
}

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

struct LeanLabel {
  int label;  // -1 for none
  bool bad;   // out of range
};
MFD_INLINE LeanLabel label_of(const RowProblem& p, bool wanted, int64_t row) {
  if (!wanted) return {-1, false};
  const int64_t label = p.labels[row];
  const bool bad = label < 0 || label >= p.classes;
  return {bad ? 0 : static_cast<int>(label), bad};
}

// Walks over the rows of a group: `of_row(row, packed, label)` gives the row's part of the loss, or NaN for a
// row that has to be done with care.
template <Dtype kDtype, Divergence kDivergence, bool kLabels, class Group, class OfRow>
MFD_INLINE void over_rows(const ForwardLaunch& launch, const Group& group,
                          const LeanTerms<kDtype, kLabels>& terms, const OfRow& of_row) {
  const Forward& f = launch.forward;
  const RowProblem& p = f.problem;
  const int64_t groups = static_cast<int64_t>(gridDim.x) / group.parts() * group.in_block();
  const int64_t block = static_cast<int64_t>(blockIdx.x) / group.parts();
  double loss = 0;
  typedef LeanSides<kDtype, kDivergence, kLabels> Sides;
  for (int64_t row = block * group.in_block() + group.index_in_block(); row < p.n_rows; row += groups) {
    typename Sides::Row packed(p, f.grad, row);
    const bool counted = is_counted(p, row);
    write_zeros<kDtype>(group, packed.grad, counted ? p.classes : 0, p.student.width);
    if (!counted) continue;
    const LeanLabel label = label_of(p, kLabels || Sides::kDecouples, row);
    packed.excluded = label.label;
    const double special = static_cast<double>(kNan);
    double of = label.bad ? special : of_row(row, packed, label.label);
    if (of != of) of = careful_row<kDtype, kDivergence, Group>(f, terms.factors, row);
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
constexpr int warp_blocks(Dtype dtype, Divergence divergence, bool labels, int vectors) {
  if (decouples_target(divergence)) return 2;
  if (divergence != Divergence::kForwardKL) return dtype == Dtype::kFloat32 ? 2 : 3;
  if (vectors == 1) return dtype == Dtype::kFloat32 ? 4 : 5;
  return dtype == Dtype::kFloat32 || (dtype == Dtype::kFloat16 && labels) ? 3 : 4;
}

// A warp per row of at most 32*kVectors vectors.
template <Dtype kDtype, Divergence kDivergence, bool kLabels, int kVectors>
__global__ void __launch_bounds__(128, warp_blocks(kDtype, kDivergence, kLabels, kVectors))
    lean_warp(const __grid_constant__ ForwardLaunch launch) {
  typedef LeanTerms<kDtype, kLabels> Terms;
  typedef LeanSides<kDtype, kDivergence, kLabels> Sides;
  typedef LeanSums<kDivergence, kLabels> Sums;
  typedef LeanDivergence<kDtype, kDivergence, kLabels> Soft;
  typedef Packed<kDtype> Pack;
  constexpr bool kReadsLabel = kLabels || Sides::kDecouples;
  const Warp group(nullptr);
  const Forward& f = launch.forward;
  const Terms& terms = Terms::shared(launch);
  const auto of_row = [&](int64_t index, const typename Sides::Row& row, int label) -> double {
    Pack x[kVectors], y[kVectors];
    Largest<kDtype> top_s, top_t;
    const int begin = row.column(group.rank());
    const int64_t offset = int64_t{begin} * row.kBytes;
    const float label_logit = kReadsLabel ? row.value(row.student, label) : 0.0f;
    const float label_target = Sides::kDecouples ? row.value(row.teacher, label) : 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      x[v] = row.load(row.student + offset + 256 * v * row.kBytes, begin + 256 * v);
      y[v] = row.load(row.teacher + offset + 256 * v * row.kBytes, begin + 256 * v);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      top_s.take(row.without_excluded(x[v], begin + 256 * v));
      top_t.take(row.without_excluded(y[v], begin + 256 * v));
    }
    float maxima[2] = {top_s.value(), top_t.value()};
    reduce_floats<FloatMax>(group, maxima);
    const Sides sides(terms, maxima[0], maxima[1]);

    float e[kVectors][8], t[kVectors][8], sums[Sums::kCount] = {};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int first = begin + 256 * v;
      if (row.all_count(first)) {
        sides.template add<false>(row, first, x[v], y[v], e[v], t[v], sums);
      } else if (first < row.classes) {
        sides.template add<true>(row, first, x[v], y[v], e[v], t[v], sums);
      } else {
#pragma unroll
        for (int k = 0; k < 8; ++k) e[v][k] = t[v][k] = 0;
      }
    }
    typename Terms::Total totals[Sums::kCount];
    merge_sums(group, sums, totals);
    const float weight = static_cast<float>(at<float>(f.weight, index));
    Soft soft(terms, sides, totals, weight);
    TargetState& state = target_state<Terms>(launch, group);
    if constexpr (Sides::kDecouples)
      soft.settle_row(group, f, terms, index, totals, double{label_logit} - double{maxima[0]},
                      double{label_target} - double{maxima[1]}, state);
    if constexpr (Soft::kPoints > 0) {
      float points[Soft::kPoints] = {};
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int first = begin + 256 * v;
        if (row.is_whole(first)) {
          soft.template points<false>(sides, row, first, x[v], y[v], e[v], t[v], points);
        } else if (first < row.classes) {
          soft.template points<true>(sides, row, first, x[v], y[v], e[v], t[v], points);
        }
      }
      typename Terms::Total point_totals[Soft::kPoints];
      merge_sums(group, points, point_totals);
      soft.settle(terms, point_totals, weight);
    }
    if (is_special(soft.value)) return kNan;

    const auto of = lean_row(terms, sides, totals, weight, label, label_logit, row.classes, state);
    const double loss = of.loss + terms.soft * weight * (soft.value < 0 ? 0 : soft.value);
    if (!row.grad) return loss;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int first = begin + 256 * v;
      if (first >= row.classes) continue;
      float g[8];
      soft.slope(sides, x[v], y[v], e[v], t[v], of.shift, g);
      of.write(sides, row, row.grad + offset + 256 * v * row.kBytes, first, x[v], e[v], g);
    }
    return loss;
  };
  over_rows<kDtype, kDivergence, kLabels>(launch, group, terms, of_row);
}

// A block or a cluster per row; each thread reads back only what it has parked itself.
template <Dtype kDtype, Divergence kDivergence, bool kLabels>
__global__ void __launch_bounds__(256, 2) lean_block(const __grid_constant__ ForwardLaunch launch) {
  typedef LeanTerms<kDtype, kLabels> Terms;
  typedef LeanSides<kDtype, kDivergence, kLabels> Sides;
  typedef LeanSums<kDivergence, kLabels> Sums;
  typedef LeanDivergence<kDtype, kDivergence, kLabels> Soft;
  typedef Packed<kDtype> Pack;
  constexpr int kPack = sizeof(Pack);
  constexpr bool kReadsLabel = kLabels || Sides::kDecouples;
  unsigned char* const shared = dynamic_shared();
  const Blocks group(reinterpret_cast<Blocks::Shared*>(shared));
  const Forward& f = launch.forward;
  const Terms& terms = Terms::shared(launch);
  const auto of_row = [&](int64_t index, const typename Sides::Row& row, int label) -> double {
    const int all = row.vectors(),
              each = (all + static_cast<int>(group.parts()) - 1) / static_cast<int>(group.parts());
    const int from = each * static_cast<int>(group.part()), count = each < all - from ? each : all - from;
    unsigned char *const xs = shared + launch.parking_at, *const ys = xs + launch.teacher_at;
    const float label_logit = kReadsLabel ? row.value(row.student, label) : 0.0f;
    const float label_target = Sides::kDecouples ? row.value(row.teacher, label) : 0.0f;
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
    over_own([&](int place, int first) {
      top_s.take(row.without_excluded(Pack::load(xs + place), first));
      top_t.take(row.without_excluded(Pack::load(ys + place), first));
    });
    float maxima[2] = {top_s.value(), top_t.value()};
    reduce_floats<FloatMax>(group, maxima);
    const Sides sides(terms, maxima[0], maxima[1]);

    float sums[Sums::kCount] = {};
    over_own([&](int place, int first) {
      const Pack x = Pack::load(xs + place), y = Pack::load(ys + place);
      float e[8], t[8];
      if (row.all_count(first)) {
        sides.template add<false>(row, first, x, y, e, t, sums);
      } else {
        sides.template add<true>(row, first, x, y, e, t, sums);
      }
    });
    typename Terms::Total totals[Sums::kCount];
    merge_sums(group, sums, totals);
    const float weight = static_cast<float>(at<float>(f.weight, index));
    Soft soft(terms, sides, totals, weight);
    TargetState& state = target_state<Terms>(launch, group);
    if constexpr (Sides::kDecouples)
      soft.settle_row(group, f, terms, index, totals, double{label_logit} - double{maxima[0]},
                      double{label_target} - double{maxima[1]}, state);
    const auto exponentials = [&](const Pack& x, const Pack& y, float (&e)[8], float (&t)[8]) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        e[k] = sides.student.exponential(sides.student.distance(x.value(k)));
        t[k] = sides.teacher.exponential(sides.teacher.distance(y.value(k)));
      }
    };
    if constexpr (Soft::kPoints > 0) {
      float points[Soft::kPoints] = {};
      over_own([&](int place, int first) {
        const Pack x = Pack::load(xs + place), y = Pack::load(ys + place);
        float e[8], t[8];
        exponentials(x, y, e, t);
        if (row.is_whole(first)) {
          soft.template points<false>(sides, row, first, x, y, e, t, points);
        } else {
          soft.template points<true>(sides, row, first, x, y, e, t, points);
        }
      });
      typename Terms::Total point_totals[Soft::kPoints];
      merge_sums(group, points, point_totals);
      soft.settle(terms, point_totals, weight);
    }
    if (is_special(soft.value)) return kNan;

    const auto of = lean_row(terms, sides, totals, weight, label, label_logit, row.classes, state);
    const double loss = of.loss + terms.soft * weight * (soft.value < 0 ? 0 : soft.value);
    if (!row.grad) return loss;
    over_own([&](int place, int first) {
      const Pack x = Pack::load(xs + place), y = Pack::load(ys + place);
      float e[8], t[8], g[8];
      exponentials(x, y, e, t);
      soft.slope(sides, x, y, e, t, of.shift, g);
      of.write(sides, row, row.grad + int64_t{first} * row.kBytes, first, x, e, g);
    });
    return loss;
  };
  over_rows<kDtype, kDivergence, kLabels>(launch, group, terms, of_row);
  group.leave();
}

}  // namespace device
}  // namespace mfd
