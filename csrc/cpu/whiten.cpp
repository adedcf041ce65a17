// Cholesky whitening of many small groups: one group at a time on each thread, in a workspace of
// its own, with the products of gemm.h. Formulas and names are those of whitening/operators.py.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "gemm.h"
#include "problem.h"
#include "tile.h"

namespace ck {
namespace {

constexpr int64_t kPanel = 16;      // rows of the factor that are eliminated together
constexpr int64_t kColumns = 32;    // columns of a product with a triangular matrix
constexpr double kTolerance = 0.1;  // of a variance of the result

// What `info` of a group says.
enum Info : int32_t { kFine = 0, kNotDefinite = 1, kNotFinite = 2 };

int64_t padded(int64_t size) { return divide_up(size, 16) * 16; }

struct Shape {
  explicit Shape(const at::Tensor& x)
      : groups(x.size(0)), rows(x.size(1)), d(x.size(2)), ld_rows(padded(rows)), ld(padded(d)) {}
  int64_t groups, rows, d;
  int64_t ld_rows, ld;  // row strides of transposed matrices (d, rows) and of matrices (d, d)
};

// calls run(begin, end) for all columns, a few at a time
template <class Run>
void for_columns(int64_t size, int64_t step, Run run) {
  for (int64_t begin = 0; begin < size; begin += step) run(begin, std::min(begin + step, size));
}

template <class T>
class Group {
 public:
  Group(const Shape& shape, double eps)
      : s_(shape),
        c_(static_cast<T>((1 - eps) / (shape.rows - 1))),
        eps_(static_cast<T>(eps)),
        features_(shape.rows * shape.d),
        packed_(shape.d * shape.ld_rows),
        matrix_(shape.d * shape.ld),
        panel_(kPanel * shape.ld),
        transposed_(shape.d * shape.ld),
        mean_(shape.d),
        squares_(shape.d),
        lowest_(shape.d),
        row_scale_(std::max(shape.rows, shape.d)) {}

  // z (rows, d) and inverse (d, d) of x (rows, d)
  Info forward(const T* x, T* z, T* inverse) {
    const Info info = whiten(x, z, inverse);
    if (info != kFine) {
      std::fill_n(z, s_.rows * s_.d, std::numeric_limits<T>::quiet_NaN());
      std::fill_n(inverse, s_.d * s_.d, std::numeric_limits<T>::quiet_NaN());
    }
    return info;
  }

  // dx (rows, d); 0 for a group that failed, so that it leaves the gradients of others alone
  void backward(const T* grad, const T* z, const T* inverse, T* dx) {
    if (std::isnan(inverse[0])) return void(std::fill_n(dx, s_.rows * s_.d, T{0}));
    pack(grad, s_.d, s_.rows, s_.d, -c_, packed_.data(), s_.ld_rows);
    for_columns(s_.d, kColumns, [&](int64_t begin, int64_t end) {  // the lower triangle of -c M
      gemm(end - begin, end, s_.rows, packed_.data() + begin * s_.ld_rows, s_.ld_rows, z, s_.d,
           matrix_.data() + begin * s_.ld, s_.ld, false);
    });
    pack(matrix_.data(), s_.ld, s_.d, s_.d, 1, transposed_.data(), s_.ld);
    for (int64_t i = 0; i < s_.d; ++i)  // mirrored
      std::copy_n(&transposed_[i * s_.ld + i], s_.d - i, &matrix_[i * s_.ld + i]);
    std::copy_n(grad, s_.rows * s_.d, features_.data());
    gemm(s_.rows, s_.d, s_.d, z, s_.d, matrix_.data(), s_.ld, features_.data(), s_.d, true);
    for_columns(s_.d, kColumns, [&](int64_t begin, int64_t end) {
      gemm(s_.rows, end - begin, s_.d - begin, features_.data() + begin, s_.d,
           inverse + begin * s_.d + begin, s_.d, dx + begin, s_.d, false);
    });
    kernels_.center(dx, s_.rows, s_.d, dx, mean_.data());
  }

 private:
  Info whiten(const T* x, T* z, T* inverse) {
    constexpr double kNoise = 10 * std::numeric_limits<T>::epsilon();
    const double mean_noise = kNoise + s_.rows * std::numeric_limits<double>::epsilon();
    kernels_.center(x, s_.rows, s_.d, features_.data(), mean_.data());
    kernels_.column_squares(features_.data(), s_.rows, s_.d, squares_.data());
    for (int64_t k = 0; k < s_.d; ++k) {
      const double variance = c_ * squares_[k] + eps_;
      if (!(variance < std::numeric_limits<T>::max())) return kNotFinite;
      // what is left of a variance below this is rounding, of the elimination or of the mean
      lowest_[k] = std::max(kNoise * variance, std::pow(mean_noise * mean_[k], 2));
    }
    if (!factorise(inverse)) return kNotDefinite;
    pack(inverse, s_.d, s_.d, s_.d, 1, transposed_.data(), s_.ld);
    for_columns(s_.d, kColumns, [&](int64_t begin, int64_t end) {  // L^-T is upper triangular
      gemm(s_.rows, end - begin, end, features_.data(), s_.d, transposed_.data() + begin, s_.ld,
           z + begin, s_.d, false);
    });
    return has_unit_variances(z, inverse) ? kFine : kNotDefinite;
  }

  // Whether the diagonal of L^-1 C L^-T is 1: a pivot that was rounding alone shows here.
  bool has_unit_variances(const T* z, const T* inverse) {
    kernels_.column_squares(z, s_.rows, s_.d, squares_.data());
    for (int64_t k = 0; k < s_.d; ++k) {
      const T* row = inverse + k * s_.d;
      const double shrinkage = eps_ * std::inner_product(row, row + k + 1, row, 0.0);
      if (!(std::abs(c_ * squares_[k] + shrinkage - 1) < kTolerance)) return false;
    }
    return true;
  }

  // L^-1 of the covariance of features_. A panel of rows is made when the rows above it are done:
  // covariance, less what the rows above eliminate, then elimination among themselves.
  bool factorise(T* inverse) {
    const int64_t d = s_.d, ld = s_.ld;
    std::fill_n(inverse, d * d, T{0});
    pack(features_.data(), d, s_.rows, d, c_, packed_.data(), s_.ld_rows);
    for (int64_t begin = 0; begin < d; begin += kPanel) {
      const int64_t end = std::min(begin + kPanel, d);
      T *upper = matrix_.data() + begin * ld + begin, *rows = inverse + begin * d;
      gemm(end - begin, d - begin, s_.rows, packed_.data() + begin * s_.ld_rows, s_.ld_rows,
           features_.data() + begin, d, upper, ld, false);
      for (int64_t k = 0; k < end - begin; ++k) upper[k * ld + k] += eps_;
      if (begin > 0) {
        pack(matrix_.data() + begin, ld, begin, end - begin, -1, panel_.data(), ld);  // -L
        gemm(end - begin, d - begin, begin, panel_.data(), ld, matrix_.data() + begin, ld, upper,
             ld, true);
        gemm(end - begin, begin, begin, panel_.data(), ld, inverse, d, rows, d, false);
      }
      if (!kernels_.eliminate(matrix_.data(), ld, inverse, begin, end, d, lowest_.data()))
        return false;
    }
    return true;
  }

  // out (columns, ld_out) = scale times the transpose of x (rows, columns)
  void pack(const T* x, int64_t ld, int64_t rows, int64_t columns, T scale, T* out,
            int64_t ld_out) {
    std::fill_n(row_scale_.begin(), rows, scale);
    kernels_.pack(x, ld, static_cast<int>(rows), columns, row_scale_.data(), out, ld_out);
  }

  const TileKernels<T>& kernels_ = tile_kernels<T>();
  const Shape s_;
  const T c_, eps_;
  std::vector<T> features_, packed_, matrix_, panel_, transposed_;
  std::vector<double> mean_, squares_;
  std::vector<T> lowest_, row_scale_;
};

template <class T, class Run>
void for_groups(const Shape& shape, double eps, Run run) {
  at::parallel_for(0, shape.groups, 1, [&](int64_t begin, int64_t end) {
    Group<T> group(shape, eps);
    for (int64_t g = begin; g < end; ++g) run(group, g);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> whiten_cholesky(const at::Tensor& x, double eps) {
  const at::Tensor groups = x.contiguous();
  const Shape shape(x);
  at::Tensor z = at::empty_like(groups);
  at::Tensor inverse = at::empty({shape.groups, shape.d, shape.d}, x.options());
  at::Tensor info = at::empty({shape.groups}, x.options().dtype(at::kInt));
  with_compute_type(x, [&](auto t) {
    using T = decltype(t);
    const T* from = groups.const_data_ptr<T>();
    T *to_z = z.data_ptr<T>(), *to_inverse = inverse.data_ptr<T>();
    int32_t* to_info = info.data_ptr<int32_t>();
    const int64_t size = shape.rows * shape.d, square = shape.d * shape.d;
    for_groups<T>(shape, eps, [&](Group<T>& group, int64_t g) {
      to_info[g] = group.forward(from + g * size, to_z + g * size, to_inverse + g * square);
    });
  });
  return {z, inverse, info};
}

at::Tensor whiten_cholesky_backward(const at::Tensor& grad, const at::Tensor& z,
                                    const at::Tensor& inverse, double eps) {
  const at::Tensor upstream = grad.contiguous();
  const Shape shape(z);
  at::Tensor dx = at::empty_like(z);
  with_compute_type(z, [&](auto t) {
    using T = decltype(t);
    const T *from = upstream.const_data_ptr<T>(), *whitened = z.const_data_ptr<T>();
    const T* inverses = inverse.const_data_ptr<T>();
    T* to = dx.data_ptr<T>();
    const int64_t size = shape.rows * shape.d, square = shape.d * shape.d;
    for_groups<T>(shape, eps, [&](Group<T>& group, int64_t g) {
      group.backward(from + g * size, whitened + g * size, inverses + g * square, to + g * size);
    });
  });
  return dx;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(contrastive_kernels, m) {
  m.def("whiten_cholesky_cpu(Tensor x, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("whiten_cholesky_backward_cpu(Tensor grad, Tensor z, Tensor inverse, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(contrastive_kernels, CPU, m) {
  m.impl("whiten_cholesky_cpu", whiten_cholesky);
  m.impl("whiten_cholesky_backward_cpu", whiten_cholesky_backward);
}

}  // namespace ck
