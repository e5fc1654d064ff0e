// Row losses and, in the same launch, d loss/d student. A group of threads walks over its rows: park the pair
// in shared memory (but where it does not fit), sums, second pass of the pointwise divergences, values,
// gradient.
#pragma once

#include "common/rows/row_terms.h"
#include "cuda/distill/launch.cuh"
#include "cuda/distill/sums.cuh"

namespace mfd {
namespace device {

// What one thread of a group computes for all.
struct RowState {
  Slopes slopes;
};

// What the passes after the first one take of a row's sums, in the compute dtype.
template <class S>
struct Softened {
  typedef typename S::T T;
  bool pointwise, far;
  bool near;  // maxima this close leave y - x with no larger error than the differences from the maxima have
  T max_s, max_t, gap, q_scale, p_scale, inverse_s, inverse_t, lse_s, lse_t;
  T moved;  // log p - log q of two logits at their maxima

  MFD_DEVICE Softened(const RowProblem& p, bool of_points, double ts, double tt, const RowSums& r)
      : pointwise(of_points),
        far(of_points && is_far(p, r)),
        near(ts == tt && fabs(r.max_t - r.max_s) <= 8.0),
        max_s(static_cast<T>(r.max_s)),
        max_t(static_cast<T>(r.max_t)),
        gap(max_t - max_s),
        q_scale(static_cast<T>(1.0 / r.sum_s)),
        p_scale(static_cast<T>(1.0 / r.sum_t)),
        inverse_s(static_cast<T>(1.0 / ts)),
        inverse_t(static_cast<T>(1.0 / tt)) {
    const double of_s = pointwise ? log(r.sum_s) : 0.0, of_t = pointwise ? log(r.sum_t) : 0.0;
    lse_s = static_cast<T>(of_s);
    lse_t = static_cast<T>(of_t);
    double difference = of_s - of_t;
    if (sizeof(T) == 4 && pointwise && is_of_mean(p.divergence))
      difference += rounding<T>(1.0 / r.sum_t) - rounding<T>(1.0 / r.sum_s);
    moved = static_cast<T>(difference);
  }
};

// One teacher, whose row is parked beside the student's. mixture.cuh has that of several.
template <class S>
struct OneTeacher {
  static constexpr bool kMixed = false;
  static MFD_DEVICE double teacher_logit(const View& y, const unsigned char* global, int64_t label) {
    return logit_at<S>(y, global, label);
  }
  static MFD_DEVICE const Odds* odds_at_one() { return nullptr; }
  static MFD_DEVICE bool wants_gradients() { return false; }
};

// kLean: the forward KL of logits without a transform, and no by-products, so that most of the registers stay
// free.
template <class S, class Group, bool kParked, bool kLean, class Teacher = OneTeacher<S>>
struct ForwardRow : Teacher {
  typedef typename S::T T;
  static constexpr int N = VectorOf<S>::kColumns;

  const Forward& f;
  const RowProblem& p;
  const Group& group;
  RowState* state;
  int64_t row, label;  // -1 where there is none
  bool bad;            // the label is out of range
  double ts, tt;
  Wanted wanted;
  Span span;
  View x, y;
  const unsigned char *x_global, *y_global;
  Exponents<S> exponents;

  MFD_DEVICE ForwardRow(const Forward& forward, const Group& g, RowState* s, int64_t r,
                        const Teacher& teacher = Teacher())
      : Teacher(teacher),
        f(forward),
        p(forward.problem),
        group(g),
        state(s),
        row(r),
        label(label_of(p, r)),
        bad(is_labelled(p, r) && (label < 0 || label >= p.classes)),
        ts(soft_term() ? at<T>(p.student_temperature, r) : 1.0),
        tt(soft_term() && !Teacher::kMixed ? at<T>(p.teacher_temperature, r) : 1.0),
        wanted(kLean ? Wanted{true, f.use_hard, false, false, false, false, false} : wanted_sums(forward)),
        // A mixture has no 16 bits; known here, that takes no registers.
        exponents(ts, tt, wanted.cross_entropy,
                  !Teacher::kMixed && size_of(p.student.dtype) == 2 && size_of(p.teacher.dtype) == 2) {
    if (bad) label = 0;
    x = view_of<S>(p.student, row, wanted.decoupled ? label : -1);
    y = soft_term() ? view_of<S>(p.teacher, row, x.excluded) : x;
    if constexpr (Teacher::kMixed) y.data = this->mixed;
    x_global = x.data;
    y_global = y.data;
    span = span_of<S>(group, p.classes);
  }

  MFD_DEVICE bool soft_term() const { return kLean || f.use_soft; }
  MFD_DEVICE bool is_pointwise_term() const { return !kLean && f.use_soft && is_pointwise(p.divergence); }

  MFD_DEVICE void park_pair(unsigned char* parking, int64_t teacher_at) {
    park<S>(group, x, span, p.classes, parking);
    if (soft_term() && !Teacher::kMixed) park<S>(group, y, span, p.classes, parking + teacher_at);
    await_copies();
    group.sync();
  }

  MFD_DEVICE void find_centres() {
    if (kLean) return;
    if (p.student.standardize) find_centre<S, kParked>(group, x, x_global, span, p.classes);
    if (soft_term() && p.teacher.standardize) find_centre<S, kParked>(group, y, y_global, span, p.classes);
  }

  MFD_DEVICE RowSums sums() const {
    ThreadSums<S> own;
    const bool smooth = f.use_hard && p.smoothing != 0;
    over_vectors<S>(group, span, [&](int64_t start) {
      T a[N], b[N] = {}, tx[N];
      load_logits<S, kParked, kLean>(x, start, p.classes, a);
      if (soft_term()) load_logits<S, kParked, kLean>(y, start, p.classes, b);
      const T max_s = largest_of<S>(a, own.max_s),
              max_t = soft_term() ? largest_of<S>(b, own.max_t) : own.max_t;
      if (max_s > own.max_s || max_t > own.max_t) own.raise(exponents, max_s, max_t);
      own.add_student(exponents, wanted, a, tx);
      if (soft_term()) own.add_teacher(exponents, wanted, b, tx);
      if (smooth) own.add_shifted(tx, start, p.classes, x.excluded);
    });
    return merge_threads<S, kLean>(group, own, exponents, ts, tt, p.classes);
  }

  MFD_DEVICE Softened<S> softened(const RowSums& r) const { return {p, is_pointwise_term(), ts, tt, r}; }

  // act(start, x, y) for the vectors of this thread; y is 0 without a soft term.
  template <class Act>
  MFD_DEVICE void over_pairs(const Act& act) const {
    over_vectors<S>(group, span, [&](int64_t start) {
      T a[N], b[N] = {};
      load_logits<S, kParked, kLean>(x, start, p.classes, a);
      if (soft_term()) load_logits<S, kParked, kLean>(y, start, p.classes, b);
      act(start, a, b);
    });
  }

  // E_p[v - u] where a student logit is -inf: terms whose p underflows in the compute dtype are 0.
  MFD_DEVICE double infinite_cross(const RowSums& r) const {
    const Softened<S> of = softened(r);
    double cross[1] = {0};
    over_pairs([&](int64_t, const T(&a)[N], const T(&b)[N]) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const T probability = exponents.teacher(b[k] - of.max_t) * of.p_scale;
        const T u = (a[k] - of.max_s) * of.inverse_s,
                w = wanted.cross_entropy ? T(0) : (b[k] - of.max_t) * of.inverse_t;
        if (probability != T(0)) cross[0] += static_cast<double>(probability * (w - u));
      }
    });
    group.template reduce<Sum>(cross);
    return cross[0];
  }

  // Whether both first columns of the maxima, as of torch.argmax, are one.
  MFD_DEVICE bool agreement(const RowSums& r, double label_s, double label_t) const {
    const T max_s = static_cast<T>(r.max_s), max_t = static_cast<T>(r.max_t);
    double v[3] = {-kInf, -kInf, 0};  // the largest of -(columns of the maxima); whether there is a NaN
    over_pairs([&](int64_t start, const T(&a)[N], const T(&b)[N]) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const double column = static_cast<double>(start + k);
        if (a[k] == max_s && -column > v[0]) v[0] = -column;
        if (b[k] == max_t && -column > v[1]) v[1] = -column;
        if (a[k] != a[k] || b[k] != b[k]) v[2] = 1;
      }
    });
    group.template reduce<Max>(v);
    const double column = -static_cast<double>(label);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const double of_label = side ? label_t : label_s;
      if (v[side] == -kInf) v[side] = 0;  // a row of only -inf
      if (!wanted.decoupled) continue;
      if (of_label > 0 || (of_label == 0 && column > v[side])) v[side] = column;
      if (of_label != of_label) v[2] = 1;
    }
    return v[0] == v[1] && v[2] == 0 && !bad;
  }

  // act(k, point) of a vector's columns, for the exponentials es and et of student and teacher.
  template <class Act>
  MFD_DEVICE void over_points(const Softened<S>& of, const T (&a)[N], const T (&b)[N], const T (&es)[N],
                              const T (&et)[N], const Act& act) const {
    with_divergence<S>(p, of.far, [&](const auto& divergence) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const T tx = a[k] - of.max_s, ty = b[k] - of.max_t;
        const T d = of.near ? b[k] - a[k] - of.gap : S::fma(ty, exponents.ratio, -tx);
        const bool logs = divergence.kTakesLogs;
        act(k, divergence(es[k] * of.q_scale, et[k] * of.p_scale, S::fma(d, of.inverse_s, of.moved),
                          logs ? S::fma(tx, of.inverse_s, -of.lse_s) : T(0),
                          logs ? S::fma(ty, of.inverse_t, -of.lse_t) : T(0)));
      }
    });
  }

  // Sum f, E_q[g] and E_p[h] of a pointwise divergence.
  MFD_DEVICE void find_points(RowSums& r) const {
    const Softened<S> of = softened(r);
    T value = 0, g = 0, h = 0;
    over_pairs([&](int64_t start, const T(&a)[N], const T(&b)[N]) {
      T es[N], et[N];
#pragma unroll
      for (int k = 0; k < N; ++k) {
        et[k] = exponents.teacher(b[k] - of.max_t);
        es[k] = exponents.student(a[k] - of.max_s);
      }
      over_points(of, a, b, es, et, [&](int k, const Point<S>& point) {
        if (start + k >= p.classes) return;
        value = value + point.value;
        g = g + point.g;
        h = h + point.h;
      });
    });
    double v[3] = {static_cast<double>(value), static_cast<double>(g), static_cast<double>(h)};
    group.template reduce<Sum>(v);
    r.value = v[0] < 0 ? 0.0 : v[0];
    r.g = v[1];
    r.h = v[2];
    if (r.value != r.value) r.g = r.h = kNan;
  }

  // Writes d loss/d student; or, with `dots`, returns this thread's part of sum gradient*z of the
  // standardised logits z, of which `dot` is the whole.
  MFD_DEVICE double gradient_pass(bool dots, const RowSums& r, double label_x, double dot) const {
    const Slopes& slopes = state->slopes;
    const Softened<S> of = softened(r);
    const T student = static_cast<T>(slopes.student), teacher = static_cast<T>(slopes.teacher);
    const double drifted = kLean || dots ? 0.0 : drift_gradient<S>(x, dot);
    const T hard = static_cast<T>(slopes.hard), shift = static_cast<T>(slopes.shift + drifted);
    const T label_shift = static_cast<T>(slopes.label_shift + drifted);
    const int64_t own = f.use_hard || wanted.decoupled ? label : -1, width = p.student.width;
    unsigned char* out = gradient_row();
    const bool wide = sizeof(T) == 4 && is_aligned(out);
    double sum = 0;
    over_pairs([&](int64_t start, T(&a)[N], const T(&b)[N]) {
      T es[N], second[N] = {};  // the second side of the slope: q*df/dq or the teacher's exponential
      if (soft_term()) {
#pragma unroll
        for (int k = 0; k < N; ++k) second[k] = exponents.teacher(b[k] - of.max_t);
      }
#pragma unroll
      for (int k = 0; k < N; ++k) es[k] = exponents.student(a[k] - of.max_s);
      if (of.pointwise)
        over_points(of, a, b, es, second, [&](int k, const Point<S>& point) { second[k] = point.g; });
#pragma unroll
      for (int k = 0; k < N; ++k) {
        // Both products are rounded, so that equal distributions give exactly 0.
        T gradient = soft_term() ? es[k] * student - second[k] * teacher : T(0);
        if (wanted.hard) gradient = S::fma(exponents.hard(es[k], a[k] - of.max_s), hard, gradient);
        gradient = gradient - (start + k == own ? label_shift : shift);
        if (wanted.decoupled && start + k == label) a[k] = static_cast<T>(label_x);
        if (dots) {
          if (start + k < p.classes && gradient != T(0)) sum += static_cast<double>(gradient * a[k]);
          continue;
        }
        if (!kLean && changes_gradient(p.student)) gradient = raw_gradient<S, true>(x, gradient, a[k], dot);
        second[k] = start + k < p.classes ? gradient : T(0);
      }
      if (!dots) store_gradient<S>(out, p.student.dtype, start, width, wide, second);
    });
    return sum;
  }

  MFD_DEVICE void write_gradient(const RowSums& r, double label_x) const {
    double dot[1] = {0};
    // Standardised logits take their dot product first; one loop, so that there is one copy of the pass.
#pragma unroll 1
    for (int dots = !kLean && p.student.standardize ? 1 : 0; dots >= 0; --dots) {
      const double sum = gradient_pass(dots != 0, r, label_x, dot[0]);
      if (dots == 0) break;
      dot[0] = sum;
      group.template reduce<Sum>(dot);
    }
    write_zeros((p.classes + N - 1) / N * N);
  }

  MFD_DEVICE unsigned char* gradient_row() const {
    return static_cast<unsigned char*>(f.grad) + row * p.student.width * size_of(p.student.dtype);
  }

  // Columns from `first` on of the gradient, by the group's first block.
  MFD_DEVICE void write_zeros(int64_t first) const {
    if (group.part() != 0) return;
    for (int64_t k = first + group.rank(); k < p.student.width; k += group.threads())
      store_one<T>(gradient_row() + k * size_of(p.student.dtype), p.student.dtype, T(0));
  }

  template <class V>
  MFD_DEVICE void put(void* out, V value) const {
    if (out) static_cast<T*>(out)[row] = static_cast<T>(value);
  }

  // Terms, statistics and by-products, by one thread. Returns the row's part of the loss.
  MFD_DEVICE double write_values(const RowResult& r, double label_t, bool agrees, double soft,
                                 double hard) const {
    put(f.soft, r.soft);
    put(f.hard, r.hard);
    if (f.stats) {
      const bool far = is_pointwise_term() && is_far(p, r.sums);
      saved_statistics(r, wanted, far, static_cast<T*>(f.stats) + row * kStats);
    }
    if (!kLean && f.student_entropy) {
      const Entropies e = row_entropies(r, wanted);
      put(f.student_entropy, e.student);
      put(f.teacher_entropy, e.teacher);
      if (f.agreement) f.agreement[row] = agrees;
    }
    if (!kLean && f.student_label_prob && label < 0) {
      put(f.student_label_prob, 0.0);
      put(f.teacher_label_prob, 0.0);
    } else if (!kLean && f.student_label_prob) {
      put(f.student_label_prob, wanted.decoupled ? r.target.student.label : exp(r.label / ts) / r.sums.sum_s);
      put(f.teacher_label_prob, wanted.decoupled ? r.target.teacher.label : exp(label_t / tt) / r.sums.sum_t);
    }
    return (soft_term() ? soft * r.soft : 0.0) + (f.use_hard ? hard * r.hard : 0.0);
  }

  MFD_DEVICE void skip() const {
    if (f.grad) write_zeros(0);
    if (group.rank() != 0 || group.part() != 0) return;
    void* const outputs[] = {
        f.soft, f.hard, f.student_entropy, f.teacher_entropy, f.student_label_prob, f.teacher_label_prob};
#pragma unroll
    for (int k = 0; k < 6; ++k) put(outputs[k], 0.0);
    if (f.agreement) f.agreement[row] = 0;
    if (f.stats)
      for (int k = 0; k < kStats; ++k) static_cast<T*>(f.stats)[row * kStats + k] = T(0);
  }

  // The row's part of the loss, in the group's first thread.
  MFD_DEVICE double run(const Factors& factors, unsigned char* parking, int64_t teacher_at) {
    if (kParked) park_pair(parking, teacher_at);
    find_centres();
    RowSums r = sums();
    const bool labelled = label >= 0;
    const double label_x = labelled ? logit_at<S>(x, x_global, label) : 0.0, label_s = label_x - r.max_s;
    const double label_t = labelled && soft_term() ? this->teacher_logit(y, y_global, label) - r.max_t : 0.0;
    if (wanted.decoupled && f.use_hard && p.smoothing != 0)
      r.mean_x += label_s / static_cast<double>(p.classes);
    if (r.cross == kInf) r.cross = infinite_cross(r);
    const bool agrees = !kLean && f.agreement && agreement(r, label_s, label_t);
    if (bad) r.sum_s = r.sum_t = r.sum_h = kNan;
    reject_empty(r, wanted);
    if (is_pointwise_term()) find_points(r);
    const double loss = finish_values(r, factors, label_s, label_t, agrees);
    if (f.grad) {
      group.sync();  // the slopes
      write_gradient(r, label_x);
    }
    // The next row takes the place of this one.
    group.sync();
    return loss;
  }

  // The row's values and slopes, by one thread; its part of the loss.
  MFD_DEVICE double finish_values(const RowSums& r, const Factors& factors, double label_s, double label_t,
                                  bool agrees) const {
    if (group.rank() != 0) return 0.0;
    RowResult result = row_result(f, wanted, ts, tt, r, label_s, label_t, this->odds_at_one());
    if (label < 0) result.hard = 0;
    const double weight = at<T>(f.weight, row);
    const double soft = weight * factors.soft, hard = label < 0 ? 0.0 : weight * factors.hard;
    state->slopes = row_slopes(f, wanted, soft, hard, ts, result);
    return group.part() == 0 ? write_values(result, label_t, agrees, soft, hard) : 0.0;
  }
};

template <class S, class Group, bool kParked, bool kLean>
__global__ void __launch_bounds__(Residency<Group>::kThreads, kLean ? Residency<Group>::kLeanBlocks : 1)
    distill_forward(const __grid_constant__ ForwardLaunch launch) {
  if (Group::kSplitsRows && !kHasClusters) return;
  unsigned char* shared = dynamic_shared();
  const Group group(reinterpret_cast<typename Group::Shared*>(shared));
  const Forward& f = launch.forward;
  const int mine = group.index_in_block();
  RowState* state = reinterpret_cast<RowState*>(shared + launch.states_at) + mine;
  unsigned char* parking = shared + launch.parking_at + mine * launch.parking_bytes;
  const Factors factors = find_factors<typename S::T>(launch);
  const int64_t groups = static_cast<int64_t>(gridDim.x) / group.parts() * group.in_block();
  const int64_t own = static_cast<int64_t>(blockIdx.x) / group.parts() * group.in_block() + mine;
  double loss = 0;
  for (int64_t row = own; row < f.problem.n_rows; row += groups) {
    ForwardRow<S, Group, kParked, kLean> of_row(f, group, state, row);
    if (is_counted(f.problem, row)) {
      loss += of_row.run(factors, parking, launch.teacher_at);
    } else {
      of_row.skip();
    }
  }
  if (launch.partial) {
    if (group.rank() == 0 && group.part() == 0) launch.partial[own] = loss;
    finish_loss<typename S::T>(launch, groups);
  }
  group.leave();
}

}  // namespace device
}  // namespace mfd
