// What whitening does to the columns of one group, for the instruction set that tile.cpp is
// compiled for.
#pragma once

#include "simd.h"

namespace ck {
namespace CK_ISA {
namespace {

// out = x (rows, d) less the mean of each column, which may be in place
template <class T>
void center(const T* x, int64_t rows, int64_t d, T* out, double* __restrict mean) {
  for (int64_t k = 0; k < d; ++k) mean[k] = 0;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < d; ++k) mean[k] += x[i * d + k];
  for (int64_t k = 0; k < d; ++k) mean[k] /= rows;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < d; ++k) out[i * d + k] = static_cast<T>(x[i * d + k] - mean[k]);
}

// the sum of the squares of each column of x (rows, d)
template <class T>
void column_squares(const T* x, int64_t rows, int64_t d, double* __restrict sums) {
  for (int64_t k = 0; k < d; ++k) sums[k] = 0;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < d; ++k) {
      const double value = x[i * d + k];
      sums[k] += value * value;
    }
}

constexpr int64_t kWhole = 16;  // a multiple of every kLanes<T>

// Gaussian elimination among rows begin to end of [A | I]: what is left of A becomes the rows of U,
// A = U^T U, what is left of I those of U^-T. The rows above have been eliminated from them
// already. A is upper triangular (d, ld), the other matrix lower triangular (d, d). False: a pivot
// is not above its entry of `lowest`.
template <class T>
bool eliminate(T* upper, int64_t ld, T* inverse, int64_t begin, int64_t end, int64_t d,
               const T* lowest) {
  for (int64_t p = begin; p < end; ++p) {
    T *row = upper + p * ld, *inverse_row = inverse + p * d;
    if (!(row[p] > lowest[p])) return false;
    const T scale = 1 / static_cast<T>(__builtin_sqrt(row[p]));
    for (int64_t k = p; k < d; ++k) row[k] *= scale;
    for (int64_t k = 0; k < p; ++k) inverse_row[k] *= scale;
    inverse_row[p] = scale;
    // whole vectors: what they cover besides does not count, or is 0
    const int64_t filled = (p / kWhole + 1) * kWhole, count = filled < d ? filled : d;
    for (int64_t i = p + 1; i < end; ++i) {
      const int64_t first = i / kWhole * kWhole;
      add_scaled(-row[i], row + first, ld - first, upper + i * ld + first);
      add_scaled(-row[i], inverse_row, count, inverse + i * d);
    }
  }
  return true;
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
