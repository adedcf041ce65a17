#pragma once

#include "problem.h"

namespace ck {

// Statistics of the forward sweep and the gradients that came for them. A gradient is absent where
// nothing depends on the statistic; the softplus fold has grad_lse alone, the gradient of its sum.
struct BackwardInputs {
  bool softplus = false;
  at::Tensor lse, lse_low, mean, col_lse, col_lse_low, col_mean, attended;
  OptionalTensor grad_lse = {}, grad_mean = {}, grad_col_lse = {}, grad_col_mean = {};
};

struct Needs {
  bool x, y, scale, bias;
};

// Gradients in the inputs' dtypes; what is not needed is empty. With y absent, that of x is whole.
struct BackwardResult {
  at::Tensor x, y, scale, bias;
};

template <class T>
BackwardResult backward_sweep(const PairArguments& arguments, const BackwardInputs& inputs,
                              Needs needs);

}  // namespace ck
