// What the plans of mfd_loss share: where a call's tensors and numbers are, and its gradients.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "bindings/plans/plans.h"

namespace mfd {

struct MfdNumbers {
  double soft_weight, hard_weight, feature_weight, pool_weight;
  double divisor;  // 1 where the rows that count are still to be counted
};

struct MfdPlaces {
  PoolPlaces pool;
  RowPlaces rows;
  int head_weight, head_bias, teacher_features, teacher_pool_weights, weight;
  int pool_temperature, soft_weight, hard_weight, feature_weight, pool_weight, normalizer;

  MfdPlaces(const PoolProblem& problem, bool stacked, double least, double most, const Places& tensors,
            const Places& numbers)
      : pool(problem, stacked, tensors),
        rows{-1,
             place(tensors, "teacher_logits"),
             place(tensors, "labels"),
             place(tensors, "mask"),
             place(numbers, "temperature"),
             -1,
             least,
             most},
        head_weight(place(tensors, "head_weight")),
        head_bias(place(tensors, "head_bias")),
        teacher_features(place(tensors, "teacher_features")),
        teacher_pool_weights(place(tensors, "teacher_pool_weights")),
        weight(place(tensors, "weight")),
        pool_temperature(place(numbers, "pool_temperature")),
        soft_weight(place(numbers, "soft_weight")),
        hard_weight(place(numbers, "hard_weight")),
        feature_weight(place(numbers, "feature_weight")),
        pool_weight(place(numbers, "pool_weight")),
        normalizer(place(numbers, "normalizer")) {}

  // What differs between the calls of a plan; false: a number is out of its range.
  bool fill(const Call& call, RowProblem& of_rows, PoolProblem& of_pool, MfdNumbers& numbers) const {
    const double temperature = call.number(pool_temperature, 1.0);
    numbers = {call.number(soft_weight, 1.0), call.number(hard_weight, 0.0), call.number(feature_weight, 0.0),
               call.number(pool_weight, 0.0), call.number(normalizer, 1.0)};
    for (const double value : {numbers.soft_weight, numbers.hard_weight, numbers.feature_weight,
                               numbers.pool_weight, numbers.divisor})
      if (!std::isfinite(value)) return false;
    pool.fill(call.tensors, temperature, of_pool);
    return rows.fill(call, of_rows) && 0 < numbers.divisor && rows.least <= temperature &&
           temperature <= rows.most;
  }
};

// The gradients of query, bias, head and features that a call needs, uninitialised, and where each begins;
// without `makes_head_weight` that of the head's weight is None, and the op's to replace.
struct [[gnu::visibility("hidden")]] MfdGradients {  // as pybind11 is
  pybind11::list all;
  PoolBackward of_pool{};  // query, bias, head_bias and features
  void* head_weight = nullptr;
  int64_t feature_bytes = 0;
  bool needs_pool, needs_head_weight;

  MfdGradients(const MfdPlaces& at, const PoolProblem& pool, const Call& call, bool makes_head_weight) {
    const auto fresh = [&](int k) -> void* {
      if (k < 0 || !call.needs[static_cast<size_t>(k)]) return all.append(pybind11::none()), nullptr;
      pybind11::object gradient =
          new_like(call.objects[static_cast<size_t>(k)], call.tensors[static_cast<size_t>(k)]);
      all.append(gradient);
      return data_of(gradient);
    };
    of_pool.d_query = fresh(at.pool.query);
    of_pool.d_bias = fresh(at.pool.bias);
    needs_head_weight = call.needs[static_cast<size_t>(at.head_weight)];
    if (makes_head_weight) {
      head_weight = fresh(at.head_weight);
    } else {
      all.append(pybind11::none());
    }
    of_pool.d_head_bias = fresh(at.head_bias);
    needs_pool = of_pool.d_query || of_pool.d_bias;
    for (int k = 0; k < (at.pool.stacked ? 1 : pool.modalities); ++k) {
      const DLTensor& feature = call.tensors[static_cast<size_t>(at.pool.features + k)];
      void* const data = fresh(at.pool.features + k);
      if (!data) continue;
      needs_pool = true;
      feature_bytes += bytes_of(feature);
      at.pool.set_gradient(static_cast<size_t>(k), data, pool, feature.dtype.bits / 8, of_pool);
    }
  }

  bool needs_any() const { return needs_pool || needs_head_weight || of_pool.d_head_bias; }
};

}  // namespace mfd
