// The student gradient of a row with a sparse teacher, a block at a time: proportional to the exponentials of
// the pass over the row besides the listed classes.
#pragma once

#include <type_traits>

#include "cpu/distill/gradient.h"
#include "cpu/topk/rest.h"

namespace mfd::MFD_ISA {
namespace {

// d loss/dx of one block of transformed logits, of which `listed` holds the listed classes'. An E that is not
// the compute dtype takes rows of one factor.
template <class S, class E>
static void topk_block(const TopKRow<S>& c, const AllClasses& all, const TopKSlopes& slopes, int64_t b,
                       const E* listed, E* out) {
  typedef typename S::T T;
  const Scratch& scratch = c.scratch;
  const int64_t start = b * kBlock, n = c.block_size(b);
  const double max = scratch.sums[b].max_s;
  GradientFactors<T> factors{};
  double a = slopes.rest * block_weight(max, all.rest.max, c.pass_t), h = 0;
  if (c.hard) h = slopes.at_one * exp(-all.lse_h) * block_weight(max, all.max, 1.0);
  if (c.powers) factors.b = static_cast<T>(slopes.powers * block_weight(max, all.max, c.ts / c.degree()));
  factors.shift = static_cast<T>(slopes.shift);
  const T* es = static_cast<const T*>(scratch.exp_s) + start;
  const T* et = c.powers ? static_cast<const T*>(scratch.exp_t) + start : es;
  const T* eh = scratch.exp_h ? static_cast<const T*>(scratch.exp_h) + start : es;
  const bool one_factor = c.has_one_factor();
  factors.a = static_cast<T>(one_factor ? 0.0 : a);
  factors.h = static_cast<T>(one_factor ? a + h : h);
  LabelGradient<T> own = {-1, T(0)};
  const int64_t label = c.label - start;
  if (c.use_hard && label >= 0 && label < n) {
    GradientFactors<T> at_label = factors;
    at_label.shift = static_cast<T>(slopes.hard * label_share(c.p));
    own = {label,
           gradient_at<T>(one_factor ? 1 : c.hard, !one_factor, es[label], et[label], eh[label], at_label)};
  }
  if (one_factor) {
    block_gradient<S, false, 1>(es, es, es, n, factors, false, own, out);
  } else if constexpr (std::is_same<E, T>::value) {
    block_gradient_of<S, true>(c.hard, es, et, eh, n, factors, false, own, out);
  }
  for (int64_t m = c.first[b]; m < c.first[b + 1]; ++m) out[c.columns[m] - start] = listed[c.slots[m]];
}

// The same for all blocks, in the dtype of the logits without a detour.
template <class S, class E>
static void write_topk_blocks(const TopKRow<S>& c, const AllClasses& all, const TopKSlopes& slopes,
                              char* out) {
  constexpr int64_t kSize = sizeof(E);
  E* listed = static_cast<E*>(c.scratch.block_y);
  E* buffer = static_cast<E*>(c.scratch.block_out);
  convert_out(c.listed.out, c.listed.count, c.p.student.dtype, false, reinterpret_cast<char*>(listed));
  for (int64_t b = 0; b < c.blocks; ++b) {
    topk_block<S, E>(c, all, slopes, b, listed, buffer);
    write_bytes(out + b * kBlock * kSize, reinterpret_cast<const char*>(buffer), c.block_size(b) * kSize,
                c.f.stream);
  }
}

template <class S>
static void write_topk_gradient(const TopKRow<S>& c, const AllClasses& all, const TopKSlopes& slopes) {
  typedef typename S::T T;
  const RowProblem& p = c.p;
  const Scratch& scratch = c.scratch;
  const int64_t size = dtype_size(p.student.dtype);
  char* out = static_cast<char*>(c.f.grad) + c.row * p.student.width * size;
  T* buffer = static_cast<T*>(scratch.block_out);
  const T* capped = static_cast<const T*>(scratch.capped);
  double dot = 0;
  write_zeros(out + p.classes * size, (p.student.width - p.classes) * size, c.f.stream);
  if constexpr (std::is_same<S, F32>::value) {
    const bool direct = c.has_one_factor() && !changes_gradient(p.student);
    if (direct && p.student.dtype == Dtype::kBFloat16)
      return write_topk_blocks<S, BFloat16>(c, all, slopes, out);
    if (direct && p.student.dtype == Dtype::kFloat16)
      return write_topk_blocks<S, Float16>(c, all, slopes, out);
  }
  for (int64_t b = 0; p.student.standardize && b < c.blocks; ++b) {
    topk_block<S, T>(c, all, slopes, b, c.listed.out, buffer);
    dot += weighted_sum<S>(buffer, capped + b * kBlock, c.block_size(b), 0.0);
  }
  for (int64_t b = 0; b < c.blocks; ++b) {
    const int64_t start = b * kBlock, n = c.block_size(b);
    topk_block<S, T>(c, all, slopes, b, c.listed.out, buffer);
    if (changes_gradient(p.student))
      transform_backward<S>(c.x, capped ? capped + start : buffer, n, dot, buffer);
    convert_out(buffer, n, p.student.dtype, c.f.stream, out + start * size);
  }
}

// The gradient of a row whose classes besides the listed ones have none.
template <class S>
static void scatter_gradient(const TopKRow<S>& c, double label) {
  typedef typename S::T T;
  const RowProblem& p = c.p;
  const Listed<S>& l = c.listed;
  const int64_t size = dtype_size(p.student.dtype);
  char* out = static_cast<char*>(c.f.grad) + c.row * p.student.width * size;
  if (c.decoupled) l.x[l.label] = static_cast<T>(label);
  const double dot = p.student.standardize ? weighted_sum<S>(l.out, l.x, l.count, 0.0) : 0.0;
  if (p.student.standardize) {
    T* x_buffer = static_cast<T*>(c.scratch.block_x);
    T* buffer = static_cast<T*>(c.scratch.block_out);
    for (int64_t b = 0; b < c.blocks; ++b) {
      const int64_t start = b * kBlock, n = c.block_size(b);
      const T* x = load_block<S>(c.x, start, n, x_buffer).x;
      for (int64_t i = 0; i < kBlock; ++i) buffer[i] = T(0);
      for (int64_t m = c.first[b]; m < c.first[b + 1]; ++m) buffer[c.columns[m] - start] = l.out[c.slots[m]];
      transform_backward<S>(c.x, x, n, dot, buffer);
      convert_out(buffer, n, p.student.dtype, c.f.stream, out + start * size);
    }
    write_zeros(out + p.classes * size, (p.student.width - p.classes) * size, c.f.stream);
    return;
  }
  if (changes_gradient(p.student)) transform_backward<S>(c.x, l.x, l.count, 0.0, l.out);
  char* listed = static_cast<char*>(c.scratch.block_y);
  convert_out(l.out, l.count, p.student.dtype, false, listed);
  // Whole blocks: a line that has been streamed is far away.
  char* buffer = static_cast<char*>(c.scratch.block_out);
  const char zero[8] = {};
  __builtin_memset(buffer, 0, static_cast<size_t>(kBlock * size));
  for (int64_t b = 0; b < c.blocks; ++b) {
    const int64_t start = b * kBlock, begin = c.first[b], end = c.first[b + 1];
    for (int64_t m = begin; m < end; ++m)
      copy_element(listed + c.slots[m] * size, size, buffer + (c.columns[m] - start) * size);
    write_bytes(out + start * size, buffer, c.block_size(b) * size, c.f.stream);
    for (int64_t m = begin; m < end; ++m) copy_element(zero, size, buffer + (c.columns[m] - start) * size);
  }
  write_zeros(out + p.classes * size, (p.student.width - p.classes) * size, c.f.stream);
}

}  // namespace
}  // namespace mfd::MFD_ISA
