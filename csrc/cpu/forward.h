#pragma once

#include <memory>

#include "problem.h"

namespace ck {

// Where the statistics of one side go; null: not asked for. For the softplus fold lse is the sum.
template <class T>
struct Statistics {
  T* lse = nullptr;
  T* low = nullptr;  // what rounding took from lse
  T* mean = nullptr;
  T* mean_low = nullptr;  // what rounding took from the mean; there where that is
  T* attended = nullptr;  // (rows, D): sum_j p_ij y_j / |y_j|
};

template <class T>
struct ForwardOptions {
  Fold fold;
  bool keep = false;  // logits, for a backward sweep
  Statistics<T> rows = {}, columns = {};
  const T* threshold = nullptr;  // of each row; then rank, total and count of each row are wanted
  T *rank = nullptr, *total = nullptr, *count = nullptr;
  T* partner = nullptr;  // logits of the rows and the keys that belong to them
};

// What holds the logits that are kept and stands for rows.low; null: none are.
template <class T>
std::unique_ptr<Keeper> forward_sweep(const PairArguments<T>& arguments,
                                      const ForwardOptions<T>& options);

}  // namespace ck
