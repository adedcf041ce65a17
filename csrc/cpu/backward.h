#pragma once

#include "problem.h"

namespace ck {

// Statistics of one side from the forward sweep and the gradients that came for them; null where
// there are none, or nothing depends on the statistic. The softplus fold has grad_lse alone, the
// gradient of its sum.
template <class T>
struct Upstream {
  const T *lse = nullptr, *low = nullptr, *mean = nullptr;
  const T *grad_lse = nullptr, *grad_mean = nullptr;
};

template <class T>
struct BackwardInputs {
  bool softplus = false;
  Upstream<T> rows, columns;
  const T* attended = nullptr;
  const T* grad_partner = nullptr;  // of the logits of the rows and the keys that belong to them
};

// Where gradients go, those of features in their dtypes; null: not needed. With y not given, that
// of x is whole. add_x, add_y: to what is there, which both may share.
template <class T>
struct Gradients {
  void *x = nullptr, *y = nullptr;
  bool scale = false;
  T* bias = nullptr;
  bool add_x = false, add_y = false;
};

// Returns the gradient of the scale.
template <class T>
double backward_sweep(const PairArguments<T>& arguments, const BackwardInputs<T>& inputs,
                      const Gradients<T>& to);

}  // namespace ck
