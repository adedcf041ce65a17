// The mean distance over the pairs of views of each row, in one pass over the views; formulas and
// names are those of whitening/operators.py.
#include <algorithm>

#include "whiten.h"

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
    std::fill_n(mean_.data(), d_, T{0});
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
  Buffer<T> inverse_, difference_, mean_;
};

template <class T, class Run>
void for_rows(int64_t views, int64_t rows, int64_t d, bool normalize, Run run) {
  const int64_t grain = std::max<int64_t>(1, kSerialWork / std::max<int64_t>(1, views * d));
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    Views<T> row(views, rows * d, d, normalize);
    for (int64_t i = begin; i < end; ++i) run(row, i);
  });
}

}  // namespace

template <class T>
void view_distance(int64_t views, int64_t rows, int64_t d, bool normalize, const T* z,
                   T* distance) {
  for_rows<T>(views, rows, d, normalize,
              [&](Views<T>& row, int64_t i) { distance[i] = row.distance(z + i * d); });
}

template <class T>
void view_distance_backward(int64_t views, int64_t rows, int64_t d, bool normalize, const T* grad,
                            const T* z, T* dz) {
  for_rows<T>(views, rows, d, normalize,
              [&](Views<T>& row, int64_t i) { row.backward(z + i * d, grad[i], dz + i * d); });
}

#define CK_INSTANTIATE(T)                                                     \
  template void view_distance(int64_t, int64_t, int64_t, bool, const T*, T*); \
  template void view_distance_backward(int64_t, int64_t, int64_t, bool, const T*, const T*, T*);
CK_INSTANTIATE(float)
CK_INSTANTIATE(double)
#undef CK_INSTANTIATE

}  // namespace ck
