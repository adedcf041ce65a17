// Statistics and their gradients from above, as the tiles of a backward sweep take them.
#pragma once

#include <algorithm>
#include <cmath>

#include "backward.h"

namespace ck {

// The fields of one side as the tiles take them. A row with no pair (lse = -inf) gets lse = +inf
// and no gradient, so that it adds nothing, whatever came from above. What rounding took from lse,
// `low`, comes into the gradients: exp(z - lse - low) = exp(z - lse) exp(-low).
template <class T>
class Side {
 public:
  enum Field { kLse, kMean, kGradLse, kGradMean, kFields };
  Side() = default;
  Side(int64_t size, const Upstream<T>& in) : size_(size), values_(kFields * size, T{0}) {
    T* values = values_.data();
    const auto fill = [&](Field field, const T* source) {
      if (source != nullptr) std::copy_n(source, size, values + field * size);
    };
    fill(kLse, in.lse);
    fill(kGradLse, in.grad_lse);
    fill(kGradMean, in.grad_mean);
    if (in.grad_mean != nullptr) fill(kMean, in.mean);
    for (int64_t i = 0; i < size; ++i) {
      if (in.low != nullptr) {
        const T factor = std::exp(-in.low[i]);
        values[kGradLse * size + i] *= factor;
        values[kGradMean * size + i] *= factor;
      }
      if (values[kLse * size + i] == -std::numeric_limits<T>::infinity()) {
        values[kLse * size + i] = std::numeric_limits<T>::infinity();
        values[kGradLse * size + i] = values[kGradMean * size + i] = 0;
      }
    }
  }
  bool given() const { return size_ > 0; }
  // whether no lse is below `least`
  bool reaches(double least) const {
    return std::all_of(of(kLse), of(kLse) + size_, [=](T lse) { return lse >= least; });
  }
  // puts `shift` in the place of every lse: exp(z - lse) = exp(z - shift) exp(shift - lse)
  void shift_to(double shift) {
    T* values = values_.data();
    for (int64_t i = 0; i < size_; ++i) {
      if (values[kLse * size_ + i] == std::numeric_limits<T>::infinity()) continue;
      const double factor = std::exp(shift - values[kLse * size_ + i]);
      values[kGradLse * size_ + i] *= factor;
      values[kGradMean * size_ + i] *= factor;
      values[kLse * size_ + i] = static_cast<T>(shift);
    }
  }
  const T* of(Field field) const { return values_.data() + field * size_; }
  Coefficients<T> from(int64_t begin) const {
    return {of(kLse) + begin, of(kMean) + begin, of(kGradLse) + begin, of(kGradMean) + begin};
  }

 private:
  int64_t size_ = 0;
  Buffer<T> values_;
};

}  // namespace ck
