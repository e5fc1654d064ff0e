// Second pass over a row of a pointwise divergence: r from the logits, then f, g and h of every class.

// (x - max)/T - lse for a block: a factor and two offsets, so that x - block max is exact.
struct LogScale {
  double block_max, inverse, shift;
  LogScale(double block, double row_max, double temperature, double lse)
      : block_max(block), inverse(1.0 / temperature), shift((block - row_max) / temperature - lse) {}
};

// Block maxima this close leave y - x with no larger error than their own differences have.
constexpr double kNearMaxima = 8.0;

// Logarithms of the softened probabilities from the logits of one block:
//   log q = (x - mx)/Ts + shift, log p likewise, r = log p - log q = (y - my)/Tt - (x - mx)/Ts + shift.
// `near`: at one temperature and close maxima r = ((y - x) - (my - mx))/T + shift, exact where the teacher is
// near.
template <class S>
struct Logs {
  typedef typename S::V V;
  typedef typename S::T T;
  bool near;
  V mx, my, gap, ratio, inverse_s, inverse_t, shift, shift_s, shift_t;

  Logs(const LogScale& student, const LogScale& teacher) {
    const double apart = teacher.block_max - student.block_max;
    near = teacher.inverse == student.inverse && apart <= kNearMaxima && apart >= -kNearMaxima;
    mx = S::splat(static_cast<T>(student.block_max));
    my = S::splat(static_cast<T>(teacher.block_max));
    gap = S::splat(static_cast<T>(apart));
    ratio = S::splat(static_cast<T>(teacher.inverse / student.inverse));
    inverse_s = S::splat(static_cast<T>(student.inverse));
    inverse_t = S::splat(static_cast<T>(teacher.inverse));
    shift_s = S::splat(static_cast<T>(student.shift));
    shift_t = S::splat(static_cast<T>(teacher.shift));
    shift = S::splat(static_cast<T>(teacher.shift - student.shift));
  }

  template <bool kNear>
  __attribute__((always_inline)) inline V r(V x, V y) const {
    const V d = kNear ? y - x - gap : S::fma(y - my, ratio, mx - x);
    return S::fma(d, inverse_s, shift);
  }
  __attribute__((always_inline)) inline V log_q(V x) const { return S::fma(x - mx, inverse_s, shift_s); }
  __attribute__((always_inline)) inline V log_p(V y) const { return S::fma(y - my, inverse_t, shift_t); }
};

// The divergence at one vector of logits and probabilities.
template <class S, bool kNear, class D>
MFD_INLINE Point<S> point_at(const D& divergence, const Logs<S>& logs, typename S::V x, typename S::V y,
                             typename S::V q, typename S::V p) {
  typedef typename S::V V;
  return divergence(q, p, logs.template r<kNear>(x, y), D::kTakesLogs ? logs.log_q(x) : V{},
                    D::kTakesLogs ? logs.log_p(y) : V{});
}

// Sums of f, g and h over a block of exponentials e_s, e_t (times q_scale, p_scale the probabilities). With
// kKeep g takes the place of e_t, for the gradient, and the sum of h is left out.
template <class S, bool kKeep, bool kNear, class D>
static void block_points(const D& divergence, const Logs<S>& logs, const typename S::T* x,
                         const typename S::T* y, const typename S::T* es, typename S::T* et, int64_t n,
                         double q_scale, double p_scale, BlockSums* out) {
  typedef typename S::T T;
  typedef typename S::V V;
  const V cq = S::splat(static_cast<T>(q_scale)), cp = S::splat(static_cast<T>(p_scale));
  V value{}, g{}, h{};
  const auto step = [&](V logit_x, V logit_y, int64_t i) {
    const Point<S> point =
        point_at<S, kNear>(divergence, logs, logit_x, logit_y, S::load(es + i) * cq, S::load(et + i) * cp);
    value = value + point.value;
    g = g + point.g;
    if (kKeep) {
      S::store(et + i, point.g);
    } else {
      h = h + point.h;
    }
  };
  int64_t i = 0;
  for (; i + S::kWidth <= n; i += S::kWidth) step(S::load(x + i), S::load(y + i), i);
  // Lanes past the end hold q = p = 0 and r = NaN: nothing comes of them.
  const T pad = static_cast<T>(kNan);
  if (i < n) step(S::load_first(x + i, n - i, pad), S::load_first(y + i, n - i, pad), i);
  out->value = S::sum(value);
  out->g = S::sum(g);
  out->h = kKeep ? 0.0 : static_cast<double>(S::sum(h));
}

// The second pass over blocks [begin, end) of one row.
template <class S, bool kKeep>
static void row_points(const RowContext<S>& c, const RowSums& row, int64_t begin, int64_t end,
                       const Scratch& scratch) {
  typedef typename S::T T;
  const Problem& p = c.f.problem;
  const double lse_s = log(row.sum_s), lse_t = log(row.sum_t);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t start = b * kBlock, n = p.classes - start < kBlock ? p.classes - start : kBlock;
    BlockSums& sums = scratch.sums[b];
    const LogScale student(sums.max_s, row.max_s, c.ts, lse_s), teacher(sums.max_t, row.max_t, c.tt, lse_t);
    const T* x = c.student_block(start, n, scratch);
    const T* y = load_block<S>(c.y, start, n, static_cast<T*>(scratch.block_y)).x;
    const Logs<S> logs(student, teacher);
    T* es = static_cast<T*>(scratch.exp_s) + start;
    T* et = static_cast<T*>(scratch.exp_t) + start;
    const double q_scale = block_weight(sums.max_s, row.max_s, c.ts) / row.sum_s;
    const double p_scale = block_weight(sums.max_t, row.max_t, c.tt) / row.sum_t;
    with_divergence<S>(p, [&](const auto& divergence) {
      if (logs.near) {
        block_points<S, kKeep, true>(divergence, logs, x, y, es, et, n, q_scale, p_scale, &sums);
      } else {
        block_points<S, kKeep, false>(divergence, logs, x, y, es, et, n, q_scale, p_scale, &sums);
      }
    });
  }
}
