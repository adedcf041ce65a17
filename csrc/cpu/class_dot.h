// Products of rows with the sum of the other rows of their class.
#pragma once

#include "matrix.h"

namespace ck {

// Rows (N, D), and for each of them how many rows are of a class before its own: equal numbers
// within a class.
struct ClassRows {
  Matrix x;
  const int32_t* places;
  bool normalize = false;
};

// out (N). Raises std::out_of_range for a place that is none.
template <class T>
void class_dot(const ClassRows& rows, T* out);

// dx: the gradient in the dtype of x, one row after the other; with `add` it is added to what is
// there
template <class T>
void class_dot_backward(const ClassRows& rows, const T* grad, void* dx, bool add);

}  // namespace ck
