// The table of one instruction set's kernels. The including file defines MFD_ISA, MFD_ISA_NAME and MFD_LANES.
#pragma once

#include "cpu/distill/backward.h"
#include "cpu/distill/forward.h"
#include "cpu/distill/short_rows.h"
#include "cpu/fusion/feature.h"
#include "cpu/fusion/pool.h"
#include "cpu/fusion/product.h"
#include "cpu/runtime/kernels.h"
#include "cpu/topk/rows.h"

namespace mfd::MFD_ISA {
namespace {

void forward_rows(const Forward& f, int64_t begin, int64_t end, const Scratch& s) {
  if (!f.problem.is_double && is_short_case<F32>(f)) return short_rows_of<F32>(f, begin, end, s);
  f.problem.is_double ? forward_rows_of<F64>(f, begin, end, s) : forward_rows_of<F32>(f, begin, end, s);
}

void forward_sums(const Forward& f, int64_t row, int64_t begin, int64_t end, const Scratch& s) {
  f.problem.is_double ? forward_sums_of<F64>(f, row, begin, end, s)
                      : forward_sums_of<F32>(f, row, begin, end, s);
}

void forward_points(const Forward& f, int64_t row, int64_t begin, int64_t end, const Scratch& s) {
  f.problem.is_double ? forward_points_of<F64>(f, row, begin, end, s)
                      : forward_points_of<F32>(f, row, begin, end, s);
}

void forward_outputs(const Forward& f, int64_t row, int64_t begin, int64_t end, const Scratch& s) {
  f.problem.is_double ? forward_outputs_of<F64>(f, row, begin, end, s)
                      : forward_outputs_of<F32>(f, row, begin, end, s);
}

void backward_rows(const Backward& g, int64_t begin, int64_t end, const Scratch& s) {
  g.problem.is_double ? backward_rows_of<F64>(g, begin, end, s) : backward_rows_of<F32>(g, begin, end, s);
}

void topk_rows(const TopKPass& pass, int64_t begin, int64_t end, const Scratch& s) {
  pass.forward.problem.is_double ? topk_rows_of<F64>(pass, begin, end, s)
                                 : topk_rows_of<F32>(pass, begin, end, s);
}

// out = a + b past the caches; out is aligned to 64 bytes.
void add(const float* a, const float* b, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) F32::stream(out + i, F32::load(a + i) + F32::load(b + i));
  for (; i < n; ++i) out[i] = a[i] + b[i];
}

// The one dtype of all features, so that they are read where they lie; else the compute dtype.
Dtype pool_elements(const PoolProblem& p) {
  for (int m = 1; m < p.modalities; ++m)
    if (p.features[m].dtype != p.features[0].dtype) return Dtype::kFloat32;
  return p.features[0].dtype;
}

void pool_forward(const PoolForward& f, int64_t begin, int64_t end, const FusionScratch& s) {
  if (f.pool->is_double) return pool_forward_of<F64, double>(f, begin, end, s);
  switch (pool_elements(*f.pool)) {
    case Dtype::kBFloat16:
      return pool_forward_of<F32, BFloat16>(f, begin, end, s);
    case Dtype::kFloat16:
      return pool_forward_of<F32, Float16>(f, begin, end, s);
    default:
      return pool_forward_of<F32, float>(f, begin, end, s);
  }
}

void pool_backward(const PoolBackward& g, int64_t begin, int64_t end, const FusionScratch& s,
                   PoolPartial& partial) {
  if (g.pool->is_double) return pool_backward_of<F64, double>(g, begin, end, s, partial);
  switch (pool_elements(*g.pool)) {
    case Dtype::kBFloat16:
      return pool_backward_of<F32, BFloat16>(g, begin, end, s, partial);
    case Dtype::kFloat16:
      return pool_backward_of<F32, Float16>(g, begin, end, s, partial);
    default:
      return pool_backward_of<F32, float>(g, begin, end, s, partial);
  }
}

void add_parts(const void* parts, int64_t chunks, int64_t stride, int64_t n, bool is_double, void* out) {
  is_double ? add_parts_of(static_cast<const double*>(parts), chunks, stride, n, static_cast<double*>(out))
            : add_parts_of(static_cast<const float*>(parts), chunks, stride, n, static_cast<float*>(out));
}

void tap_rows(const Tap& tap, FeatureKind kind, bool is_double, int64_t begin, int64_t end,
              const FusionScratch& s, double* values) {
  if (is_double) return tap_rows_of<F64, double>(tap, kind, begin, end, s, values);
  const Dtype dtype = tap.student.dtype == tap.teacher.dtype ? tap.student.dtype : Dtype::kFloat32;
  switch (dtype) {
    case Dtype::kBFloat16:
      return tap_rows_of<F32, BFloat16>(tap, kind, begin, end, s, values);
    case Dtype::kFloat16:
      return tap_rows_of<F32, Float16>(tap, kind, begin, end, s, values);
    default:
      return tap_rows_of<F32, float>(tap, kind, begin, end, s, values);
  }
}

void predict(const RowProblem& p, int64_t begin, int64_t end, int64_t* out) {
  p.is_double ? predict_rows_of<F64>(p, begin, end, out) : predict_rows_of<F32>(p, begin, end, out);
}

int64_t product_columns() {
  return kTileColumns;
}

void product(const Product& p, int64_t begin, int64_t end, int64_t column) {
  product_of<Single>(p, begin, end, column);
}

constexpr FusionKernels kFusion = {pool_forward, pool_backward,   add_parts, tap_rows,
                                   predict,      product_columns, product};

constexpr Kernels kTable = {MFD_ISA_NAME,    kLanes,        forward_rows, forward_sums, forward_points,
                            forward_outputs, backward_rows, topk_rows,    add,          &kFusion};

}  // namespace

const Kernels& kernels() {
  return kTable;
}

}  // namespace mfd::MFD_ISA
