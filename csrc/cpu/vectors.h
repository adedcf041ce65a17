// Products of two vectors of features, for the instruction set that tile.cpp is compiled for.
#pragma once

#include "fold.h"
#include "simd.h"
#include "tile.h"

namespace ck {
namespace CK_ISA {
namespace {

template <class T>
CK_FOLD T dot(const T* x, const T* y, int64_t d) {
  constexpr int W = kLanes<T>;
  Vec<T> a{}, b{};
  int64_t k = 0;
  for (; k + 2 * W <= d; k += 2 * W) {
    a += load<Vec<T>>(x + k) * load<Vec<T>>(y + k);
    b += load<Vec<T>>(x + k + W) * load<Vec<T>>(y + k + W);
  }
  T total = sum_lanes<T>(a + b);
  for (; k < d; ++k) total += x[k] * y[k];
  return total;
}

template <class T>
void norms(const T* x, int64_t stride, int64_t rows, int64_t d, T* inverse, T* norm) {
  for (int64_t i = 0; i < rows; ++i) {
    const T length = static_cast<T>(__builtin_sqrt(dot(x + i * stride, x + i * stride, d)));
    inverse[i] = length * kLargestInverse<T> > 1 ? 1 / length : kLargestInverse<T>;
    if (norm != nullptr) norm[i] = length;
  }
}

template <class T>
void dots(const T* x, const T* y, int64_t stride, bool normalize, T scale, int64_t keys, int64_t d,
          T* out, T* inverse, int64_t ld) {
  for (int64_t j = 0; j < keys; ++j) {
    inverse[j * ld] = 1;
    if (normalize) norms<T>(y + j * stride, stride, 1, d, inverse + j * ld, nullptr);
    out[j * ld] = dot(x, y + j * stride, d) * scale * inverse[j * ld];
  }
}

template <class T>
void scaled(T factor, const T* x, int64_t d, T* out) {
  constexpr int W = kLanes<T>;
  int64_t k = 0;
  for (; k + W <= d; k += W) store(out + k, factor * load<Vec<T>>(x + k));
  for (; k < d; ++k) out[k] = factor * x[k];
}

template <class T>
T distance(const T* x, const T* y, int64_t d) {
  constexpr int W = kLanes<T>;
  Vec<T> squares{};
  int64_t k = 0;
  for (; k + W <= d; k += W) {
    const Vec<T> r = load<Vec<T>>(y + k) - load<Vec<T>>(x + k);
    squares += r * r;
  }
  T total = sum_lanes<T>(squares);
  for (; k < d; ++k) total += (y[k] - x[k]) * (y[k] - x[k]);
  return total;
}

template <class T>
void add_difference(const T* x, const T* y, T weight, T of_r, T of_x, int64_t d, T* u, T* out) {
  constexpr int W = kLanes<T>;
  int64_t k = 0;
  for (; k + W <= d; k += W) {
    const Vec<T> own = load<Vec<T>>(x + k), r = load<Vec<T>>(y + k) - own;
    store(u + k, load<Vec<T>>(u + k) + weight * r);
    store(out + k, of_r * r + of_x * own);
  }
  for (; k < d; ++k) {
    const T r = y[k] - x[k];
    u[k] += weight * r;
    out[k] = of_r * r + of_x * x[k];
  }
}

template <class T>
T project(const T* u, const T* x, T inverse, bool normalize, T scale, int64_t d, T* out) {
  constexpr int W = kLanes<T>;
  const T along = dot(u, x, d);
  // a norm that was raised to 1e-12 is a constant
  const T radial = normalize && inverse < kLargestInverse<T> ? along * inverse * inverse : 0;
  int64_t k = 0;
  for (; k + W <= d; k += W)
    store(out + k, (load<Vec<T>>(u + k) - radial * load<Vec<T>>(x + k)) * scale);
  for (; k < d; ++k) out[k] = (u[k] - radial * x[k]) * scale;
  return along;
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
