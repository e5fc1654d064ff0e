// One row with a sparse teacher.
#pragma once

#include "common/rows/saved_row.h"
#include "common/vector/slopes.h"
#include "cuda/distill/forward.cuh"
#include "cuda/topk/by_products.cuh"

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
  enum class Sweep { kDistance, kPoints, kSums, kWrite };

  const TopKLaunch& g;
  const Forward& f;
  const RowProblem& p;
  const Group& group;
  TopKState* state;
  int64_t row, label, listed;
  double ts, tt, degree;
  bool use_hard, renormalized, whole, decoupled, unit, all_classes, powers, reads;
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
        renormalized(launch.topk.tail == Tail::kRenormalize),
        whole(launch.topk.tail != Tail::kZero),
        decoupled(decouples_target(p.divergence)),
        unit(p.divergence == Divergence::kNKD),
        all_classes(!renormalized || use_hard || f.student_entropy),
        powers(!whole && p.divergence == Divergence::kAlphaBeta && degree != 1.0),
        reads(all_classes || p.student.standardize),
        by_ts(ts, fast),
        by_tt(tt, fast),
        by_one(1.0, fast),
        by_power(powers ? ts / degree : 1.0, fast),
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

  MFD_DEVICE bool is_mine(int64_t column) const { return column >= first && column < last; }
  MFD_DEVICE bool is_decoupled(int64_t column) const { return decoupled && column == label; }

  // Calls act(k, column) for the listed classes of this block.
  template <class Act>
  MFD_DEVICE void over_listed(const Act& act) const {
    for (int64_t k = group.rank(); k < listed; k += group.threads()) {
      const int64_t column = indices[k];
      if (is_mine(column)) act(k, column);
    }
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
    const RestWanted wanted = {use_hard || unit, dots, powers, spread};
    RestThread<S> own;
    if (all_classes) own = rest_of_thread<S>(group, x, span, bits, p.classes, wanted, by_ts, hard, by_power);
    double most[4] = {static_cast<double>(own.max), static_cast<double>(S::kLowest),
                      static_cast<double>(S::kLowest), bad ? 1.0 : 0.0};
    double sums[9] = {};
    over_listed([&](int64_t k, int64_t column) {
      if (g.topk.logprobs && !renormalized) sums[6] += exp(static_cast<double>(ly[k]));
      if (column == label) {
        sums[7] += static_cast<double>(ly[k]);
        sums[8] = 1;
      }
      if (is_decoupled(column)) return;
      most[1] = fmax(most[1], static_cast<double>(lx[k]));
      most[2] = fmax(most[2], static_cast<double>(ly[k]));
    });
    group.template reduce<Max>(most);
    const double over_all = all_classes ? fmax(most[0], most[1]) : most[1];
    const RestSums part = rest_part<S>(own, most[0], over_all, by_ts, hard, by_power);
    sums[0] = part.sum_s;
    sums[1] = part.sum_h;
    sums[2] = part.dot_s;
    sums[3] = part.powers;
    sums[4] = part.dot_powers;
    sums[5] = part.sum_x;
    group.template reduce<Sum>(sums);
    double rest_y = -kInf;
    if (g.topk.logprobs && !renormalized) {
      const double left = 1 - sums[6];
      rest_y = left <= 0 ? -kInf : log(left);
    }
    const double max_s = renormalized ? most[1] : over_all;
    const double max_t = fmax(most[2], static_cast<double>(static_cast<T>(rest_y)));
    double of_list[6] = {};
    over_listed([&](int64_t k, int64_t column) {
      if (is_decoupled(column)) return;
      const T a = lx[k], b = ly[k];
      of_list[0] += static_cast<double>(by_ts(a - static_cast<T>(max_s)));
      of_list[1] += static_cast<double>(by_tt(b - static_cast<T>(max_t)));
      if (wanted.hard) of_list[2] += static_cast<double>(by_one(a - static_cast<T>(over_all)));
      if (unit) of_list[3] += static_cast<double>(by_one(a - static_cast<T>(max_s)));
      if (unit) of_list[4] += static_cast<double>(by_one(b - static_cast<T>(max_t)));
      if (spread) of_list[5] += static_cast<double>(a - static_cast<T>(over_all));
    });
    group.template reduce<Sum>(of_list);
    const Found found = {sums[7], sums[8] != 0, most[3] != 0 || (decoupled && sums[8] == 0)};
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
    if (use_hard || (unit && !renormalized)) settle_hard(st.all, decoupled, beside_h + of_list[2]);
    s.rest = rest_y;
    s.max_s = max_s;
    s.max_t = max_t;
    s.rest_x = rest.max - max_s;
    const double beside = renormalized ? 0.0 : rest.sum_s * exp(s.rest_x / ts);
    s.sum_s = beside + of_list[0];
    s.sum_t = of_list[1] + (rest_y == -kInf ? 0.0 : exp((rest_y - max_t) / tt));
    settle_sums(p, ts, tt, beside, renormalized ? 0.0 : rest.sum_s, s);
    if (!decoupled) return;
    s.label_x = st.all.label - max_s;
    s.label_y = label_y - max_t;
    if (!unit) return;
    s.sum_h = (renormalized ? 0.0 : rest.sum_h * exp(s.rest_x)) + of_list[3];
    s.sum_u = of_list[4] + (rest_y == -kInf ? 0.0 : exp(rest_y - max_t));
  }

  // A pass over the listed classes; v: kDistance: the forward KL; kPoints: sums of f, g, h over them, and f,
  // g, h of the rest; kSums: ListedSums, and sum gradient*x of a standardised row; kWrite: nothing.
  MFD_DEVICE void sweep(Sweep kind, double dot, double (&v)[7]) const {
    const SoftTerm& s = state->s;
    const TopKSlopes& slopes = state->slopes;
    const ValueFactors& to_value = state->values;
    const bool near = ts == tt && fabs(s.max_t - s.max_s) <= 8.0;
    const T max_s = static_cast<T>(s.max_s), max_t = static_cast<T>(s.max_t), gap = max_t - max_s;
    const T q_scale = static_cast<T>(s.sum_s == 0 ? 0.0 : 1.0 / s.sum_s);
    const T p_scale = static_cast<T>(s.sum_t == 0 ? 0.0 : 1.0 / s.sum_t);
    const T ratio = static_cast<T>(ts / tt), inverse_s = static_cast<T>(1.0 / ts);
    const T inverse_t = static_cast<T>(1.0 / tt), moved = static_cast<T>(s.lse_s - s.lse_t);
    const T lse_s = static_cast<T>(s.lse_s), lse_t = static_cast<T>(s.lse_t);
    const T mean_g = static_cast<T>(s.mean_g), mean_h = static_cast<T>(s.mean_h);
    const LinearSlope<S> slope(
        {s.slopes.student, s.slopes.teacher, s.slopes.rest_weight, s.mean_h, s.slopes.rest_shift, unit});
    const bool whole_list =
        kind <= Sweep::kPoints && !renormalized && !decoupled && !powers && group.part() == 0;
    const int64_t end = listed + (whole_list ? 1 : 0);
    for (int64_t k = group.rank(); k < end; k += group.threads()) {
      const bool at_rest = k == listed;
      const int64_t column = at_rest ? -1 : indices[k];
      if (!at_rest && !is_mine(column)) {
        if (kind == Sweep::kWrite && g.d_values && group.part() == 0 && (column < 0 || column >= p.classes))
          put_value(k, static_cast<T>(kNan));
        continue;
      }
      const bool own = !at_rest && is_decoupled(column);
      T q, w, r, log_q, log_p, a = 0, b = 0;
      if (at_rest) {
        const double seen = whole ? s.log_p : -kInf;
        q = static_cast<T>(s.q);
        w = static_cast<T>(whole ? s.p : 0.0);
        r = static_cast<T>(seen - s.log_q);
        log_q = static_cast<T>(s.log_q);
        log_p = static_cast<T>(seen);
      } else {
        a = lx[k], b = ly[k];
        const T tx = a - max_s, ty = b - max_t, d = near ? b - a - gap : S::fma(ty, ratio, -tx);
        q = by_ts(tx) * q_scale;
        w = by_tt(ty) * p_scale;
        r = S::fma(d, inverse_s, moved);
        log_q = S::fma(tx, inverse_s, -lse_s);
        log_p = S::fma(ty, inverse_t, -lse_t);
      }
      if (own && kind <= Sweep::kPoints) continue;
      if (kind == Sweep::kDistance) {
        v[0] += static_cast<double>(weighed<S>(w, r));
        continue;
      }
      T to_u = 0, to_v = 0;
      if (kind == Sweep::kPoints || !decoupled) {
        with_divergence<S>(p, s.far, [&](const auto& divergence) {
          Point<S> point = divergence(q, w, r, log_q, log_p);
          if (unit) point = {T(0), T(0), -weighed<S>(w, log_q)};
          if (kind == Sweep::kPoints) {
            const int to = at_rest ? 3 : 0;
            v[0] += to ? 0.0 : static_cast<double>(point.value);
            v[1] += to ? 0.0 : static_cast<double>(point.g);
            v[2] += to ? 0.0 : static_cast<double>(point.h);
            v[3] += to ? static_cast<double>(point.value) : 0.0;
            v[4] += to ? static_cast<double>(point.g) : 0.0;
            v[5] += to ? static_cast<double>(point.h) : 0.0;
          }
          to_u = point.g - q * mean_g;
          to_v = point.h - w * mean_h;
        });
      } else if (!own) {
        const SlopePair<S> pair = slope(q, w, r, unit ? -log_q : r);
        to_u = pair.to_u;
        to_v = pair.to_v;
      }
      if (kind == Sweep::kPoints) continue;
      T gradient = static_cast<T>(slopes.soft) * to_u;
      if (use_hard || (unit && !renormalized)) {
        const T h = by_one(a - static_cast<T>(state->all.max)) * static_cast<T>(state->h_scale);
        const bool at_label = use_hard && column == label;
        gradient = gradient + (static_cast<T>(slopes.at_one) * h -
                               static_cast<T>(at_label ? state->share : slopes.shift));
      }
      if (unit && renormalized)
        gradient =
            gradient + static_cast<T>(slopes.unit) * (by_one(a - max_s) * static_cast<T>(state->unit_scale));
      if (own) gradient = static_cast<T>(state->label);
      if (kind == Sweep::kSums) {
        if (!own) {
          v[0] += to_u == T(0) ? 0.0 : static_cast<double>(to_u * (a - max_s));
          v[1] += static_cast<double>(to_u);
          v[2] += q == T(0) ? 0.0 : static_cast<double>(q * (a - max_s));
          v[3] += to_v == T(0) ? 0.0 : static_cast<double>(to_v * (b - max_t));
          v[4] += static_cast<double>(to_v);
          v[5] += w == T(0) ? 0.0 : static_cast<double>(w * (b - max_t));
        }
        v[6] += gradient == T(0) ? 0.0 : static_cast<double>(gradient * a);
        continue;
      }
      if (f.grad) {
        if (changes_gradient(p.student)) gradient = raw_gradient<S>(x, gradient, a, dot);
        store_one<T>(student_gradient() + column * size_of(p.student.dtype), p.student.dtype, gradient);
      }
      if (!g.d_values) continue;
      double of_value = to_value.label;
      const double y = static_cast<double>(b);
      if (!own)
        of_value = to_value.soft * static_cast<double>(to_v) -
                   (unit ? to_value.target_loss * exp(y - s.max_t - to_value.lse_u) : 0.0);
      if (to_value.rest != 0) of_value -= to_value.rest * exp(y - s.rest);
      put_value(k, static_cast<T>(of_value));
    }
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

  // The gradient of the classes that are not listed: its sum with standardised logits, or into memory.
  MFD_DEVICE double rest_gradient(bool writes, double dot) const {
    const AllClasses& all = state->all;
    const TopKSlopes& slopes = state->slopes;
    const bool at_one = use_hard || (unit && !renormalized);
    const double below = all.rest.max - all.max;
    const T max = static_cast<T>(all.rest.max), soft = static_cast<T>(slopes.rest);
    const T power = static_cast<T>(powers ? -slopes.powers * exp(below * degree / ts) : 0.0);
    const T h = static_cast<T>(at_one ? slopes.at_one * state->h_scale * exp(below) : 0.0);
    const T shift = static_cast<T>(slopes.shift), share = static_cast<T>(state->share);
    const int64_t own = use_hard && !decoupled ? label : -1, width = p.student.width;
    unsigned char* out = student_gradient();
    const bool wide = sizeof(T) == 4 && is_aligned(out);
    double sum = 0;
    over_vectors<S>(group, span, [&](int64_t start) {
      T a[N], gradient[N] = {};
      if (reads) {
        load_logits<S, false>(x, start, p.classes, a);
        const uint32_t marked = listed_bits<S>(bits, start - first);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const bool counts = start + k < p.classes && !(marked >> k & 1u);
          const T t = counts ? a[k] - max : static_cast<T>(-kInf), e = by_ts(t);
          if (!renormalized) gradient[k] = e * soft;
          if (powers) gradient[k] = gradient[k] + by_power(t) * power;
          if (at_one) gradient[k] = S::fma(hard(e, t), h, gradient[k]);
          gradient[k] = gradient[k] - (start + k == own ? share : shift);
          if (!counts) gradient[k] = T(0);
          if (!writes && gradient[k] != T(0)) sum += static_cast<double>(gradient[k] * a[k]);
          if (counts && changes_gradient(p.student)) gradient[k] = raw_gradient<S>(x, gradient[k], a[k], dot);
        }
      }
      if (writes) store_gradient<S>(out, p.student.dtype, start, width, wide, gradient);
    });
    return sum;
  }

  // Values and slopes, by one thread of every block; the row's part of the loss.
  MFD_DEVICE double settle_values(const Factors& factors, const double (&v)[7]) const {
    TopKState& st = *state;
    SoftTerm& s = st.s;
    const ClassPoint of_list = {v[0], v[1], v[2]};
    if (decoupled) {
      settle_target(p, ts, tt, of_list, s);
    } else {
      ClassPoint rest = {v[3], v[4], v[5]};
      if (powers) rest = power_point(p, rest_powers(st.all.rest.powers, degree, ts, s));
      settle_points(p, whole, of_list, rest, s);
    }
    const double weight = at<T>(f.weight, row);
    const double to_soft = weight * factors.soft * at<T>(g.grad_soft, row);
    const double to_hard = use_hard ? weight * factors.hard * at<T>(g.grad_hard, row) : 0.0;
    st.slopes = topk_slopes(p, renormalized, powers, to_soft, to_hard, ts, st.all, s);
    st.share = st.slopes.hard * label_share(p);
    st.label = decoupled ? decoupled_gradient(p, st.all, s, st.slopes) : 0.0;
    st.h_scale = use_hard || (unit && !renormalized) ? inverse_mass(st.all.lse_h) : 0.0;
    st.unit_scale =
        unit && renormalized ? inverse_mass(whole_lse(s.target.hard_student, s.label_x, log(s.sum_h))) : 0.0;
    st.values = value_factors(p, to_soft, ts, tt, s);
    if (group.part() != 0) return 0.0;
    const double soft =
        (p.scale_by_temperature ? ts * ts : 1.0) * s.value + (unit ? s.slopes.target_loss : 0.0);
    double hard_term = 0;
    if (use_hard) {
      RowSums sums{};
      const double label_x = st.all.label - st.all.max;
      sums.mean_x = (st.all.rest.sum_x + (decoupled ? label_x : 0.0)) / static_cast<double>(p.classes);
      hard_term = cross_entropy(sums, st.all.lse_h, label_x, p.smoothing);
    }
    put(f.soft, soft);
    put(f.hard, hard_term);
    for (int k = 0; f.stats && k < kStats; ++k) static_cast<T*>(f.stats)[row * kStats + k] = T(0);
    return weight * (factors.soft * soft + (use_hard ? factors.hard * hard_term : 0.0));
  }

  MFD_DEVICE double run(const Factors& factors, unsigned char* parking) {
    if (g.parked && reads) {
      park<S>(group, x, span, p.classes, parking);
      await_copies();
      group.sync();
    }
    if (p.student.standardize) find_centre<S, false>(group, x, x_global, span, p.classes);
    const Found found = add_up(gather());
    if (f.student_entropy) write_by_products<S>(*this, found);
    const bool gradients = f.grad || g.d_values || g.d_temperature || g.d_teacher_temperature;
    const bool dotted = f.grad && p.student.standardize;
    double loss = 0, dot = 0;
    for (int j = can_be_far(p) && whole ? 0 : 1; j < 4; ++j) {
      const Sweep kind = static_cast<Sweep>(j);
      if (kind == Sweep::kSums && !g.d_temperature && !g.d_teacher_temperature && !dotted) continue;
      double v[7] = {};
      if (kind == Sweep::kSums && dotted) v[6] = rest_gradient(false, 0.0);
      if (kind == Sweep::kWrite && f.grad) {
        rest_gradient(true, dot);
        write_zeros((p.classes + N - 1) / N * N);
        group.sync();  // whole vectors first, then the listed classes among them
      }
      sweep(kind, dot, v);
      if (kind == Sweep::kWrite) break;
      group.template reduce<Sum>(v);
      if (kind == Sweep::kDistance) {
        if (group.rank() == 0) state->s.far = v[0] >= kFarKL;
        group.sync();
        continue;
      }
      if (kind == Sweep::kSums) {
        dot = v[6];
        if (group.rank() == 0 && group.part() == 0) write_temperatures(factors, v);
        continue;
      }
      if (group.rank() == 0) loss = settle_values(factors, v);
      if (!gradients) break;
      group.sync();
    }
    // The next row takes the place of this one.
    group.sync();
    return loss;
  }

  MFD_DEVICE void write_temperatures(const Factors& factors, const double (&v)[7]) const {
    const ListedSums sums = {v[0], v[1], v[2], v[3], v[4], v[5]};
    const double factor = at<T>(f.weight, row) * factors.soft * at<T>(g.grad_soft, row);
    if (g.d_temperature)
      put(g.d_temperature,
          topk_temperature_gradient(p, renormalized, powers, factor, ts, state->all.rest, state->s, sums));
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
