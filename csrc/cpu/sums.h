// What a forward sweep sums up for rows and keys, and how large logits may be for it.
#pragma once

#include <cmath>
#include <type_traits>

#include "problem.h"

namespace ck {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Sums for each row (or each key), one set for each part the other side is cut into.
enum Field { kSum, kWeighted, kShift, kRank, kTotal, kCount, kFields };

class Sums {
 public:
  Sums(int64_t size, int fields, int64_t parts = 1)
      : size_(size), fields_(fields), parts_(parts), values_(parts * fields * size, 0.0) {}
  int64_t parts() const { return parts_; }
  int64_t size() const { return size_; }
  int fields() const { return fields_; }
  double* of(int field, int64_t part = 0) {
    return values_.data() + (part * fields_ + field) * size_;
  }
  // adds up the parts, rescaled to the largest shift, into part 0; factors as used, (parts, size)
  Buffer<double> merge() {
    Buffer<double> factors(parts() * size(), 1.0);
    if (parts() == 1) return factors;
    Buffer<double> largest(size());
    std::copy_n(of(kShift), size(), largest.data());
    for (int64_t part = 1; part < parts(); ++part)
      for (int64_t i = 0; i < size(); ++i) largest[i] = std::max(largest[i], of(kShift, part)[i]);
    for (int64_t part = 0; part < parts(); ++part) {
      double* factor = factors.data() + part * size();
      for (int64_t i = 0; i < size(); ++i) {
        const double shift = of(kShift, part)[i], top = largest[i];
        const double by = shift == top ? 0 : shift - top;
        factor[i] = std::exp(by);
        SoftmaxState<double> sum{0, 0};
        const SoftmaxState<double> mine{of(kSum, part)[i], of(kWeighted, part)[i]};
        if (part > 0) sum = {of(kSum)[i], of(kWeighted)[i]};
        SoftmaxFold<true>::merge(sum, mine, by, factor[i]);
        of(kSum)[i] = sum.sum;
        of(kWeighted)[i] = sum.weighted;
        for (int field = kRank; part > 0 && field < fields(); ++field)
          of(field)[i] += of(field, part)[i];
      }
    }
    std::copy_n(largest.data(), size(), of(kShift));
    return factors;
  }

 private:
  int64_t size_;
  int fields_;
  int64_t parts_;
  Buffer<double> values_;
};

// One shift for all logits, where their bound allows it: then partial sums are simply added, and
// one exponential serves the row and the column of a pair.
struct FixedShift {
  double shift;
  double smallest;  // a sum below may miss terms that were flushed to 0
  bool promising;
};

template <class T>
FixedShift fixed_shift(const Problem<T>& p, double scale) {
  const double reach = std::is_same_v<T, float> ? 85 : 700;  // exp(+-reach) is a normal number
  // the norms of keys of their own are known only to be 1
  const double key_norm = p.paired ? 1 : p.y.largest_norm();
  const double largest_key = p.normalize ? 1 : std::max(1.0, key_norm);
  const double bound = std::abs(scale) * p.x.largest_norm() * key_norm * 1.001 + p.largest_bias;
  const double terms = static_cast<double>(std::max(p.x.rows(), p.keys));
  // sums run over all pairs, of weights times distances or times keys
  const double room = std::log(terms) + std::log(std::max({1.0, bound, largest_key}));
  const double precision = std::is_same_v<T, float> ? 19 : 40;  // exp(-precision) is negligible
  // 0 subtracts without rounding; with a bound of 120 and more, rows far below it are likely, and
  // the sweep would have to be done again
  return {std::max(0.0, bound - (reach - room)), std::exp(-reach + precision + std::log(terms)),
          bound < 120 && (p.normalize || !p.paired)};
}

template <class T>
FixedShift fixed_shift(const Problem<T>& p) {
  return fixed_shift(p, p.scale);
}

// a + b, and what rounding took from it, which of large logits is more than exp can bear
template <class T>
void put(double a, double b, T& sum, T& low) {
  sum = static_cast<T>(a + b);
  low = std::isfinite(sum) ? static_cast<T>(b - (sum - a)) : T{0};
}

// Features whose products are the logits of a symmetric matrix, but for the sign of the scale. The
// product of i and j has the same bits as that of j and i: where one tile serves both, and large
// logits are looked at again, exp(z - lse) is then exact to its own rounding.
template <class T>
Buffer<T> symmetric_factor(const Problem<T>& p) {
  const T root = std::sqrt(std::abs(p.scale));
  const int64_t d = p.x.d();
  Buffer<T> factor(p.x.rows() * d);
  p.x.for_read_blocks({0, p.x.rows()}, [&](Range range, const T* rows, int64_t stride) {
    for (int64_t i = range.begin; i < range.end; ++i) {
      const T weight = p.x.inverse()[i] * root;
      const T* row = rows + (i - range.begin) * stride;
      for (int64_t k = 0; k < d; ++k) factor[i * d + k] = row[k] * weight;
    }
  });
  return factor;
}

// The same matrix, of these features and the sign of the scale.
template <class T>
PairArguments<T> with_factor(const Problem<T>& p, PairArguments<T> a, const Buffer<T>& factor) {
  a.x = matrix_of(factor.data(), p.x.rows(), p.x.d());
  a.x_more = a.y_more = {};
  a.scale = p.scale < 0 ? -1 : 1;
  a.normalize = false;
  return a;
}

}  // namespace ck
