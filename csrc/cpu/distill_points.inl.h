// Second pass over a row of a pointwise divergence: r from the logits, then f, g and h of every class.

// Lanes past the end of the row hold q = p = 0 and r = NaN: nothing comes of them.

// (x - max)/T - lse for a block: a factor and two offsets, so that x - block max is exact.
struct LogScale {
  double block_max, inverse, shift;
  LogScale(double block, double row_max, double temperature, double lse)
      : block_max(block), inverse(1.0 / temperature), shift((block - row_max) / temperature - lse) {}
};

// Block maxima this close leave y - x with no larger error than their own differences have.
constexpr double kNearMaxima = 8.0;

// r = log p - log q = (y - my)/Tt - (x - mx)/Ts + shift. At one temperature and close maxima y - x comes first:
// exact where the teacher is near.
template <class S>
static void log_ratios(const typename S::T* x, const typename S::T* y, int64_t n, const LogScale& student,
                       const LogScale& teacher, typename S::T* r) {
  typedef typename S::T T;
  typedef typename S::V V;
  const T pad = static_cast<T>(kNan);
  const V inverse = S::splat(static_cast<T>(student.inverse));
  const V shift = S::splat(static_cast<T>(teacher.shift - student.shift));
  const double apart = teacher.block_max - student.block_max;
  if (teacher.inverse == student.inverse && apart <= kNearMaxima && apart >= -kNearMaxima) {
    const V gap = S::splat(static_cast<T>(apart));
    int64_t i = 0;
    for (; i + S::kWidth <= n; i += S::kWidth)
      S::store(r + i, S::fma(S::load(y + i) - S::load(x + i) - gap, inverse, shift));
    if (i < n)
      S::store(r + i,
               S::fma(S::load_first(y + i, n - i, pad) - S::load_first(x + i, n - i, pad) - gap, inverse, shift));
    return;
  }
  const V mx = S::splat(static_cast<T>(student.block_max)), my = S::splat(static_cast<T>(teacher.block_max));
  const V ratio = S::splat(static_cast<T>(teacher.inverse / student.inverse));
  for (int64_t i = 0; i < n; i += S::kWidth) {
    const int64_t left = n - i < S::kWidth ? n - i : S::kWidth;
    const V tx = S::load_first(x + i, left, pad) - mx, ty = S::load_first(y + i, left, pad) - my;
    S::store(r + i, S::fma(S::fma(ty, ratio, -tx), inverse, shift));
  }
}

// log q = (x - mx)/Ts + shift
template <class S>
static void log_probabilities(const typename S::T* x, int64_t n, const LogScale& scale, typename S::T* out) {
  typedef typename S::T T;
  typedef typename S::V V;
  const V m = S::splat(static_cast<T>(scale.block_max)), inverse = S::splat(static_cast<T>(scale.inverse)),
          shift = S::splat(static_cast<T>(scale.shift));
  for (int64_t i = 0; i < n; i += S::kWidth) {
    const int64_t left = n - i < S::kWidth ? n - i : S::kWidth;
    S::store(out + i, S::fma(S::load_first(x + i, left, static_cast<T>(kNan)) - m, inverse, shift));
  }
}

// Sums of f, g and h over a block of exponentials e_s, e_t (times q_scale, p_scale the probabilities). With kKeep g
// takes the place of e_t, for the gradient, and the sum of h is left out.
template <class S, bool kKeep, class D>
static void block_points(const D& divergence, const typename S::T* es, typename S::T* et, const typename S::T* r,
                         const typename S::T* log_q, const typename S::T* log_p, int64_t n, double q_scale,
                         double p_scale, BlockSums* out) {
  typedef typename S::T T;
  typedef typename S::V V;
  const V cq = S::splat(static_cast<T>(q_scale)), cp = S::splat(static_cast<T>(p_scale));
  V value{}, g{}, h{};
  for (int64_t i = 0; i < n; i += S::kWidth) {
    const Point<S> point = divergence(S::load(es + i) * cq, S::load(et + i) * cp, S::load(r + i),
                                      D::kTakesLogs ? S::load(log_q + i) : V{},
                                      D::kTakesLogs ? S::load(log_p + i) : V{});
    value = value + point.value;
    g = g + point.g;
    if (kKeep) {
      S::store(et + i, point.g);
    } else {
      h = h + point.h;
    }
  }
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
  T* r = static_cast<T*>(scratch.block_r);
  T* log_q = static_cast<T*>(scratch.block_q);
  T* log_p = static_cast<T*>(scratch.block_p);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t start = b * kBlock, n = p.classes - start < kBlock ? p.classes - start : kBlock;
    BlockSums& sums = scratch.sums[b];
    const LogScale student(sums.max_s, row.max_s, c.ts, lse_s), teacher(sums.max_t, row.max_t, c.tt, lse_t);
    const T* x = c.student_block(start, n, scratch);
    const T* y = load_block<S>(c.y, start, n, static_cast<T*>(scratch.block_y)).x;
    log_ratios<S>(x, y, n, student, teacher, r);
    T* es = static_cast<T*>(scratch.exp_s) + start;
    T* et = static_cast<T*>(scratch.exp_t) + start;
    const double q_scale = block_weight(sums.max_s, row.max_s, c.ts) / row.sum_s;
    const double p_scale = block_weight(sums.max_t, row.max_t, c.tt) / row.sum_t;
    with_divergence<S>(p, [&](const auto& divergence) {
      if (divergence.kTakesLogs) {
        log_probabilities<S>(x, n, student, log_q);
        log_probabilities<S>(y, n, teacher, log_p);
      }
      block_points<S, kKeep>(divergence, es, et, r, log_q, log_p, n, q_scale, p_scale, &sums);
    });
  }
}
