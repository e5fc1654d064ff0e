// One row with a sparse teacher.
#pragma once

#include "common/rows/saved_row.h"
#include "cuda/distill/forward.cuh"
#include "cuda/topk/by_products.cuh"
#include "cuda/topk/listed.cuh"

namespace mfd {
namespace device {

struct TopKLaunch : ForwardLaunch {
  TopK topk;
  RowScalar grad_soft, grad_hard;               // further factors of the two terms' gradients
  void* d_values;                               // [N, listed], the values' dtype; null when not wanted
  void *d_temperature, *d_teacher_temperature;  // [N]; null when not wanted
  bool parked;                                  // whether the student's row is
  // Of a group's place: behind the parked row its lists and its bitmap, or that in device memory.
  int lists_at, bits_at;
  uint32_t* bits;
  int64_t bits_words;
};

// What one thread of a block computes for all.
struct TopKState {
  SoftTerm s;
  AllClasses all;
  TopKSlopes slopes;
  ValueFactors values;
  double h_scale, unit_scale;  // 1/sum exp(x - max) over all classes, and over those of a renormalised NKD
  double label, share;         // gradient of a decoupled label; hard*share leaves that of another
};

template <class S, class Group>
struct TopKRow {
  typedef typename S::T T;
  static constexpr int N = VectorOf<S>::kColumns;

  const TopKLaunch& g;
  const Forward& f;
  const RowProblem& p;
  const Group& group;
  TopKState* state;
  int64_t row, label, listed;
  double ts, tt, degree;
  bool use_hard;
  Span span;
  int64_t first, last;  // columns of this block
  View x;
  const unsigned char *x_global, *values;
  const int64_t* indices;
  T *lx, *ly;  // transformed logits and values of the listed classes of this block
  uint32_t* bits;
  Exponent<S> by_ts, by_tt, by_one, by_power;
  HardExponent<S> hard;

  MFD_DEVICE TopKRow(const TopKLaunch& launch, const Group& threads, TopKState* st, unsigned char* place,
                     int64_t group_index, int64_t r, bool fast)
      : g(launch),
        f(launch.forward),
        p(launch.forward.problem),
        group(threads),
        state(st),
        row(r),
        label(label_of(p, r)),
        listed(launch.topk.listed),
        ts(at<T>(p.student_temperature, r)),
        tt(at<T>(p.teacher_temperature, r)),
        degree(p.first + p.second),
        use_hard(f.use_hard && is_labelled(p, r) && at<T>(launch.grad_hard, r) != 0),
        by_ts(ts, fast),
        by_tt(tt, fast),
        by_one(1.0, fast),
        by_power(has_powers() ? ts / degree : 1.0, fast),
        hard(ts, fast) {
    span = span_of<S>(group, p.classes);
    first = span.begin * N;
    last = span.end * N < p.classes ? span.end * N : p.classes;
    x = view_of<S>(p.student, row, -1);
    x_global = x.data;
    values = static_cast<const unsigned char*>(p.teacher.data) +
             row_offset(p.teacher, row) * size_of(p.teacher.dtype);
    indices = g.topk.indices + row * listed;
    lx = reinterpret_cast<T*>(place + g.lists_at);
    ly = lx + listed;
    bits = g.bits ? g.bits + group_index * g.bits_words : reinterpret_cast<uint32_t*>(place + g.bits_at);
  }

  MFD_DEVICE bool is_renormalized() const { return g.topk.tail == Tail::kRenormalize; }
  MFD_DEVICE bool knows_rest() const { return g.topk.tail != Tail::kZero; }
  MFD_DEVICE bool is_decoupling() const { return decouples_target(p.divergence); }
  MFD_DEVICE bool is_nkd() const { return p.divergence == Divergence::kNKD; }
  // The divergence of a class without teacher is not proportional to q.
  MFD_DEVICE bool has_powers() const {
    return !knows_rest() && p.divergence == Divergence::kAlphaBeta && degree != 1.0;
  }
  // Something depends on the classes that are not listed.
  MFD_DEVICE bool takes_all_classes() const { return !is_renormalized() || use_hard || f.student_entropy; }
  MFD_DEVICE bool reads_row() const { return takes_all_classes() || p.student.standardize; }
  MFD_DEVICE bool has_exponentials_at_one() const { return use_hard || (is_nkd() && !is_renormalized()); }

  MFD_DEVICE bool is_mine(int64_t column) const { return column >= first && column < last; }
  MFD_DEVICE bool is_decoupled(int64_t column) const { return is_decoupling() && column == label; }

  // Calls act(k, column) for the listed classes of this block.
  template <class Act>
  MFD_DEVICE void over_listed(const Act& act) const {
    for (int64_t k = group.rank(); k < listed; k += group.threads()) {
      const int64_t column = indices[k];
      if (is_mine(column)) act(k, column);
    }
  }

  // Calls act(kind) with what is known of the student's logits when the kernel is compiled. kPlain: they are
  // of kDtype, whole vectors of them may be loaded and nothing transforms them.
  template <bool kIsPlain, Dtype kOf>
  struct Kind {
    static constexpr bool kPlain = kIsPlain;
    static constexpr Dtype kDtype = kOf;
  };
  template <class Act>
  MFD_DEVICE void with_plain_dtype(bool plain, const Act& act) const {
    if constexpr (sizeof(T) == 4) {
      if (plain && x.wide && !changes_gradient(p.student)) {
        if (p.student.dtype == Dtype::kBFloat16 && by_ts.fast) return act(Kind<true, Dtype::kBFloat16>());
        if (p.student.dtype == Dtype::kFloat32) return act(Kind<true, Dtype::kFloat32>());
      }
    }
    act(Kind<false, Dtype::kFloat32>());
  }

  // Takes the listed logits out of the row and marks their columns; whether this thread saw a list that is
  // none.
  MFD_DEVICE bool gather() {
    const int64_t words = (span.end - span.begin) * N / 32 + 1;
    for (int64_t k = group.rank(); k < words; k += group.threads()) bits[k] = 0;
    group.sync();
    bool bad = is_labelled(p, row) && (label < 0 || label >= p.classes);
    const int size = size_of(p.student.dtype), of_value = size_of(p.teacher.dtype);
    for (int64_t k = group.rank(); k < listed; k += group.threads()) {
      const int64_t column = indices[k];
      if (is_padding(column)) continue;
      bad = bad || column < 0 || column >= p.classes;
      if (!is_mine(column)) continue;
      lx[k] = transformed<S>(x, load_one<T>(x.data + column * size, p.student.dtype), true);
      ly[k] = load_one<T>(values + k * of_value, p.teacher.dtype);
      const uint32_t bit = 1u << ((column - first) & 31);
      bad = bad || (atomicOr(bits + ((column - first) >> 5), bit) & bit) != 0;
    }
    group.sync();
    return bad;
  }

  // The sums over the row and the list.
  MFD_DEVICE Found add_up(bool bad) {
    const bool dots = f.student_entropy || g.d_temperature, spread = use_hard && p.smoothing != 0;
    const RestWanted wanted = {use_hard || is_nkd(), dots, has_powers(), spread};
    RestThread<S> own;
    if (takes_all_classes()) {
      const bool plain = !dots && !wanted.powers && !spread;
      with_plain_dtype(plain, [&](auto kind) {
        own = rest_of_thread<S, kind.kPlain, kind.kDtype>(group, x, span, bits, p.classes, wanted, by_ts,
                                                          hard, by_power);
      });
    }
    double most[4] = {static_cast<double>(own.max), static_cast<double>(S::kLowest),
                      static_cast<double>(S::kLowest), bad ? 1.0 : 0.0};
    double sums[10] = {};
    over_listed([&](int64_t k, int64_t column) {
      sums[9] += 1;
      if (g.topk.logprobs && !is_renormalized()) sums[6] += exp(static_cast<double>(ly[k]));
      if (column == label) {
        sums[7] += static_cast<double>(ly[k]);
        sums[8] = 1;
      }
      if (is_decoupled(column)) return;
      most[1] = fmax(most[1], static_cast<double>(lx[k]));
      most[2] = fmax(most[2], static_cast<double>(ly[k]));
    });
    group.template reduce<Max>(most);
    const double over_all = takes_all_classes() ? fmax(most[0], most[1]) : most[1];
    const RestSums part = rest_part<S>(own, most[0], over_all, by_ts, hard, by_power);
    sums[0] = part.sum_s;
    sums[1] = part.sum_h;
    sums[2] = part.dot_s;
    sums[3] = part.powers;
    sums[4] = part.dot_powers;
    sums[5] = part.sum_x;
    group.template reduce<Sum>(sums);
    double rest_y = -kInf;
    if (g.topk.logprobs && !is_renormalized()) {
      const double left = sums[9] == static_cast<double>(p.classes) ? 0.0 : 1 - sums[6];
      rest_y = left <= 0 ? -kInf : log(left);
    }
    const double max_s = is_renormalized() ? most[1] : over_all;
    const double max_t = fmax(most[2], static_cast<double>(static_cast<T>(rest_y)));
    double of_list[6] = {};
    over_listed([&](int64_t k, int64_t column) {
      if (is_decoupled(column)) return;
      const T a = lx[k], b = ly[k];
      of_list[0] += static_cast<double>(by_ts(a - static_cast<T>(max_s)));
      of_list[1] += static_cast<double>(by_tt(b - static_cast<T>(max_t)));
      if (wanted.hard) of_list[2] += static_cast<double>(by_one(a - static_cast<T>(over_all)));
      if (is_nkd()) of_list[3] += static_cast<double>(by_one(a - static_cast<T>(max_s)));
      if (is_nkd()) of_list[4] += static_cast<double>(by_one(b - static_cast<T>(max_t)));
      if (spread) of_list[5] += static_cast<double>(a - static_cast<T>(over_all));
    });
    group.template reduce<Sum>(of_list);
    const Found found = {sums[7], sums[8] != 0, most[3] != 0 || (is_decoupling() && sums[8] == 0)};
    if (group.rank() == 0) {
      if (found.bad)
        for (int k = 0; k < 6; ++k) of_list[k] = kNan;
      const RestSums rest = {most[0], sums[0], sums[1], sums[3], sums[2], sums[4], sums[5] + of_list[5]};
      settle(rest, over_all, max_s, max_t, rest_y, found.label_y, of_list);
    }
    group.sync();
    return found;
  }

  // What follows from the sums, by one thread.
  MFD_DEVICE void settle(const RestSums& rest, double over_all, double max_s, double max_t, double rest_y,
                         double label_y, const double (&of_list)[6]) const {
    TopKState& st = *state;
    SoftTerm& s = st.s;
    s = {};
    st.all = {};
    st.all.max = over_all;
    st.all.rest = rest;
    const bool readable = label >= 0 && label < p.classes;
    st.all.label = readable ? logit_at<S>(x, x_global, label) : 0.0;
    const double beside_h = rest.sum_h * exp(rest.max - over_all);
    if (has_exponentials_at_one()) settle_hard(st.all, is_decoupling(), beside_h + of_list[2]);
    s.rest = rest_y;
    s.max_s = max_s;
    s.max_t = max_t;
    s.rest_x = rest.max - max_s;
    const double beside = is_renormalized() ? 0.0 : rest.sum_s * exp(s.rest_x / ts);
    s.sum_s = beside + of_list[0];
    s.sum_t = of_list[1] + (rest_y == -kInf ? 0.0 : exp((rest_y - max_t) / tt));
    settle_sums(p, ts, tt, beside, is_renormalized() ? 0.0 : rest.sum_s, s);
    if (!is_decoupling()) return;
    s.label_x = st.all.label - max_s;
    s.label_y = label_y - max_t;
    if (!is_nkd()) return;
    s.sum_h = (is_renormalized() ? 0.0 : rest.sum_h * exp(s.rest_x)) + of_list[3];
    s.sum_u = of_list[4] + (rest_y == -kInf ? 0.0 : exp(rest_y - max_t));
  }

  MFD_DEVICE unsigned char* student_gradient() const {
    return static_cast<unsigned char*>(f.grad) + row * p.student.width * size_of(p.student.dtype);
  }
  MFD_DEVICE void put_value(int64_t k, T value) const {
    store_one<T>(static_cast<unsigned char*>(g.d_values) + (row * listed + k) * size_of(p.teacher.dtype),
                 p.teacher.dtype, value);
  }
  MFD_DEVICE void put(void* out, double value) const {
    if (out) static_cast<T*>(out)[row] = static_cast<T>(value);
  }

  // Values and slopes, by one thread of every block; the row's part of the loss.
  MFD_DEVICE double settle_values(const Factors& factors, const ClassPoint& of_list, ClassPoint rest) const {
    TopKState& st = *state;
    SoftTerm& s = st.s;
    if (is_decoupling()) {
      settle_target(p, ts, tt, of_list, s);
    } else {
      if (has_powers()) rest = power_point(p, rest_powers(st.all.rest.powers, degree, ts, s));
      settle_points(p, knows_rest(), of_list, rest, s);
    }
    const double weight = at<T>(f.weight, row);
    const double to_soft = weight * factors.soft * at<T>(g.grad_soft, row);
    const double to_hard = use_hard ? weight * factors.hard * at<T>(g.grad_hard, row) : 0.0;
    st.slopes = topk_slopes(p, is_renormalized(), has_powers(), to_soft, to_hard, ts, st.all, s);
    st.share = st.slopes.hard * label_share(p);
    st.label = is_decoupling() ? decoupled_gradient(p, st.all, s, st.slopes) : 0.0;
    st.h_scale = has_exponentials_at_one() ? inverse_mass(st.all.lse_h) : 0.0;
    st.unit_scale = is_nkd() && is_renormalized()
                        ? inverse_mass(whole_lse(s.target.hard_student, s.label_x, log(s.sum_h)))
                        : 0.0;
    st.values = value_factors(p, to_soft, ts, tt, s);
    if (group.part() != 0) return 0.0;
    const double soft =
        (p.scale_by_temperature ? ts * ts : 1.0) * s.value + (is_nkd() ? s.slopes.target_loss : 0.0);
    double hard_term = 0;
    if (use_hard) {
      RowSums sums{};
      const double label_x = st.all.label - st.all.max;
      sums.mean_x = (st.all.rest.sum_x + (is_decoupling() ? label_x : 0.0)) / static_cast<double>(p.classes);
      hard_term = cross_entropy(sums, st.all.lse_h, label_x, p.smoothing);
    }
    put(f.soft, soft);
    put(f.hard, hard_term);
    for (int k = 0; f.stats && k < kStats; ++k) static_cast<T*>(f.stats)[row * kStats + k] = T(0);
    return weight * (factors.soft * soft + (use_hard ? factors.hard * hard_term : 0.0));
  }

  MFD_DEVICE double run(const Factors& factors, unsigned char* parking) {
    if (g.parked && reads_row()) {
      park<S>(group, x, span, p.classes, parking);
      await_copies();
      group.sync();
    }
    if (p.student.standardize) find_centre<S, false>(group, x, x_global, span, p.classes);
    const Found found = add_up(gather());
    if (f.student_entropy) write_by_products<S>(*this, found);
    if (can_be_far(p) && knows_rest()) {
      const double distance = list_distance<S>(*this);
      if (group.rank() == 0) state->s.far = distance >= kFarKL;
      group.sync();
    }
    ClassPoint of_list, of_rest;
    list_points<S>(*this, &of_list, &of_rest);
    const double loss = group.rank() == 0 ? settle_values(factors, of_list, of_rest) : 0.0;
    if (f.grad || g.d_values || g.d_temperature || g.d_teacher_temperature) {
      group.sync();  // the slopes
      write_gradients(factors);
    }
    // The next row takes the place of this one.
    group.sync();
    return loss;
  }

  MFD_DEVICE void write_gradients(const Factors& factors) const {
    const bool dotted = f.grad && p.student.standardize;
    double dot = 0;
    if (dotted || g.d_temperature || g.d_teacher_temperature) {
      if (dotted) dot = unlisted_gradient<S, false, Dtype::kFloat32>(*this, false, 0.0);
      const ListedSums own = list_sums<S>(*this, &dot);
      double v[7] = {own.u_x, own.to_u, own.q_x, own.v_y, own.to_v, own.p_y, dot};
      group.template reduce<Sum>(v);
      dot = v[6];
      if (group.rank() == 0 && group.part() == 0)
        write_temperatures(factors, {v[0], v[1], v[2], v[3], v[4], v[5]});
    }
    if (f.grad) {
      with_plain_dtype(!is_renormalized() && !has_powers() && is_aligned(student_gradient()),
                       [&](auto kind) { unlisted_gradient<S, kind.kPlain, kind.kDtype>(*this, true, dot); });
      write_zeros((p.classes + N - 1) / N * N);
      group.sync();  // whole vectors first, then the listed classes among them
    }
    write_listed<S>(*this, dot);
  }

  MFD_DEVICE void write_temperatures(const Factors& factors, const ListedSums& sums) const {
    const double factor = at<T>(f.weight, row) * factors.soft * at<T>(g.grad_soft, row);
    if (g.d_temperature)
      put(g.d_temperature, topk_temperature_gradient(p, is_renormalized(), has_powers(), factor, ts,
                                                     state->all.rest, state->s, sums));
    if (g.d_teacher_temperature)
      put(g.d_teacher_temperature, topk_teacher_temperature_gradient(p, factor, ts, tt, state->s, sums));
  }

  // Columns from `from` on of the student's gradient, by the group's first block.
  MFD_DEVICE void write_zeros(int64_t from) const {
    if (group.part() != 0) return;
    for (int64_t k = from + group.rank(); k < p.student.width; k += group.threads())
      store_one<T>(student_gradient() + k * size_of(p.student.dtype), p.student.dtype, T(0));
  }

  // Zeros for a row that is not counted.
  MFD_DEVICE void skip() const {
    if (f.grad) write_zeros(0);
    for (int64_t k = group.rank(); g.d_values && group.part() == 0 && k < listed; k += group.threads())
      put_value(k, T(0));
    if (group.rank() != 0 || group.part() != 0) return;
    void* const outputs[] = {f.soft,
                             f.hard,
                             f.student_entropy,
                             f.teacher_entropy,
                             f.student_label_prob,
                             f.teacher_label_prob,
                             g.d_temperature,
                             g.d_teacher_temperature};
#pragma unroll
    for (int k = 0; k < 8; ++k) put(outputs[k], 0.0);
    if (f.agreement) f.agreement[row] = 0;
    for (int k = 0; f.stats && k < kStats; ++k) static_cast<T*>(f.stats)[row * kStats + k] = T(0);
  }
};

}  // namespace device
}  // namespace mfd
