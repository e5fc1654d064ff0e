// The classes that a sparse teacher does not list: their exponentials in scratch, 0 at the listed ones, and
// their sums. No sum is a small difference of two others, so that a tiny rest keeps its digits.
#pragma once

#include "common/rows/topk_math.h"
#include "cpu/distill/first_pass.h"
#include "cpu/distill/forward.h"

namespace mfd::MFD_ISA {
namespace {

// The arrays of a row's listed classes, K <= kBlock elements each. A candidate that pads the list has the
// logit and the value -inf, of which nothing comes in any sum.
template <class S>
struct Listed {
  typedef typename S::T T;
  T *x, *y, *q, *p, *to_u, *to_v, *out;
  int64_t count;
  const int64_t* indices;
  int64_t label;  // position of the label among them; -1 where it is not listed
};

// One row: what does not depend on the block.
template <class S>
struct TopKRow {
  typedef typename S::T T;
  const TopKPass& pass;
  const Forward& f;
  const RowProblem& p;
  const Scratch& scratch;
  int64_t row, label, blocks;
  double ts, tt;
  bool use_hard, renormalized, decoupled, unit, entropies;
  bool padded;       // the list is shorter than K
  bool all_classes;  // something depends on the classes that are not listed
  bool powers;       // the divergence of a class without teacher is not proportional to q
  double pass_t;     // temperature of the pass over all classes
  int hard;          // where its exponentials at temperature 1 come from
  View x;
  Listed<S> listed;
  const int64_t *columns, *slots, *first;  // the listed classes by block; see group_by_block

  TopKRow(const TopKPass& topk, int64_t r, const Scratch& s)
      : pass(topk), f(topk.forward), p(f.problem), scratch(s), row(r) {
    label = label_of(p, row);
    blocks = block_count(p.classes);
    ts = at<T>(p.student_temperature, row);
    tt = at<T>(p.teacher_temperature, row);
    const Tail tail = pass.teacher.tail;
    use_hard = f.use_hard && label >= 0 && at<T>(pass.grad_hard, row) != 0;
    renormalized = tail == Tail::kRenormalize;
    decoupled = decouples_target(p.divergence);
    unit = p.divergence == Divergence::kNKD;
    entropies = f.student_entropy != nullptr;
    all_classes = !renormalized || use_hard || entropies;
    powers = tail == Tail::kZero && p.divergence == Divergence::kAlphaBeta && degree() != 1.0;
    pass_t = renormalized && !entropies ? 1.0 : ts;
    hard = use_hard || (unit && !renormalized) ? hard_mode(pass_t) : kNoHard;
    x = {&p.student, row_offset(p.student, row), -1, {}};
    if (p.student.standardize) x.centre = row_centre<S>(x, p.classes, static_cast<T*>(scratch.block_x));
    const auto array = [&](int i) { return static_cast<T*>(scratch.listed[i]); };
    listed = {array(0),
              array(1),
              array(2),
              array(3),
              array(4),
              array(5),
              array(6),
              pass.teacher.listed,
              pass.teacher.indices + row * pass.teacher.listed,
              -1};
    padded = false;
    for (int64_t k = 0; k < listed.count; ++k) {
      padded = padded || pads(k);
      if (label >= 0 && listed.indices[k] == label) listed.label = k;
    }
    columns = in_order() ? listed.indices : scratch.columns;
    slots = scratch.slots;
    first = scratch.first;
  }

  bool pads(int64_t k) const { return is_padding(listed.indices[k]); }

  // The listed classes are those of one block, as they are.
  bool in_order() const { return blocks == 1 && !padded; }

  // Whether no class is left to the rest.
  bool lists_all() const { return !padded && listed.count == p.classes; }

  // -inf in the places of the candidates that pad the list.
  void clear_padding(T* array) const {
    for (int64_t k = 0; padded && k < listed.count; ++k)
      if (pads(k)) array[k] = static_cast<T>(-kInf);
  }

  // The classes that are not listed have gradients proportional to one exponential.
  bool has_one_factor() const { return !powers && hard <= 1; }

  double degree() const { return p.first + p.second; }

  int64_t block_size(int64_t b) const {
    const int64_t left = p.classes - b * kBlock;
    return left < kBlock ? left : kBlock;
  }
};

// Where a row has one block and no padding, its classes are in order as they are.
static void list_one_block(const Scratch& scratch, int64_t listed) {
  for (int64_t k = 0; k < listed; ++k) scratch.slots[k] = k;
  scratch.first[0] = 0;
  scratch.first[1] = listed;
}

// Sorts the listed classes by block: those of block b are [first[b], first[b + 1]) of `columns`, with their
// positions in `slots`.
template <class S>
static void group_by_block(const TopKRow<S>& c) {
  if (c.in_order()) return list_one_block(c.scratch, c.listed.count);
  int64_t* first = c.scratch.first;
  for (int64_t b = 0; b < c.blocks + 2; ++b) first[b] = 0;
  for (int64_t k = 0; k < c.listed.count; ++k)
    if (!c.pads(k)) ++first[c.listed.indices[k] / kBlock + 2];
  for (int64_t b = 2; b < c.blocks + 2; ++b) first[b] += first[b - 1];
  for (int64_t k = 0; k < c.listed.count; ++k) {
    if (c.pads(k)) continue;
    const int64_t place = first[c.listed.indices[k] / kBlock + 1]++;
    c.scratch.columns[place] = c.listed.indices[k];
    c.scratch.slots[place] = k;
  }
}

MFD_INLINE void copy_element(const char* from, int64_t size, char* to) {
  __builtin_memcpy(to, from, size == 2 ? 2 : size == 4 ? 4 : 8);
}

// Transformed logits [0, n) of a row, n <= kBlock, in `out` whatever their dtype.
template <class S>
static void copy_block(const View& view, int64_t n, typename S::T* out) {
  const typename S::T* x = load_block<S>(view, 0, n, out).x;
  if (x != out) __builtin_memcpy(out, x, static_cast<size_t>(n) * sizeof(typename S::T));
}

// The listed logits where no others matter.
template <class S>
static void gather_listed(const TopKRow<S>& c) {
  const Listed<S>& l = c.listed;
  Side gathered = c.p.student;
  const int64_t size = dtype_size(gathered.dtype);
  const char* row = static_cast<const char*>(gathered.data) + c.x.offset * size;
  char* raw = static_cast<char*>(c.scratch.block_y);
  for (int64_t k = 0; k < l.count; ++k)
    copy_element(row + (c.pads(k) ? 0 : l.indices[k]) * size, size, raw + k * size);
  gathered.data = raw;
  copy_block<S>({&gathered, 0, -1, c.x.centre}, l.count, l.x);
}

// Exponentials that add up to less are taken again relative to their own maximum.
constexpr double kTinySum = 0x1p-60;

// Zeros at the listed classes [begin, end) of a block.
template <class S>
MFD_INLINE void clear_listed(const TopKRow<S>& c, int64_t begin, int64_t end, int64_t start,
                             typename S::T* out) {
  for (int64_t m = begin; m < end; ++m) out[c.columns[m] - start] = typename S::T(0);
}

// Copies the listed logits [begin, end) out of a block and leaves zeros for their exponentials, whose sum it
// returns.
template <class S>
MFD_INLINE double take_listed(const TopKRow<S>& c, int64_t begin, int64_t end, int64_t start,
                              const typename S::T* x, typename S::T* es) {
  typedef typename S::T T;
  T* taken = c.listed.q;  // not needed yet
  for (int64_t m = begin; m < end; ++m) {
    const int64_t column = c.columns[m] - start;
    c.listed.x[c.slots[m]] = x[column];
    taken[m - begin] = es[column];
    es[column] = T(0);
  }
  const int64_t n = end - begin;
  typename S::V sum{};
  for (int64_t i = 0; i < n; i += S::kWidth) sum = sum + load_or_pad<S>(taken + i, n - i, T(0));
  return S::sum(sum);
}

// The one pass over a block: takes the listed logits out and leaves the exponentials of the others.
template <class S>
static void rest_block(const TopKRow<S>& c, const Scales<S>& scales, int64_t b) {
  typedef typename S::T T;
  const Scratch& scratch = c.scratch;
  const RowProblem& p = c.p;
  const int64_t start = b * kBlock, n = c.block_size(b), begin = c.first[b], end = c.first[b + 1];
  T* buffer = scratch.capped ? static_cast<T*>(scratch.capped) + start : static_cast<T*>(scratch.block_x);
  const Block<S> block = load_block<S>(c.x, start, n, buffer);
  const T* x = block.x;
  T* es = static_cast<T*>(scratch.exp_s) + start;
  T* et = static_cast<T*>(scratch.exp_t) + start;
  T* eh = scratch.exp_h ? static_cast<T*>(scratch.exp_h) + start : es;
  const Kept<T> kept = {es, et, eh, es};
  BlockSums& out = scratch.sums[b];
  out.max_s = block_max<S>(x, n);
  const int64_t size = dtype_size(p.student.dtype);
  const Ahead ahead = {block.raw + (p.classes < kBlock ? p.classes : kBlock) * size, block.raw, size, 0};
  block_sums_of<S, kNoSoft>(c.hard, x, x, n, scales, ahead, kept, &out);
  // In double precision, hence relative to nothing.
  if (c.use_hard && p.smoothing != 0)
    out.sum_x = block_shifted_sum<S>(x, n, out.max_s) + static_cast<double>(n) * out.max_s;
  if (begin < end) {
    const double listed = take_listed<S>(c, begin, end, start, x, es);
    // A small share may be subtracted: nothing cancels.
    out.sum_s = listed < 0.25 * out.sum_s ? out.sum_s - listed : plain_sum<S>(es, n);
    if (out.sum_s < kTinySum) {
      T* others = static_cast<T*>(scratch.block_out);
      __builtin_memcpy(others, x, static_cast<size_t>(n) * sizeof(T));
      for (int64_t m = begin; m < end; ++m) others[c.columns[m] - start] = static_cast<T>(-kInf);
      out.max_s = block_max<S>(others, n);
      block_sums_of<S, kNoSoft>(c.hard, others, others, n, scales, ahead, kept, &out);
    } else if (c.hard == kComputed) {
      clear_listed<S>(c, begin, end, start, eh);
      out.sum_h = plain_sum<S>(eh, n);
    } else if (c.hard) {
      out.sum_h = c.hard == 1 ? out.sum_s : block_unit_sum_of<S>(c.hard, es, x, n, out.max_s);
    }
  }
  const bool dots = c.entropies || c.pass.d_temperature;
  if (dots) out.dot_s = weighted_sum<S>(es, x, n, out.max_s);
  if (c.powers) {
    exponential_sum<S>(x, n, out.max_s, Exponent<S>(c.ts / c.degree()), et);
    clear_listed<S>(c, begin, end, start, et);
    out.sum_t = plain_sum<S>(et, n);
    if (dots) out.dot_t = weighted_sum<S>(et, x, n, out.max_s);
  }
}

template <class S>
static RestSums merge_rest(const TopKRow<S>& c) {
  RestSums rest{};
  rest.max = c.scratch.sums[0].max_s;
  for (int64_t b = 1; b < c.blocks; ++b)
    if (c.scratch.sums[b].max_s > rest.max) rest.max = c.scratch.sums[b].max_s;
  const bool dots = c.entropies || c.pass.d_temperature, smoothed = c.use_hard && c.p.smoothing != 0;
  for (int64_t b = 0; b < c.blocks; ++b) {
    const BlockSums& s = c.scratch.sums[b];
    const double below = s.max_s - rest.max, weight = block_weight(s.max_s, rest.max, c.pass_t);
    rest.sum_s += weight * s.sum_s;
    if (c.hard) rest.sum_h += (c.pass_t == 1.0 ? weight : block_weight(s.max_s, rest.max, 1.0)) * s.sum_h;
    if (dots && s.sum_s != 0) rest.dot_s += weight * (s.dot_s + s.sum_s * below);
    if (c.powers && s.sum_t != 0) {
      const double risen = block_weight(s.max_s, rest.max, c.ts / c.degree());
      rest.powers += risen * s.sum_t;
      if (dots) rest.dot_powers += risen * (s.dot_t + s.sum_t * below);
    }
    if (smoothed) rest.sum_x += s.sum_x;
  }
  return rest;
}

}  // namespace
}  // namespace mfd::MFD_ISA
