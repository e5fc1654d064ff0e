// Values and slopes of the divergences in the lean kernels. Each has, for the sums of a row's first pass,
//   points   of those that need a second one: their part in the kPoints sums
//   settle   the value K, and the constants of the slope, from both sums
//   slope    d loss/dx of the soft term for eight columns
// In bits, for 16-bit logits: log2 p, log2 q are the distances less log2 of the sums.
#pragma once

#include "cuda/distill/lean_sides.cuh"

namespace mfd {
namespace device {

// K = sum p*(v - u) - log(sum_t/sum_s); slope (e*sum_t/sum_s - f)/sum_t. Equal rows give exactly 0: u = v,
// the ratio is 1, fma(e, 1, -e) = 0.
template <Dtype kDtype, Divergence kDivergence, bool kLabels>
struct LeanDivergence {
  static_assert(kDivergence == Divergence::kForwardKL, "the others are below");
  typedef LeanSides<kDtype, kDivergence, kLabels> Sides;
  typedef typename Sides::S S;
  typedef typename S::Total Total;
  typedef Packed<kDtype> Pack;
  typedef LeanSums<kDivergence, kLabels> Sums;
  static constexpr int kPoints = 0;
  float quotient, factor;
  Total value;

  MFD_DEVICE LeanDivergence(const LeanTerms<kDtype, kLabels>& terms, const Sides&,
                            const Total (&v)[Sums::kCount], float weight) {
    const Total s = v[Sums::kStudent], t = v[Sums::kTeacher];
    value = S::nats(S::divide(v[Sums::kCross], t), terms.ts) - S::log(t / s);
    quotient = static_cast<float>(t / s);
    factor = static_cast<float>(S::divide(terms.soft_slope * weight, t));
  }
  // With labels less `shift`; without, that is 0 and takes no instruction.
  MFD_DEVICE void slope(const Sides&, const Pack&, const Pack&, const float (&e)[8], const float (&f)[8],
                        float shift, float (&g)[8]) const {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float difference = fmaf(e[k], quotient, -f[k]);
      g[k] = kLabels ? fmaf(difference, factor, -shift) : difference * factor;
    }
  }
};

// K = sum q*(u - v) - log(sum_s/sum_t); slope e/sum_s*(u - v - E_q[u - v]).
template <Dtype kDtype, bool kLabels>
struct LeanDivergence<kDtype, Divergence::kReverseKL, kLabels> {
  typedef LeanSides<kDtype, Divergence::kReverseKL, kLabels> Sides;
  typedef typename Sides::S S;
  typedef typename S::Total Total;
  typedef Packed<kDtype> Pack;
  typedef LeanSums<Divergence::kReverseKL, kLabels> Sums;
  static constexpr int kPoints = 0;
  float mean, factor;
  Total value;

  MFD_DEVICE LeanDivergence(const LeanTerms<kDtype, kLabels>& terms, const Sides&,
                            const Total (&v)[Sums::kCount], float weight) {
    const Total s = v[Sums::kStudent], t = v[Sums::kTeacher], cross = S::divide(v[Sums::kCross], s);
    value = S::nats(cross, terms.ts) - S::log(s / t);
    mean = static_cast<float>(cross);
    factor = static_cast<float>(S::nats(S::divide(terms.soft_slope * weight, s), terms.ts));
  }
  MFD_DEVICE void slope(const Sides& sides, const Pack& x, const Pack& y, const float (&e)[8],
                        const float (&)[8], float shift, float (&g)[8]) const {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float u = sides.student.distance(x.value(k)), w = sides.teacher.distance(y.value(k));
      const float slope = (-S::difference(w, u, sides.ratio) - mean) * factor;
      g[k] = kLabels ? fmaf(e[k], slope, -shift) : e[k] * slope;
    }
  }
};

// K = sum |q - p|/2; slope q*(sign(q - p) - E_q[sign])/2, of e*sum_t/sum_s - f, which is 0 at a tie.
template <Dtype kDtype, bool kLabels>
struct LeanDivergence<kDtype, Divergence::kTVD, kLabels> {
  typedef LeanSides<kDtype, Divergence::kTVD, kLabels> Sides;
  typedef typename Sides::S S;
  typedef typename S::Total Total;
  typedef Packed<kDtype> Pack;
  typedef LeanSums<Divergence::kTVD, kLabels> Sums;
  static constexpr int kPoints = 2;  // sum |e*quotient - f|, sum e*sign
  float quotient, half_s, half_t;    // half_s: 1/(2 sum_s)
  float above, tie, below;           // slopes of e
  Total value;

  MFD_DEVICE LeanDivergence(const LeanTerms<kDtype, kLabels>&, const Sides&, const Total (&v)[Sums::kCount],
                            float) {
    const Total s = v[Sums::kStudent], t = v[Sums::kTeacher];
    quotient = static_cast<float>(t / s);
    half_s = static_cast<float>(S::divide(Total(0.5), s));
    half_t = static_cast<float>(S::divide(Total(0.5), t));
  }
  template <bool kEdge>
  MFD_DEVICE void points(const Sides&, const typename Sides::Row&, int, const Pack&, const Pack&,
                         const float (&e)[8], const float (&f)[8], float (&sums)[kPoints]) const {
    float distance = 0, sign = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float difference = fmaf(e[k], quotient, -f[k]);
      distance += fabsf(difference);
      sign += difference > 0 ? e[k] : difference < 0 ? -e[k] : 0.0f;
    }
    sums[0] += distance;
    sums[1] += sign;
  }
  MFD_DEVICE void settle(const LeanTerms<kDtype, kLabels>& terms, const Total (&v)[kPoints], float weight) {
    value = v[0] * half_t;
    const float factor = terms.soft_slope * weight * half_s, mean = static_cast<float>(v[1]) * (2 * half_s);
    above = factor * (1 - mean);
    tie = factor * -mean;
    below = factor * (-1 - mean);
  }
  MFD_DEVICE void slope(const Sides&, const Pack&, const Pack&, const float (&e)[8], const float (&f)[8],
                        float shift, float (&g)[8]) const {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float difference = fmaf(e[k], quotient, -f[k]);
      const float slope = difference > 0 ? above : difference < 0 ? below : tie;
      g[k] = kLabels ? fmaf(e[k], slope, -shift) : e[k] * slope;
    }
  }
};

// Those whose logarithms the lean kernels take in bits, of logits of 16 bits alone.
constexpr bool is_in_bits(Divergence d) {
  return d == Divergence::kJSD || d == Divergence::kSkewKL || d == Divergence::kSkewReverseKL;
}

// A class in the divergences from the mean m = share*p + (1 - share)*q: from the greater of p and q, so that
// nothing overflows, and with exact values where p = q.
struct OfMeanInBits {
  float q, p, log_qm, log_pm;  // log2 of q/m, p/m
  float tilt;                  // (q - p)/m, or -p/m

  // From log2 q and log2 p; `near` is 1, or 0 for the tilt -p/m, which keeps the digits of a p that is far
  // below q.
  template <bool kTilt>
  static MFD_DEVICE OfMeanInBits of(float u, float w, float share, float near) {
    OfMeanInBits c;
    const float r = w - u;
    const bool teacher_above = r > 0;
    const float rho = exp2_fast(-fabsf(r));  // of the lesser over the greater
    const float over = fmaf(teacher_above ? 1.0f - share : share, rho - 1.0f, 1.0f);  // m over the greater
    const float log_m = log2_fast(over), greater = exp2_fast(fmaxf(u, w)), lesser = greater * rho;
    c.q = teacher_above ? lesser : greater;
    c.p = teacher_above ? greater : lesser;
    c.log_qm = -log_m - fmaxf(r, 0.0f);
    c.log_pm = fminf(r, 0.0f) - log_m;
    if (kTilt) c.tilt = (teacher_above ? fmaf(rho, near, -1.0f) : near - rho) * reciprocal_fast(over);
    return c;
  }
};

// JSD: K = share*E_p[log p/m] + (1 - share)*E_q[log q/m], slope (1 - share)*q*(log q/m - E_q[log q/m]).
// Skew KL: K = E_p[log p/m], slope (1 - share)^2*q*(tilt - E_q[tilt]), with -p/m for (1 - share)*tilt where p
// is far from q, as is_far has it. Skew reverse KL: K = E_q[log q/m], df/dq = log q/m - share*(1 -
// share)*tilt.
template <Dtype kDtype, Divergence kDivergence, bool kLabels>
struct LeanOfMean {
  static_assert(is_in_bits(kDivergence) && kDtype != Dtype::kFloat32, "in bits");
  typedef LeanSides<kDtype, kDivergence, kLabels> Sides;
  typedef typename Sides::S S;
  typedef float Total;
  typedef Packed<kDtype> Pack;
  typedef LeanSums<kDivergence, kLabels> Sums;
  static constexpr bool kJSD = kDivergence == Divergence::kJSD, kSkew = kDivergence == Divergence::kSkewKL;
  static constexpr int kPoints = 2;  // JSD: E_p[log p/m], E_q[log q/m]; else the value, E_q[tilt]
  float sum_s, to_q, to_p, share;    // to_q: what makes log2 q of a distance
  float near = 1;                    // 0: far
  float log_slope, tilt_slope, mean;
  float value;

  MFD_DEVICE LeanOfMean(const LeanTerms<kDtype, kLabels>& terms, const Sides&, const float (&v)[Sums::kCount],
                        float)
      : sum_s(v[Sums::kStudent]), share(terms.teacher_share) {
    to_q = -log2_fast(sum_s);
    to_p = -log2_fast(v[Sums::kTeacher]);
    if constexpr (kSkew) {
      const float t = v[Sums::kTeacher];
      const float kl = S::nats(S::divide(v[Sums::kCross], t), terms.ts) - S::log(t / sum_s);
      near = kl >= static_cast<float>(kFarKL) ? 0.0f : 1.0f;
    }
  }
  template <bool kEdge>
  MFD_DEVICE void points(const Sides& sides, const typename Sides::Row& row, int first, const Pack& x,
                         const Pack& y, const float (&)[8], const float (&)[8],
                         float (&sums)[kPoints]) const {
    float a = 0, b = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      float u, w;
      sides.template distances<kEdge>(row, first, x, y, k, u, w);
      const OfMeanInBits c = OfMeanInBits::of<!kJSD>(u + to_q, w + to_p, share, near);
      a = kJSD || kSkew ? fmaf(c.p, c.log_pm, a) : fmaf(c.q, c.log_qm, a);
      b = fmaf(c.q, kJSD ? c.log_qm : c.tilt, b);
    }
    sums[0] += a;
    sums[1] += b;
  }
  MFD_DEVICE void settle(const LeanTerms<kDtype, kLabels>& terms, const float (&v)[kPoints], float weight) {
    const float factor = terms.soft_slope * weight, ln2 = S::nats(1.0f, 1.0f), other = 1.0f - share;
    value = ln2 * (kJSD ? fmaf(share, v[0], other * v[1]) : v[0]);
    log_slope = kSkew ? 0.0f : factor * ln2 * (kJSD ? other : 1.0f);
    tilt_slope = kJSD ? 0.0f : factor * other * (!kSkew ? -share : near != 0 ? other : 1.0f);
    mean = kJSD ? log_slope * v[1] : kSkew ? tilt_slope * v[1] : fmaf(log_slope, v[0], tilt_slope * v[1]);
  }
  MFD_DEVICE void slope(const Sides& sides, const Pack& x, const Pack& y, float (&e)[8], const float (&)[8],
                        float shift, float (&g)[8]) const {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float u = sides.student.distance(x.value(k)) + to_q,
                  w = sides.teacher.distance(y.value(k)) + to_p;
      const OfMeanInBits c = OfMeanInBits::of<!kJSD>(u, w, share, near);
      const float q = exp2_fast(u);
      float slope = kSkew ? fmaf(tilt_slope, c.tilt, -mean) : fmaf(log_slope, c.log_qm, -mean);
      if constexpr (!kJSD && !kSkew) slope = fmaf(tilt_slope, c.tilt, slope);
      g[k] = kLabels ? fmaf(q, slope, -shift) : q * slope;
      if (kLabels) e[k] = q * sum_s;
    }
  }
};

template <Dtype kDtype, bool kLabels>
struct LeanDivergence<kDtype, Divergence::kJSD, kLabels> : LeanOfMean<kDtype, Divergence::kJSD, kLabels> {
  using LeanOfMean<kDtype, Divergence::kJSD, kLabels>::LeanOfMean;
};
template <Dtype kDtype, bool kLabels>
struct LeanDivergence<kDtype, Divergence::kSkewKL, kLabels>
    : LeanOfMean<kDtype, Divergence::kSkewKL, kLabels> {
  using LeanOfMean<kDtype, Divergence::kSkewKL, kLabels>::LeanOfMean;
};
template <Dtype kDtype, bool kLabels>
struct LeanDivergence<kDtype, Divergence::kSkewReverseKL, kLabels>
    : LeanOfMean<kDtype, Divergence::kSkewReverseKL, kLabels> {
  using LeanOfMean<kDtype, Divergence::kSkewReverseKL, kLabels>::LeanOfMean;
};

}  // namespace device
}  // namespace mfd
