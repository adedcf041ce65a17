// Products of rows with keys of their own, and distances to them.
#pragma once

#include "matrix.h"

namespace ck {

// Row i of x (N, D) has `keys` rows of y; with `ends` those from where the ones of row i - 1 end up
// to ends[i].
template <class T>
struct OwnRows {
  Matrix x, y;
  int64_t keys;
  const int64_t* ends = nullptr;
  bool normalize = false;

  Range of(int64_t row) const {
    if (ends == nullptr) return {row * keys, (row + 1) * keys};
    return {row > 0 ? ends[row - 1] : 0, ends[row]};
  }
};

// out: the product of each row of y with the row of x that it belongs to
template <class T>
void row_dot(const OwnRows<T>& rows, T* out);

// dx and dy: the gradients in the dtypes of x and y, one row after the other; null: not needed. A
// key whose product has the gradient 0 is not read: NaN in one that is left out goes nowhere.
template <class T>
void row_dot_backward(const OwnRows<T>& rows, const T* grad, void* dx, void* dy);

// out: the squared distance of each row of y from the row of x that it belongs to, both of unit
// length if they are normalised
template <class T>
void row_distance(const OwnRows<T>& rows, T* out);

// likewise, from these distances
template <class T>
void row_distance_backward(const OwnRows<T>& rows, const T* distance, const T* grad, void* dx,
                           void* dy);

}  // namespace ck
