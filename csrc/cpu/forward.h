#pragma once

#include "problem.h"

namespace ck {

// Statistics in the compute type; what was not asked for is empty.
struct ForwardResult {
  at::Tensor lse, mean, col_lse, col_mean;  // for the softplus fold, lse holds the sum
  at::Tensor lse_low, col_lse_low;          // what rounding took from lse
  at::Tensor rank, total, count;
  at::Tensor attended;  // sum_j p_ij y_j / |y_j|
};

struct ForwardOptions {
  Fold fold;
  bool columns = false;
  bool attend = false;
  bool keep = false;
  OptionalTensor threshold = {};
};

template <class T>
ForwardResult forward_sweep(const PairArguments& arguments, const ForwardOptions& options);

}  // namespace ck
