// Eight neighbouring logits of a dtype that is known when the kernel is compiled: one or two words of 16
// bytes.
#pragma once

#include "cuda/rows/packed_math.cuh"
#include "cuda/rows/rows.cuh"

namespace mfd {
namespace device {

template <Dtype kDtype>
struct Packed {
  static constexpr int kColumns = 8, kBytes = kDtype == Dtype::kFloat32 ? 4 : 2;
  static constexpr int kWords = kColumns * kBytes / 16;
  uint4 words[kWords];

  // Of 16-byte aligned memory.
  static MFD_DEVICE Packed load(const unsigned char* from) {
    Packed p;
#pragma unroll
    for (int k = 0; k < kWords; ++k) p.words[k] = reinterpret_cast<const uint4*>(from)[k];
    return p;
  }
  MFD_DEVICE void store(unsigned char* to) const {
#pragma unroll
    for (int k = 0; k < kWords; ++k) reinterpret_cast<uint4*>(to)[k] = words[k];
  }
  // Streamed past the caches: nobody reads it again here.
  static MFD_DEVICE Packed load_once(const unsigned char* from) {
    Packed p;
#pragma unroll
    for (int k = 0; k < kWords; ++k) p.words[k] = load_16_bytes_once(from + 16 * k);
    return p;
  }
  MFD_DEVICE void store_once(unsigned char* to) const {
#pragma unroll
    for (int k = 0; k < kWords; ++k) store_16_bytes_once(to + 16 * k, words[k]);
  }

  MFD_DEVICE uint32_t word(int k) const {
    const uint4& w = words[k / 4];
    return k % 4 == 0 ? w.x : k % 4 == 1 ? w.y : k % 4 == 2 ? w.z : w.w;
  }
  MFD_DEVICE float value(int k) const {
    if constexpr (kDtype == Dtype::kFloat32) return bits_as<float>(word(k));
    const uint32_t w = word(k / 2);
    if constexpr (kDtype == Dtype::kBFloat16) return bits_as<float>(k % 2 ? w & 0xffff0000u : w << 16);
    return half_to_float(static_cast<uint16_t>(k % 2 ? w >> 16 : w & 0xffffu));
  }
  // -inf in column k.
  MFD_DEVICE void set_lowest(int k) {
    constexpr uint32_t kLowest = kDtype == Dtype::kFloat16 ? 0xfc00u : 0xff80u;
    uint4& w = words[kDtype == Dtype::kFloat32 ? k / 4 : 0];
    const int i = kDtype == Dtype::kFloat32 ? k % 4 : k / 2;
    uint32_t& to = i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w;
    if (kDtype == Dtype::kFloat32) {
      to = kLowest << 16;
    } else {
      to = k % 2 ? (to & 0xffffu) | kLowest << 16 : (to & 0xffff0000u) | kLowest;
    }
  }
  static MFD_DEVICE Packed of(const float (&x)[kColumns]) {
    Packed p;
    uint32_t w[4 * kWords];
#pragma unroll
    for (int k = 0; k < 4 * kWords; ++k) {
      if constexpr (kDtype == Dtype::kFloat32) w[k] = bits_as<uint32_t>(x[k]);
      if constexpr (kDtype == Dtype::kBFloat16) w[k] = pack_bfloats(x[2 * k], x[2 * k + 1]);
      if constexpr (kDtype == Dtype::kFloat16) w[k] = pack_halves(x[2 * k], x[2 * k + 1]);
    }
#pragma unroll
    for (int k = 0; k < kWords; ++k) p.words[k] = {w[4 * k], w[4 * k + 1], w[4 * k + 2], w[4 * k + 3]};
    return p;
  }
};

// The largest of what it has taken; a NaN counts as nothing.
template <Dtype kDtype>
struct Largest {
  uint32_t pair = kDtype == Dtype::kBFloat16 ? 0xff80ff80u : 0xfc00fc00u;
  MFD_DEVICE void take(const Packed<kDtype>& p) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      pair = kDtype == Dtype::kBFloat16 ? larger_bfloats(pair, p.word(k)) : larger_halves(pair, p.word(k));
  }
  MFD_DEVICE float value() const {
    const Packed<kDtype> p{{{pair, pair, pair, pair}}};
    return fmaxf(p.value(0), p.value(1));
  }
};
template <>
struct Largest<Dtype::kFloat32> {
  float largest = static_cast<float>(-kInf);
  MFD_DEVICE void take(const Packed<Dtype::kFloat32>& p) {
#pragma unroll
    for (int k = 0; k < 8; ++k) largest = fmaxf(largest, p.value(k));
  }
  MFD_DEVICE float value() const { return largest; }
};

// The logits and the gradient of one row, in vectors of eight columns that begin where 16 bytes do: vector v
// holds columns [8v - lead, 8v - lead + 8), of which those of the row exist. kExcludes: the column `excluded`
// does not count.
template <Dtype kDtype, bool kExcludes = false>
struct PackedRow {
  typedef Packed<kDtype> Pack;
  static constexpr int kBytes = Pack::kBytes;
  const unsigned char *student, *teacher;
  unsigned char* grad;  // null where it is not wanted
  int classes, lead;
  unsigned first_whole_end;  // vectors that begin in columns [0, first_whole_end) are whole and aligned
  int excluded;

  MFD_DEVICE PackedRow(const RowProblem& p, void* gradient, int64_t row, int without = -1)
      : student(static_cast<const unsigned char*>(p.student.data) + row_offset(p.student, row) * kBytes),
        teacher(static_cast<const unsigned char*>(p.teacher.data) + row_offset(p.teacher, row) * kBytes),
        grad(gradient ? static_cast<unsigned char*>(gradient) + row * p.student.width * kBytes : nullptr),
        classes(static_cast<int>(p.classes)),
        excluded(without) {
    const unsigned at = offset_of(student);
    const bool alike = at == offset_of(teacher) && (!grad || at == offset_of(grad));
    lead = alike ? static_cast<int>(at) / kBytes : 0;
    first_whole_end = alike && classes >= 8 ? static_cast<unsigned>(classes - 7) : 0;
  }
  static MFD_DEVICE unsigned offset_of(const void* address) {
    return static_cast<unsigned>(reinterpret_cast<uintptr_t>(address)) & 15u;
  }

  MFD_DEVICE int vectors() const { return (classes + lead + 7) / 8; }
  MFD_DEVICE int column(int vector) const { return 8 * vector - lead; }
  MFD_DEVICE bool is_whole(int first) const { return static_cast<unsigned>(first) < first_whole_end; }
  MFD_DEVICE bool holds(int column) const {
    return static_cast<unsigned>(column) < static_cast<unsigned>(classes);
  }

  MFD_DEVICE bool has_excluded(int first) const {
    return kExcludes && static_cast<unsigned>(excluded - first) < 8u;
  }
  // Whether all eight columns from `first` on count, or one does.
  MFD_DEVICE bool all_count(int first) const { return is_whole(first) && !has_excluded(first); }
  MFD_DEVICE bool counts(int column) const { return holds(column) && !(kExcludes && column == excluded); }
  // For maxima: -inf in place of the excluded column.
  MFD_DEVICE Pack without_excluded(Pack p, int first) const {
    if (has_excluded(first)) {
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (first + k == excluded) p.set_lowest(k);
    }
    return p;
  }

  // Of a side's row.
  MFD_DEVICE float value(const unsigned char* side, int column) const {
    return load_one<float>(side + int64_t{column} * kBytes, kDtype);
  }

  // The vector from column `first` on, which lies (or would lie) at `at`: one with columns beyond the row, or
  // one that is not aligned; -inf where there is no column.
  MFD_DEVICE Pack load_edge(const unsigned char* at, int first) const {
    float x[8];
#pragma unroll
    for (int k = 0; k < 8; ++k)
      x[k] = holds(first + k) ? load_one<float>(at + k * kBytes, kDtype) : static_cast<float>(-kInf);
    return Pack::of(x);
  }
  MFD_DEVICE Pack load(const unsigned char* at, int first) const {
    return is_whole(first) ? Pack::load_once(at) : load_edge(at, first);
  }
  MFD_DEVICE void store(unsigned char* at, int first, const float (&g)[8]) const {
    if (is_whole(first)) return Pack::of(g).store_once(at);
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (holds(first + k)) store_one<float>(at + k * kBytes, kDtype, g[k]);
  }
};

}  // namespace device
}  // namespace mfd
