// Whitening by Newton-Schulz steps. Every matrix of them is a polynomial of the covariance, so that
// all products are symmetric; of those of the first steps only the lower halves are made.
#include <cmath>

#include "whiten.h"

namespace ck {
namespace {

template <class T>
class NewtonSchulz : Group<T> {
  using Base = Group<T>;
  using Base::features_;
  using Base::g_;
  using Base::ld_;

 public:
  NewtonSchulz(const Groups& groups, double eps)
      : Base(groups, eps), direction_(groups.d * groups.ld()) {
    for (Pair* pair : {&root_, &inverse_, &factor_, &product_}) *pair = Pair(groups.d * ld_);
  }

  Info forward(int64_t iterations, const void* x, T* z, T* covariance) {
    this->center(x);
    if (!this->covariance(product_.value.data())) {
      std::fill_n(z, g_.size(), Base::kNan);
      std::fill_n(covariance, g_.square(), Base::kNan);
      return kNotFinite;
    }
    for_entries([&](int64_t from, int64_t to) { covariance[to] = product_.value[from]; });
    const double trace = trace_of(covariance);
    if (trace == 0) {  // constant features
      std::fill_n(z, g_.size(), T{0});
      return kFine;
    }
    iterate<false>(iterations, covariance, trace);
    const T* inverse = inverse_.value.data();
    this->multiply(g_.rows, g_.d, g_.d, this->samples(features_.data()), inverse, ld_, z, g_.d);
    return kFine;
  }

  // P = f(S) / sqrt(t), S = C / t, t = tr C, has the gradient E, the symmetric part of Xc^T G. With
  // A, the derivative of f at S in the direction E, the gradient of C is
  // D = (A - (<A, S> + <E, f> / 2) I) / t^1.5, and dXc = G P + 2 c Xc D.
  void backward(int64_t iterations, const T* grad, const void* x, const T* covariance, void* dx) {
    const double trace = trace_of(covariance);
    if (!(trace > 0)) return this->clear(dx);  // constant, or it failed
    this->center(x);
    T *made = this->room_for(dx), *product = product_.value.data();
    this->multiply(g_.d, g_.d, g_.rows, this->transposed(features_.data()), grad, g_.d, product,
                   ld_);
    for (int64_t i = 0; i < g_.d; ++i)
      for (int64_t j = 0; j < g_.d; ++j)
        direction_[i * ld_ + j] = (product[i * ld_ + j] + product[j * ld_ + i]) / 2;
    iterate<true>(iterations, covariance, trace);
    T* along = inverse_.slope.data();
    double inner = 0;
    for_entries([&](int64_t k, int64_t of_covariance) {
      inner += along[k] * covariance[of_covariance] / trace;
      inner += direction_[k] * inverse_.value[k] * std::sqrt(trace) / 2;
    });
    for (int64_t i = 0; i < g_.d; ++i) along[i * (ld_ + 1)] -= static_cast<T>(inner);
    const T scale = static_cast<T>(2 * this->c_ / (trace * std::sqrt(trace)));
    for_entries([&](int64_t k, int64_t) { along[k] *= scale; });
    this->multiply(g_.rows, g_.d, g_.d, this->samples(grad), inverse_.value.data(), ld_, made,
                   g_.d);
    this->multiply(g_.rows, g_.d, g_.d, this->samples(features_.data()), along, ld_, made, g_.d,
                   true);
    this->finish(dx);
  }

 private:
  // A matrix (d, ld), and its derivative in the direction E.
  struct Pair {
    Pair() = default;
    explicit Pair(int64_t size) : value(size), slope(size) {}
    Buffer<T> value, slope;
  };

  // run(index, index without padding) for all entries of a matrix
  template <class Run>
  void for_entries(Run run) {
    for (int64_t i = 0; i < g_.d; ++i)
      for (int64_t j = 0; j < g_.d; ++j) run(i * ld_ + j, i * g_.d + j);
  }

  double trace_of(const T* covariance) const {
    double trace = 0;
    for (int64_t k = 0; k < g_.d; ++k) trace += covariance[k * (g_.d + 1)];
    return trace;
  }

  // inverse_ = P, and the derivative of f. The coupled pair Y = S P, P stays stable where P alone
  // does not, as long as the products are in this order.
  template <bool Slope>
  void iterate(int64_t iterations, const T* covariance, double trace) {
    const T scale = static_cast<T>(1 / trace);
    for_entries([&](int64_t to, int64_t from) { root_.value[to] = covariance[from] * scale; });
    if constexpr (Slope) for_entries([&](int64_t k, int64_t) { root_.slope[k] = direction_[k]; });
    for (int64_t step = 0; step < iterations; ++step) {
      const bool symmetric = step < kSymmetricSteps;
      if (step == 0)
        halve(root_, factor_, Slope);
      else
        multiply_pair<Slope>(inverse_, root_, factor_, symmetric, T(-0.5));
      for (int64_t k = 0; k < g_.d; ++k) factor_.value[k * (ld_ + 1)] += T(1.5);
      if (step + 1 < iterations) {
        multiply_pair<Slope>(root_, factor_, product_, symmetric, 1);
        std::swap(root_, product_);
      }
      if (step == 0) {
        std::swap(inverse_, factor_);
      } else {
        multiply_pair<Slope>(factor_, inverse_, product_, symmetric, 1);
        std::swap(inverse_, product_);
      }
    }
    const T root = static_cast<T>(1 / std::sqrt(trace));
    for_entries([&](int64_t k, int64_t) { inverse_.value[k] *= root; });
  }

  void halve(const Pair& a, Pair& out, bool slope) {
    for_entries([&](int64_t k, int64_t) {
      out.value[k] = T(-0.5) * a.value[k];
      if (slope) out.slope[k] = T(-0.5) * a.slope[k];
    });
  }

  // out = scale a b
  template <bool Slope>
  void multiply_pair(const Pair& a, const Pair& b, Pair& out, bool symmetric, T scale) {
    const auto add = [&](const Buffer<T>& left, const Buffer<T>& right, Buffer<T>& to, bool sum) {
      const LeftMatrix<T> rows = this->padded(left.data());
      if (symmetric)
        this->multiply_symmetric(g_.d, rows, right.data(), ld_, to.data(), sum);
      else
        this->multiply(g_.d, g_.d, g_.d, rows, right.data(), ld_, to.data(), ld_, sum);
    };
    const auto finish = [&](Buffer<T>& matrix) {
      if (symmetric)
        this->mirror(matrix.data(), scale);
      else if (scale != 1)
        for_entries([&](int64_t k, int64_t) { matrix[k] *= scale; });
    };
    add(a.value, b.value, out.value, false);
    finish(out.value);
    if constexpr (Slope) {
      add(a.slope, b.value, out.slope, false);
      add(a.value, b.slope, out.slope, true);
      finish(out.slope);
    }
  }

  // A product that is made symmetric passes errors on that are up to 1.5^step / 8 times as large:
  // P is at most 1.5^step. Other steps leave them as they are.
  static constexpr int64_t kSymmetricSteps = 6;

  Pair root_, inverse_, factor_, product_;
  Buffer<T> direction_;
};

}  // namespace

template <class T>
void whiten_newton_schulz(const Groups& groups, double eps, int64_t iterations, const void* x, T* z,
                          T* covariance, int32_t* info) {
  for_groups<NewtonSchulz<T>>(groups, eps, [&](auto& worker, int64_t i) {
    info[i] = worker.forward(iterations, groups.at(x, i), z + i * groups.size(),
                             covariance + i * groups.square());
  });
}

template <class T>
void whiten_newton_schulz_backward(const Groups& groups, double eps, int64_t iterations,
                                   const T* grad, const void* x, const T* covariance, void* dx) {
  for_groups<NewtonSchulz<T>>(groups, eps, [&](auto& worker, int64_t i) {
    worker.backward(iterations, grad + i * groups.size(), groups.at(x, i),
                    covariance + i * groups.square(), groups.at(dx, i));
  });
}

#define CK_INSTANTIATE(T)                                                                 \
  template void whiten_newton_schulz(const Groups&, double, int64_t, const void*, T*, T*, \
                                     int32_t*);                                           \
  template void whiten_newton_schulz_backward(const Groups&, double, int64_t, const T*,   \
                                              const void*, const T*, void*);
CK_INSTANTIATE(float)
CK_INSTANTIATE(double)
#undef CK_INSTANTIATE

}  // namespace ck
