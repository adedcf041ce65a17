// ZCA whitening: as many groups as fit into a thread's cache are decomposed at once.
#include <cmath>

#include "whiten.h"

namespace ck {
namespace {

template <class T>
class Zca : Group<T> {
  using Base = Group<T>;
  using Base::features_;
  using Base::g_;
  using Base::kernels_;
  using Base::ld_;

 public:
  Zca(const Groups& groups, double eps, int64_t together = 1)
      : Base(groups, eps),
        matrices_(together * groups.d * groups.ld()),
        products_(groups.d * groups.ld()),
        room_((groups.d + 5) * groups.ld()),
        values_(together * groups.d),
        beside_(together * groups.d) {}

  // How many groups forward() should get at once.
  static int64_t together(const Groups& groups) {
    const int64_t bytes = groups.d * groups.ld() * static_cast<int64_t>(sizeof(T));
    return std::clamp<int64_t>(kCache / bytes, 1, kMatrices);
  }

  void forward(int64_t count, const void* x, T* z, T* vectors, T* roots, int32_t* info) {
    const int64_t matrix = g_.d * ld_;
    double scales[kMatrices];
    for (int64_t i = 0; i < count; ++i) {
      T* covariance = matrices_.data() + i * matrix;
      this->center(g_.at(x, i));
      info[i] = this->covariance(covariance) ? kFine : kNotFinite;
      scales[i] = scale_down(covariance, info[i] == kFine);
    }
    kernels_.eigen(static_cast<int>(count), g_.d, ld_, matrices_.data(), values_.data(),
                   beside_.data(), room_.data());
    for (int64_t i = 0; i < count; ++i) {
      const double* values = values_.data() + i * g_.d;
      const auto [least, largest] = std::minmax_element(values, values + g_.d);
      if (info[i] == kFine && !(*least > kNoise * *largest)) info[i] = kNotDefinite;
      T *to_vectors = vectors + i * g_.square(), *to_roots = roots + i * g_.d;
      if (info[i] != kFine) {
        std::fill_n(z + i * g_.size(), g_.size(), Base::kNan);
        std::fill_n(to_vectors, g_.square(), Base::kNan);
        std::fill_n(to_roots, g_.d, Base::kNan);
        continue;
      }
      for (int64_t k = 0; k < g_.d; ++k) {
        to_roots[k] = static_cast<T>(std::sqrt(values[k] * scales[i]));
        std::copy_n(matrices_.data() + i * matrix + k * ld_, g_.d, to_vectors + k * g_.d);
      }
      if (count > 1) this->center(g_.at(x, i));  // those of the last one lie there
      inverse_root(to_vectors, to_roots, products_.data());
      this->multiply(g_.rows, g_.d, g_.d, this->samples(features_.data()), products_.data(), ld_,
                     z + i * g_.size(), g_.d);
    }
  }

  // With V the eigenvectors, M = V Z^T G V^T, T_ij = (s_i M_ij + s_j M_ji) / (s_i + s_j):
  // dXc = G V^T s^-1 V - c Z V^T T s^-1 V
  void backward(const T* grad, const T* z, const T* vectors, const T* roots, void* dx) {
    if (std::isnan(roots[0])) return this->clear(dx);
    const int64_t d = g_.d;
    T *made = this->room_for(dx), *a = matrices_.data(), *b = products_.data();
    this->multiply(d, d, g_.rows, this->transposed(z), grad, d, a, ld_);
    this->multiply(d, d, d, this->samples(vectors), a, ld_, b, ld_);
    // M^T = V (V Z^T G)^T, which needs no transposed right operand
    transpose(b, a);
    this->multiply(d, d, d, this->samples(vectors), a, ld_, b, ld_);
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < d; ++j) {
        const T mixed = roots[i] * b[j * ld_ + i] + roots[j] * b[i * ld_ + j];
        a[i * ld_ + j] = mixed / ((roots[i] + roots[j]) * roots[j]) * static_cast<T>(-this->c_);
      }
    this->multiply(d, d, d, this->padded(a), vectors, d, b, ld_);
    this->multiply(d, d, d, this->transposed(vectors), b, ld_, a, ld_);
    this->multiply(g_.rows, d, d, this->samples(z), a, ld_, made, d);
    inverse_root(vectors, roots, a);
    this->multiply(g_.rows, d, d, this->samples(grad), a, ld_, made, d, true);
    this->finish(dx);
  }

 private:
  static constexpr int64_t kCache = 1 << 19;
  static constexpr double kNoise = 10 * std::numeric_limits<T>::epsilon();  // of an eigenvalue

  // Divides by the largest variance, which is returned. What is not finite becomes 0.
  double scale_down(T* covariance, bool finite) {
    T largest = 0;
    for (int64_t k = 0; k < g_.d; ++k) largest = std::max(largest, covariance[k * (ld_ + 1)]);
    if (!finite || largest < std::numeric_limits<T>::min()) largest = 1;
    for (int64_t i = 0; i < g_.d; ++i) {
      T* row = covariance + i * ld_;
      for (int64_t j = 0; j < g_.d; ++j) row[j] = finite ? row[j] / largest : 0;
      std::fill_n(row + g_.d, ld_ - g_.d, T{0});
    }
    return largest;
  }

  // out = V^T s^-1 V
  void inverse_root(const T* vectors, const T* roots, T* out) {
    T* scaled = room_.data();
    for (int64_t i = 0; i < g_.d; ++i)
      for (int64_t j = 0; j < g_.d; ++j) scaled[i * ld_ + j] = vectors[i * g_.d + j] / roots[i];
    this->multiply_symmetric(g_.d, this->transposed(vectors), scaled, ld_, out);
    this->mirror(out, 1);
  }

  void transpose(const T* a, T* out) {
    for (int64_t i = 0; i < g_.d; ++i)
      for (int64_t j = 0; j < g_.d; ++j) out[j * ld_ + i] = a[i * ld_ + j];
  }

  Buffer<T> matrices_, products_, room_;
  Buffer<double> values_, beside_;
};

}  // namespace

template <class T>
void whiten_zca(const Groups& groups, double eps, const void* x, T* z, T* vectors, T* roots,
                int32_t* info) {
  const int64_t together = Zca<T>::together(groups);
  parallel_for(0, groups.count, 1, [&](int64_t begin, int64_t end) {
    Zca<T> worker(groups, eps, together);
    for_columns(end - begin, together, [&](int64_t first, int64_t last) {
      const int64_t i = begin + first;
      worker.forward(last - first, groups.at(x, i), z + i * groups.size(),
                     vectors + i * groups.square(), roots + i * groups.d, info + i);
    });
  });
}

template <class T>
void whiten_zca_backward(const Groups& groups, double eps, const T* grad, const T* z,
                         const T* vectors, const T* roots, void* dx) {
  for_groups<Zca<T>>(groups, eps, [&](auto& worker, int64_t i) {
    worker.backward(grad + i * groups.size(), z + i * groups.size(), vectors + i * groups.square(),
                    roots + i * groups.d, groups.at(dx, i));
  });
}

#define CK_INSTANTIATE(T)                                                                          \
  template void whiten_zca(const Groups&, double, const void*, T*, T*, T*, int32_t*);              \
  template void whiten_zca_backward(const Groups&, double, const T*, const T*, const T*, const T*, \
                                    void*);
CK_INSTANTIATE(float)
CK_INSTANTIATE(double)
#undef CK_INSTANTIATE

}  // namespace ck
