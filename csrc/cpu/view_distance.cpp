// The mean distance over the pairs of views of each row, in one pass over the views; formulas and
// names are those of whitening/operators.py.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "problem.h"
#include "tile.h"

namespace ck {
namespace {

// The views of one row: rows of z, `stride` apart.
template <class T>
class Views {
 public:
  Views(int64_t views, int64_t stride, int64_t d, bool normalize)
      : views_(views),
        stride_(stride),
        d_(d),
        normalize_(normalize),
        inverse_(views, T{1}),
        difference_(d),
        mean_(d) {}

  // calls run(view, its unit vector less their mean)
  template <class Run>
  void for_differences(const T* z, Run run) {
    if (normalize_) kernels_.norms(z, stride_, views_, d_, inverse_.data(), nullptr);
    std::fill(mean_.begin(), mean_.end(), T{0});
    for (int64_t v = 0; v < views_; ++v)
      kernels_.add_scaled(inverse_[v] / views_, z + v * stride_, d_, mean_.data());
    for (int64_t v = 0; v < views_; ++v) {
      for (int64_t k = 0; k < d_; ++k) difference_[k] = inverse_[v] * z[v * stride_ + k] - mean_[k];
      run(v, difference_.data());
    }
  }

  T distance(const T* z) {
    T spread = 0, inverse, norm;
    for_differences(z, [&](int64_t, const T* difference) {
      kernels_.norms(difference, d_, 1, d_, &inverse, &norm);
      spread += norm * norm;
    });
    return spread * 2 / (views_ - 1);
  }

  void backward(const T* z, T grad, T* dz) {
    for_differences(z, [&](int64_t v, const T* difference) {
      kernels_.project(difference, z + v * stride_, inverse_[v], normalize_,
                       grad * inverse_[v] * 4 / (views_ - 1), d_, dz + v * stride_);
    });
  }

 private:
  const TileKernels<T>& kernels_ = tile_kernels<T>();
  const int64_t views_, stride_, d_;
  const bool normalize_;
  std::vector<T> inverse_, difference_, mean_;
};

template <class T, class Run>
void for_rows(const at::Tensor& z, bool normalize, Run run) {
  const int64_t views = z.size(0), rows = z.size(1), d = z.size(2);
  const int64_t grain = std::max<int64_t>(1, kSerialWork / (views * d));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    Views<T> row(views, rows * d, d, normalize);
    for (int64_t i = begin; i < end; ++i) run(row, i);
  });
}

at::Tensor view_distance(const at::Tensor& z, bool normalize) {
  const at::Tensor views = z.contiguous();
  at::Tensor out = at::empty({z.size(1)}, z.options());
  with_compute_type(z, [&](auto t) {
    using T = decltype(t);
    const T* from = views.const_data_ptr<T>();
    T* to = out.data_ptr<T>();
    for_rows<T>(z, normalize,
                [&](Views<T>& row, int64_t i) { to[i] = row.distance(from + i * z.size(2)); });
  });
  return out;
}

at::Tensor view_distance_backward(const at::Tensor& grad, const at::Tensor& z, bool normalize) {
  const at::Tensor views = z.contiguous(), upstream = grad.contiguous();
  at::Tensor dz = at::empty_like(views);
  with_compute_type(z, [&](auto t) {
    using T = decltype(t);
    const T *from = views.const_data_ptr<T>(), *grads = upstream.const_data_ptr<T>();
    T* to = dz.data_ptr<T>();
    for_rows<T>(z, normalize, [&](Views<T>& row, int64_t i) {
      row.backward(from + i * z.size(2), grads[i], to + i * z.size(2));
    });
  });
  return dz;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(contrastive_kernels, m) {
  m.def("view_distance_cpu(Tensor z, bool normalize) -> Tensor");
  m.def("view_distance_backward_cpu(Tensor grad, Tensor z, bool normalize) -> Tensor");
}

TORCH_LIBRARY_IMPL(contrastive_kernels, CPU, m) {
  m.impl("view_distance_cpu", view_distance);
  m.impl("view_distance_backward_cpu", view_distance_backward);
}

}  // namespace ck
