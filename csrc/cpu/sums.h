// What a forward sweep sums up for rows and keys, and how large logits may be for it.
#pragma once

#include <cmath>
#include <type_traits>

#include "problem.h"

namespace ck {

// Sums for each row (or each key), one set for each part the other side is cut into.
enum Field { kSum, kWeighted, kShift, kRank, kTotal, kCount, kFields };

class Sums {
 public:
  Sums(int64_t size, int fields, int64_t parts = 1)
      : values_(at::zeros({parts, fields, size}, at::kDouble)) {}
  int64_t parts() const { return values_.size(0); }
  int64_t size() const { return values_.size(2); }
  int fields() const { return static_cast<int>(values_.size(1)); }
  double* of(int field, int64_t part = 0) {
    return values_.data_ptr<double>() + (part * values_.size(1) + field) * values_.size(2);
  }
  // adds up the parts, rescaled to the largest shift, into part 0; factors as used, (parts, size)
  at::Tensor merge() {
    const at::Tensor factors = at::ones({parts(), size()}, at::kDouble);
    if (parts() == 1) return factors;
    const at::Tensor largest = values_.select(1, kShift).amax(0);
    for (int64_t part = 0; part < parts(); ++part) {
      double* factor = factors.data_ptr<double>() + part * size();
      for (int64_t i = 0; i < size(); ++i) {
        const double shift = of(kShift, part)[i], top = largest.const_data_ptr<double>()[i];
        factor[i] = shift == top ? 1 : std::exp(shift - top);
        SoftmaxState<double> sum{0, 0};
        const SoftmaxState<double> mine{of(kSum, part)[i], of(kWeighted, part)[i]};
        if (part > 0) sum = {of(kSum)[i], of(kWeighted)[i]};
        SoftmaxFold<true>::merge(sum, mine, factor[i]);
        of(kSum)[i] = sum.sum;
        of(kWeighted)[i] = sum.weighted;
        for (int field = kRank; part > 0 && field < fields(); ++field)
          of(field)[i] += of(field, part)[i];
      }
    }
    values_[0][kShift].copy_(largest);
    return factors;
  }
  at::Tensor field(int which) const { return values_[0][which]; }

 private:
  at::Tensor values_;
};

// One shift for all logits, where their bound allows it: then partial sums are simply added, and
// one exponential serves the row and the column of a pair.
struct FixedShift {
  double shift;
  double smallest;  // a sum below may miss terms that were flushed to 0
  bool promising;
};

template <class T>
FixedShift fixed_shift(const Problem<T>& p) {
  const double reach = std::is_same_v<T, float> ? 85 : 700;  // exp(+-reach) is a normal number
  // the norms of keys of their own are known only to be 1
  const double key_norm = p.paired ? 1 : p.y.largest_norm();
  const double largest_key = p.normalize ? 1 : std::max(1.0, key_norm);
  const double bound = std::abs(p.scale) * p.x.largest_norm() * key_norm * 1.001 + p.largest_bias;
  const double terms = static_cast<double>(std::max(p.x.rows(), p.keys));
  // sums run over all pairs, of weights times logits or times keys
  const double room = std::log(terms) + std::log(std::max({1.0, bound, largest_key}));
  const double precision = std::is_same_v<T, float> ? 19 : 40;  // exp(-precision) is negligible
  // 0 subtracts without rounding; with a bound of 120 and more, rows far below it are likely, and
  // the sweep would have to be done again
  return {std::max(0.0, bound - (reach - room)), std::exp(-reach + precision + std::log(terms)),
          bound < 120 && (p.normalize || !p.paired)};
}

// Features whose products are the logits of a symmetric matrix, but for the sign of the scale. The
// product of i and j has the same bits as that of j and i: where one tile serves both, and large
// logits are looked at again, exp(z - lse) is then exact to its own rounding.
template <class T>
at::Tensor symmetric_factor(const Problem<T>& p, const PairArguments& a) {
  const at::Tensor x = a.x_more.has_value() ? at::cat({a.x, *a.x_more}) : a.x;
  const at::Tensor inverse =
      at::from_blob(const_cast<T*>(p.x.inverse()), {p.x.rows()}, at::TensorOptions(kScalar<T>));
  return x.to(kScalar<T>) * (inverse * std::sqrt(std::abs(p.scale))).unsqueeze(1);
}

inline PairArguments with_factor(const PairArguments& a, const at::Tensor& factor,
                                 const at::Tensor& sign) {
  static const OptionalTensor none;  // arguments are references
  return {
      .x = factor,
      .x_more = none,
      .y = a.y,
      .y_more = none,
      .scale = sign,
      .bias = a.bias,
      .exclude_rows = a.exclude_rows,
      .exclude_cols = a.exclude_cols,
      .keep_rows = a.keep_rows,
      .keep_cols = a.keep_cols,
      .normalize = false,
  };
}

template <class T>
at::Tensor sign_of_scale(const Problem<T>& p) {
  return at::scalar_tensor(p.scale < 0 ? -1 : 1, at::TensorOptions(kScalar<T>));
}

}  // namespace ck
