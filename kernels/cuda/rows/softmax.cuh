// The softened logits of one side of a row, with a dtype that is known when the kernel is compiled.
//   16 bits:  distances from the maximum in bits, z = (x - max)*log2(e)/T by one fma, the hardware's 2^z;
//   float32:  distances in logits, exact where they are small, 2^z by polynomial, sums merged in float64.
// A NaN or an infinity shows in the distance, never in the exponential alone.
#pragma once

#include "cuda/rows/packed.cuh"

namespace mfd {
namespace device {

template <Dtype kDtype>
struct Softmax {
  typedef float Total;  // merged sums
  static constexpr double kLn2 = 0.69314718055994530942;
  float scale, shift = 0;

  MFD_DEVICE explicit Softmax(double temperature) : scale(static_cast<float>(1.0 / (kLn2 * temperature))) {}
  MFD_DEVICE void set_max(float max) { shift = max * scale; }
  MFD_DEVICE float distance(float x) const { return fmaf(x, scale, -shift); }
  MFD_DEVICE float exponential(float d) const { return exp2_fast(d); }
  // The distance of a column that is not there: its exponential is 0 (or at most 2^-126).
  static MFD_DEVICE float nothing() { return -1000.0f; }
  // v - u of the teacher's distance w and the student's u; `ratio` is Ts/Tt.
  static MFD_DEVICE float difference(float w, float u, float) { return w - u; }
  // Nats of a distance, at temperature `t`.
  static MFD_DEVICE float nats(float d, float) { return static_cast<float>(kLn2) * d; }
  static MFD_DEVICE float log(float x) { return static_cast<float>(kLn2) * log2_fast(x); }
  static MFD_DEVICE float divide(float a, float b) { return divide_fast(a, b); }
};

template <>
struct Softmax<Dtype::kFloat32> {
  typedef double Total;
  float high, low, floor, max = 0;  // log2(e)/T = high + low; floor: the distance of 2^-126

  MFD_DEVICE explicit Softmax(double temperature) {
    const double c = 1.4426950408889634074 / temperature;
    high = static_cast<float>(c);
    low = static_cast<float>(c - static_cast<double>(high));
    floor = static_cast<float>(-125.999 / c);
  }
  MFD_DEVICE void set_max(float m) { max = m; }
  MFD_DEVICE float distance(float x) const { return x - max; }
  MFD_DEVICE float nothing() const { return floor; }
  MFD_DEVICE float exponential(float d) const {
    d = fmaxf(d, floor);
    const float magic = 12582912.0f + 127.0f, shifted = fmaf(d, high, magic), k = shifted - magic;
    const float f = fmaf(d, low, fmaf(d, high, -k));
    return exp2_polynomial<F32>(f) * bits_as<float>(bits_as<uint32_t>(shifted) << 23);
  }
  static MFD_DEVICE float difference(float w, float u, float ratio) { return fmaf(w, ratio, -u); }
  static MFD_DEVICE double nats(double d, double t) { return d / t; }
  static MFD_DEVICE double log(double x) { return ::log(x); }
  static MFD_DEVICE double divide(double a, double b) { return a / b; }
};

}  // namespace device
}  // namespace mfd
