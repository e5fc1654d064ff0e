// feature_loss of taps of one dtype whose rows begin where 16 bytes do, with the student's gradient or none:
// a warp or a block per row, each thread holds its columns of the pair in registers.
#pragma once

#include "cuda/features/feature_loss.cuh"
#include "cuda/rows/packed.cuh"

namespace mfd {
namespace device {

constexpr int kTapVectors = 4;  // of a thread, at most

template <class Group>
struct TapThreads {
  static constexpr int kThreads = 256, kBlocks = 2;
};
template <>
struct TapThreads<Warp> {
  static constexpr int kThreads = 128, kBlocks = 4;
};

// Rows [N, width] of a dtype, eight columns at a time.
template <Dtype kDtype>
MFD_INLINE const unsigned char* row_at(const RowMatrix& m, int64_t row) {
  return static_cast<const unsigned char*>(m.data) + matrix_offset(m, row) * Packed<kDtype>::kBytes;
}

// Of an output, which need not be aligned.
template <Dtype kDtype>
MFD_INLINE void store_eight(unsigned char* to, bool aligned, const float (&x)[8]) {
  if (aligned) return Packed<kDtype>::of(x).store_once(to);
#pragma unroll
  for (int k = 0; k < 8; ++k) store_one<float>(to + k * Packed<kDtype>::kBytes, kDtype, x[k]);
}

// The pair of one row: the columns from 8*(rank + v*threads), 0 beyond the width.
template <Dtype kDtype, int kKind, class Group>
struct LeanPair {
  typedef Packed<kDtype> Pack;
  static constexpr FeatureKind kFeatureKind = static_cast<FeatureKind>(kKind);
  const Group& group;
  int width;
  Pack s[kTapVectors], t[kTapVectors];

  MFD_DEVICE LeanPair(const Group& threads, const Tap& tap, int64_t row)
      : group(threads), width(static_cast<int>(tap.width)) {
    const unsigned char* const student = row_at<kDtype>(tap.student, row);
    const unsigned char* const teacher = row_at<kDtype>(tap.teacher, row);
#pragma unroll
    for (int v = 0; v < kTapVectors; ++v) {
      const int first = column(v);
      s[v] = t[v] = Pack{};
      if (first < width) {
        s[v] = Pack::load_once(student + first * Pack::kBytes);
        t[v] = Pack::load_once(teacher + first * Pack::kBytes);
      }
    }
  }

  MFD_DEVICE int column(int v) const { return 8 * (group.rank() + v * group.threads()); }

  MFD_DEVICE void get(int v, float (&x)[8], float (&y)[8]) const {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      x[k] = s[v].value(k);
      y[k] = t[v].value(k);
    }
  }

  // The sums of feature_row_of_sums, of the rows times `of_s` and `of_t` where kScaled.
  template <bool kScaled>
  MFD_DEVICE void add_up(float of_s, float of_t, double (&sums)[3]) const {
    float own[3] = {};
#pragma unroll
    for (int v = 0; v < kTapVectors; ++v) {
      float x[8], y[8];
      get(v, x, y);
      if (kScaled) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          x[k] = x[k] * of_s;
          y[k] = y[k] * of_t;
        }
      }
      add_features<F32, kKind>(x, y, own);
    }
    constexpr int kSums = kKind == kCosine ? 3 : 1;
    double v[kSums];
#pragma unroll
    for (int k = 0; k < kSums; ++k) v[k] = static_cast<double>(own[k]);
    group.template reduce<Sum>(v);
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] = v[k];
  }

  MFD_DEVICE FeatureRow distance() const {
    double sums[3] = {};
    add_up<false>(1.0f, 1.0f, sums);
    int of_s = 0, of_t = 0;
    if constexpr (kKind == kCosine) {
      of_s = norm_exponent(sums[1], false);
      of_t = norm_exponent(sums[2], false);
      if (of_s || of_t) add_up<true>(power_of_two<float>(of_s), power_of_two<float>(of_t), sums);
    }
    return feature_row_of_sums(kFeatureKind, sums[0], sums[1], sums[2], width, of_s, of_t);
  }

  // The student's gradient of factor*distance.
  MFD_DEVICE void write(const FeatureRow& f, double factor, unsigned char* out) const {
    const float a = static_cast<float>(factor * f.a), b = static_cast<float>(factor * f.b);
    const bool aligned = is_aligned(out);
#pragma unroll
    for (int v = 0; v < kTapVectors; ++v) {
      const int first = column(v);
      if (first >= width) continue;
      float x[8], y[8], g[8];
      get(v, x, y);
      feature_gradient<F32>(kFeatureKind, x, y, a, b, f.of_student, f.of_teacher, g);
      store_eight<kDtype>(out + first * Pack::kBytes, aligned, g);
    }
  }
};

template <Dtype kDtype, class Group>
MFD_INLINE void write_zero_row(const Group& group, unsigned char* out, int64_t width) {
  const float zeros[8] = {};
  const bool aligned = is_aligned(out);
  for (int64_t k = group.rank() * 8; k < width; k += group.threads() * 8)
    store_eight<kDtype>(out + k * Packed<kDtype>::kBytes, aligned, zeros);
}

template <Dtype kDtype, int kKind, class Group>
__global__ void __launch_bounds__(TapThreads<Group>::kThreads, TapThreads<Group>::kBlocks)
    lean_match_taps(const __grid_constant__ FeatureLaunch launch) {
  const FeatureTap& of = tap_of_block(launch);
  const Tap& tap = of.tap;
  Team::Shared* const shared = reinterpret_cast<Team::Shared*>(dynamic_shared());
  const Group group(reinterpret_cast<typename Group::Shared*>(shared));
  const Team block(shared, true);
  const double share = launch.loss ? share_of<float>(launch, of, block) : 0.0;
  const int64_t step = int64_t{of.blocks} * group.in_block();
  double loss[1] = {0};
  for (int64_t row =
           (static_cast<int64_t>(blockIdx.x) - of.first_block) * group.in_block() + group.index_in_block();
       row < tap.n_rows; row += step) {
    unsigned char* const out =
        tap.d_student ? static_cast<unsigned char*>(tap.d_student) + row * tap.width * Packed<kDtype>::kBytes
                      : nullptr;
    double value = 0;
    if (!tap.mask || tap.mask[row]) {
      const LeanPair<kDtype, kKind, Group> pair(group, tap, row);
      const FeatureRow f = pair.distance();
      value = f.value;
      if (out) pair.write(f, launch.loss ? share : at<float>(tap.grad_rows, row), out);
      if (group.rank() == 0) loss[0] += share * value;
    } else if (out) {
      write_zero_row<kDtype>(group, out, tap.width);
    }
    if (tap.distances && group.rank() == 0)
      static_cast<float*>(tap.distances)[row] = static_cast<float>(value);
  }
  if (!launch.loss) return;
  __syncthreads();
  block.template reduce<Sum>(loss);
  finish_taps<float>(launch, block, loss[0]);
}

}  // namespace device
}  // namespace mfd
