// What all methods of whitening do to the samples of one group, on one thread. Formulas and names
// are those of contrastive_kernels/whitening/operators.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "buffer.h"
#include "matrix.h"
#include "threads.h"
#include "tile.h"

namespace ck {

// What `info` of a group says.
enum Info : int32_t { kFine = 0, kNotDefinite = 1, kNotFinite = 2 };

// Groups of `rows` samples of d features, one after the other. Samples x and their gradients dx are
// of type `dtype`, all else of that of the arithmetic: `dtype`, or float for half types.
struct Groups {
  int64_t count, rows, d;
  Dtype dtype;

  int64_t size() const { return rows * d; }
  int64_t square() const { return d * d; }
  // row length of a (d, d) matrix of whole vectors
  int64_t ld() const { return (d + 15) / 16 * 16; }
  // x and dx of group i
  const void* at(const void* x, int64_t i) const {
    return static_cast<const char*>(x) + i * size() * size_of(dtype);
  }
  void* at(void* dx, int64_t i) const {
    return static_cast<char*>(dx) + i * size() * size_of(dtype);
  }
};

// calls run(begin, end) for all columns, a few at a time
template <class Run>
void for_columns(int64_t size, int64_t step, Run run) {
  for (int64_t begin = 0; begin < size; begin += step) run(begin, std::min(begin + step, size));
}

template <class T>
class Group {
 public:
  Group(const Groups& groups, double eps)
      : g_(groups),
        half_(groups.dtype != kDtype<T>),
        ld_(groups.ld()),
        c_((1 - eps) / (groups.rows - 1)),
        eps_(eps),
        features_(groups.size()),
        mean_(groups.d) {}

 protected:
  static constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
  static constexpr int64_t kBlock = 32;  // rows of a symmetric product that are made at once

  // Xc of the samples x
  void center(const void* x) {
    const T* samples = static_cast<const T*>(x);
    if (half_) {
      kernels_.read_rows(x, g_.dtype, g_.d, 1, g_.rows, g_.d, features_.data());
      samples = features_.data();
    }
    kernels_.center(samples, g_.rows, g_.d, features_.data(), mean_.data());
  }

  // C = c Xc^T Xc + eps I; false: it is not finite
  bool covariance(T* out) {
    multiply_symmetric(g_.rows, transposed(features_.data()), features_.data(), g_.d, out);
    mirror(out, static_cast<T>(c_));
    for (int64_t k = 0; k < g_.d; ++k) {
      T& variance = out[k * ld_ + k];
      variance += static_cast<T>(eps_);
      if (!(variance < std::numeric_limits<T>::max())) return false;
    }
    return true;
  }

  // where dx is made: in its place, or beside it if it will be rounded
  T* room_for(void* dx) {
    if (!half_) return static_cast<T*>(dx);
    if (gradient_.empty()) gradient_ = Buffer<T>(g_.size());
    return gradient_.data();
  }

  // dx = what was made in its room, less the mean
  void finish(void* dx) {
    T* made = room_for(dx);
    kernels_.center(made, g_.rows, g_.d, made, mean_.data());
    if (half_) kernels_.write(made, g_.size(), g_.dtype, dx);
  }

  // dx = 0 of a group that failed, so that it leaves the gradients of others alone
  void clear(void* dx) { std::memset(dx, 0, g_.size() * size_of(g_.dtype)); }

  // left operands: x without padding, X^T, and a padded matrix
  LeftMatrix<T> samples(const T* x) const { return {x, g_.d, 1}; }
  LeftMatrix<T> transposed(const T* x) const { return {x, 1, g_.d}; }
  LeftMatrix<T> padded(const T* a) const { return {a, ld_, 1}; }

  // c (m, n) = a (m, k) b (k, n), or +=
  void multiply(int64_t m, int64_t n, int64_t k, LeftMatrix<T> a, const T* b, int64_t ldb, T* c,
                int64_t ldc, bool add = false) {
    kernels_.multiply(m, n, k, a, {b, ldb}, {c, ldc}, add);
  }

  // The lower triangle of out (d, d) = a (d, k) b (k, d), or +=, which is symmetric; mirror() makes
  // the rest.
  void multiply_symmetric(int64_t k, LeftMatrix<T> a, const T* b, int64_t ldb, T* out,
                          bool add = false) {
    for_columns(g_.d, kBlock, [&](int64_t begin, int64_t end) {
      const LeftMatrix<T> rows{a.data + begin * a.row, a.row, a.col};
      multiply(end - begin, end, k, rows, b, ldb, out + begin * ld_, ld_, add);
    });
  }

  // scales the lower triangle of a, and makes the upper one its mirror image
  void mirror(T* a, T scale) {
    for_columns(g_.d, kBlock, [&](int64_t begin, int64_t end) {
      for_columns(end, kBlock, [&](int64_t first, int64_t last) {
        for (int64_t i = begin; i < end; ++i)
          for (int64_t j = first; j < std::min(last, i + 1); ++j)
            a[j * ld_ + i] = a[i * ld_ + j] *= scale;
      });
    });
  }

  const TileKernels<T>& kernels_ = tile_kernels<T>();
  const Groups g_;
  const bool half_;  // of the samples
  const int64_t ld_;
  const double c_, eps_;
  Buffer<T> features_, gradient_;
  Buffer<double> mean_;
};

// run(worker, group) for all groups, each thread with a worker of its own
template <class Worker, class Run>
void for_groups(const Groups& groups, double eps, Run run) {
  parallel_for(0, groups.count, 1, [&](int64_t begin, int64_t end) {
    Worker worker(groups, eps);
    for (int64_t i = begin; i < end; ++i) run(worker, i);
  });
}

}  // namespace ck
