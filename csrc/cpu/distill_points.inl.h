// Second pass over a row of a pointwise divergence: f, g and h of every class from the exponentials and the
// differences of the logits that the first pass has left in scratch.

// Sums of f, g and h over a block of exponentials e_s, e_t (times q_scale, p_scale the probabilities) and
// differences d: r = d/Ts + moved. With kKeep g takes the place of e_t, for the gradient, and the sum of h is
// left out.
template <class S, bool kKeep, class D>
static void block_points(const D& divergence, const LogScale& student, const LogScale& teacher,
                         const typename S::T* x, const typename S::T* y, const Kept<typename S::T>& kept,
                         int64_t n, double q_scale, double p_scale, double moved, BlockSums* out) {
  typedef typename S::T T;
  typedef typename S::V V;
  const V cq = S::splat(static_cast<T>(q_scale)), cp = S::splat(static_cast<T>(p_scale));
  const V inverse = S::splat(static_cast<T>(student.inverse));
  const V shift = S::splat(static_cast<T>(moved));
  const LogOf<S> log_q(student), log_p(teacher);
  V value{}, g{}, h{};
  // Lanes past the end hold q = p = 0 and r = NaN: nothing comes of them.
  for (int64_t i = 0; i < n; i += S::kWidth) {
    V logit_x{}, logit_y{};
    if (D::kTakesLogs) {
      const int64_t left = n - i < S::kWidth ? n - i : S::kWidth;
      logit_x = log_q(S::load_first(x + i, left, T(0)));
      logit_y = log_p(S::load_first(y + i, left, T(0)));
    }
    const V r = S::fused(S::load(kept.difference + i), inverse, shift);
    const Point<S> point =
        divergence(S::load(kept.es + i) * cq, S::load(kept.et + i) * cp, r, logit_x, logit_y);
    value = value + point.value;
    g = g + point.g;
    if (kKeep) {
      S::store(kept.et + i, point.g);
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
  const bool far = is_far(p, row);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t start = b * kBlock, n = p.classes - start < kBlock ? p.classes - start : kBlock;
    BlockSums& sums = scratch.sums[b];
    const LogScale student(sums.max_s, row.max_s, c.ts, lse_s), teacher(sums.max_t, row.max_t, c.tt, lse_t);
    const Kept<T> kept = {static_cast<T*>(scratch.exp_s) + start, static_cast<T*>(scratch.exp_t) + start,
                          nullptr, static_cast<T*>(scratch.difference) + start};
    const double q_scale = block_weight(sums.max_s, row.max_s, c.ts) / row.sum_s;
    const double p_scale = block_weight(sums.max_t, row.max_t, c.tt) / row.sum_t;
    double moved = teacher.shift - student.shift;
    if (is_of_mean(p.divergence)) moved += rounding<T>(p_scale) - rounding<T>(q_scale);
    with_divergence<S>(p, far, [&](const auto& divergence) {
      const T *x = nullptr, *y = nullptr;
      if (divergence.kTakesLogs) {
        x = c.student_block(start, n, scratch);
        y = load_block<S>(c.y, start, n, static_cast<T*>(scratch.block_y)).x;
      }
      block_points<S, kKeep>(divergence, student, teacher, x, y, kept, n, q_scale, p_scale, moved, &sums);
    });
  }
}
