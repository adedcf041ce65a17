// Cholesky whitening: covariance, factor and inverse are one loop over panels of rows.
#include <cmath>
#include <numeric>

#include "whiten.h"

namespace ck {
namespace {

constexpr int64_t kPivots = 16;     // rows of the factor that are eliminated together
constexpr int64_t kColumns = 32;    // columns of a product with a triangular matrix
constexpr double kTolerance = 0.1;  // of a variance of the result

template <class T>
class Cholesky : Group<T> {
  using Base = Group<T>;
  using Base::features_;
  using Base::g_;
  using Base::kernels_;
  using Base::ld_;

 public:
  Cholesky(const Groups& groups, double eps)
      : Base(groups, eps),
        matrix_(groups.d * ld_),
        panel_(kPivots * ld_),
        transposed_(groups.d * ld_),
        squares_(groups.d),
        lowest_(groups.d),
        scale_(groups.d) {}

  // z (rows, d) and inverse (d, d) of x (rows, d)
  Info forward(const void* x, T* z, T* inverse) {
    const Info info = whiten(x, z, inverse);
    if (info != kFine) {
      std::fill_n(z, g_.size(), Base::kNan);
      std::fill_n(inverse, g_.square(), Base::kNan);
    }
    return info;
  }

  // dx (rows, d)
  void backward(const T* grad, const T* z, const T* inverse, void* dx) {
    if (std::isnan(inverse[0])) return this->clear(dx);
    T* made = this->room_for(dx);
    this->multiply_symmetric(g_.rows, this->transposed(grad), z, g_.d, matrix_.data());
    this->mirror(matrix_.data(), static_cast<T>(-this->c_));
    std::copy_n(grad, g_.size(), features_.data());
    this->multiply(g_.rows, g_.d, g_.d, this->samples(z), matrix_.data(), ld_, features_.data(),
                   g_.d, true);
    for_columns(g_.d, kColumns, [&](int64_t begin, int64_t end) {
      this->multiply(g_.rows, end - begin, g_.d - begin, this->samples(features_.data() + begin),
                     inverse + begin * (g_.d + 1), g_.d, made + begin, g_.d);
    });
    this->finish(dx);
  }

 private:
  Info whiten(const void* x, T* z, T* inverse) {
    constexpr double kNoise = 10 * std::numeric_limits<T>::epsilon();
    const double mean_noise = kNoise + g_.rows * std::numeric_limits<double>::epsilon();
    this->center(x);
    kernels_.column_squares(features_.data(), g_.rows, g_.d, squares_.data());
    for (int64_t k = 0; k < g_.d; ++k) {
      const double variance = this->c_ * squares_[k] + this->eps_;
      if (!(variance < std::numeric_limits<T>::max())) return kNotFinite;
      // what is left of a variance below this is rounding, of the elimination or of the mean
      lowest_[k] =
          static_cast<T>(std::max(kNoise * variance, std::pow(mean_noise * this->mean_[k], 2)));
    }
    if (!factorise(inverse)) return kNotDefinite;
    pack(inverse, g_.d, g_.d, g_.d, 1, transposed_.data());
    for_columns(g_.d, kColumns, [&](int64_t begin, int64_t end) {  // L^-T is upper triangular
      this->multiply(g_.rows, end - begin, end, this->samples(features_.data()),
                     transposed_.data() + begin, ld_, z + begin, g_.d);
    });
    return has_unit_variances(z, inverse) ? kFine : kNotDefinite;
  }

  // Whether the diagonal of L^-1 C L^-T is 1: a pivot that was rounding alone shows here.
  bool has_unit_variances(const T* z, const T* inverse) {
    kernels_.column_squares(z, g_.rows, g_.d, squares_.data());
    for (int64_t k = 0; k < g_.d; ++k) {
      const T* row = inverse + k * g_.d;
      const double shrinkage = this->eps_ * std::inner_product(row, row + k + 1, row, 0.0);
      if (!(std::abs(this->c_ * squares_[k] + shrinkage - 1) < kTolerance)) return false;
    }
    return true;
  }

  // L^-1 of the covariance of features_. A panel of rows is made when the rows above it are done:
  // covariance, less what the rows above eliminate, then elimination among themselves.
  bool factorise(T* inverse) {
    const int64_t d = g_.d, ld = ld_;
    const T c = static_cast<T>(this->c_);
    std::fill_n(inverse, d * d, T{0});
    for (int64_t begin = 0; begin < d; begin += kPivots) {
      const int64_t end = std::min(begin + kPivots, d), count = end - begin;
      T *upper = matrix_.data() + begin * (ld + 1), *rows = inverse + begin * d;
      this->multiply(count, d - begin, g_.rows, this->transposed(features_.data() + begin),
                     features_.data() + begin, d, upper, ld);
      for (int64_t k = 0; k < count; ++k) {
        for (int64_t j = 0; j < d - begin; ++j) upper[k * ld + j] *= c;
        upper[k * (ld + 1)] += static_cast<T>(this->eps_);
      }
      if (begin > 0) {
        pack(matrix_.data() + begin, ld, begin, count, -1, panel_.data());  // -L
        const LeftMatrix<T> left = this->padded(panel_.data());
        this->multiply(count, d - begin, begin, left, matrix_.data() + begin, ld, upper, ld, true);
        this->multiply(count, begin, begin, left, inverse, d, rows, d);
      }
      if (!kernels_.eliminate(matrix_.data(), ld, inverse, begin, end, d, lowest_.data()))
        return false;
    }
    return true;
  }

  // out (columns, ld_) = scale times the transpose of a (rows, columns), rows at most d
  void pack(const T* a, int64_t ld, int64_t rows, int64_t columns, T scale, T* out) {
    std::fill_n(scale_.data(), rows, scale);
    kernels_.pack(a, ld, static_cast<int>(rows), columns, scale_.data(), out, ld_);
  }

  Buffer<T> matrix_, panel_, transposed_;
  Buffer<double> squares_;
  Buffer<T> lowest_, scale_;
};

}  // namespace

template <class T>
void whiten_cholesky(const Groups& groups, double eps, const void* x, T* z, T* inverse,
                     int32_t* info) {
  for_groups<Cholesky<T>>(groups, eps, [&](auto& worker, int64_t i) {
    info[i] = worker.forward(groups.at(x, i), z + i * groups.size(), inverse + i * groups.square());
  });
}

template <class T>
void whiten_cholesky_backward(const Groups& groups, double eps, const T* grad, const T* z,
                              const T* inverse, void* dx) {
  for_groups<Cholesky<T>>(groups, eps, [&](auto& worker, int64_t i) {
    worker.backward(grad + i * groups.size(), z + i * groups.size(), inverse + i * groups.square(),
                    groups.at(dx, i));
  });
}

#define CK_INSTANTIATE(T)                                                                     \
  template void whiten_cholesky(const Groups&, double, const void*, T*, T*, int32_t*);        \
  template void whiten_cholesky_backward(const Groups&, double, const T*, const T*, const T*, \
                                         void*);
CK_INSTANTIATE(float)
CK_INSTANTIATE(double)
#undef CK_INSTANTIATE

}  // namespace ck
