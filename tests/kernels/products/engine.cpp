// The engine of csrc/cpu without Python and torch, on one thread: a sweep with its backward and a
// whitening against sums in float64. For processors that have no tests of their own.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "backward.h"
#include "forward.h"
#include "whiten.h"

using namespace ck;

namespace {

constexpr int64_t kRows = 131, kKeys = 77, kDim = 19;
constexpr double kScale = 3;
std::mt19937 generator(3);

template <class T>
std::vector<T> randoms(int64_t size) {
  std::normal_distribution<double> normal;
  std::vector<T> values(size);
  for (T& value : values) value = static_cast<T>(normal(generator));
  return values;
}

template <class T>
void expect(const std::vector<T>& got, const std::vector<double>& exact, const char* what) {
  double largest = 0;
  for (double value : exact) largest = std::max(largest, std::abs(value));
  for (size_t i = 0; i < exact.size(); ++i)
    if (!(std::abs(got[i] - exact[i]) <= 64 * std::numeric_limits<T>::epsilon() * largest)) {
      std::printf("%s: %.9g is not %.9g\n", what, double(got[i]), exact[i]);
      std::exit(1);
    }
}

// Rows of unit length, and their lengths.
struct Units {
  template <class T>
  explicit Units(const std::vector<T>& x) : unit(x.begin(), x.end()), norm(x.size() / kDim) {
    for (size_t i = 0; i < norm.size(); ++i) {
      for (int64_t k = 0; k < kDim; ++k) norm[i] += unit[i * kDim + k] * unit[i * kDim + k];
      norm[i] = std::sqrt(norm[i]);
      for (int64_t k = 0; k < kDim; ++k) unit[i * kDim + k] /= norm[i];
    }
  }
  // the gradient of x from that of the units
  std::vector<double> gradient(const std::vector<double>& of_unit) const {
    std::vector<double> result(of_unit);
    for (size_t i = 0; i < norm.size(); ++i) {
      double along = 0;
      for (int64_t k = 0; k < kDim; ++k) along += of_unit[i * kDim + k] * unit[i * kDim + k];
      for (int64_t k = 0; k < kDim; ++k)
        result[i * kDim + k] = (of_unit[i * kDim + k] - along * unit[i * kDim + k]) / norm[i];
    }
    return result;
  }
  std::vector<double> unit, norm;
};

template <class T>
void check_sweep(bool keep) {
  const auto x = randoms<T>(kRows * kDim), y = randoms<T>(kKeys * kDim), up = randoms<T>(kRows);
  PairArguments<T> pairs;
  pairs.x = {x.data(), kRows, kDim, kDim, 1, kDtype<T>};
  pairs.y = {y.data(), kKeys, kDim, kDim, 1, kDtype<T>};
  pairs.scale = kScale;
  pairs.normalize = true;
  std::vector<T> lse(kRows), low(kRows), dx(x.size()), dy(y.size());
  const auto keeper = forward_sweep<T>(
      pairs, {.fold = Fold::kLse, .keep = keep, .rows = {.lse = lse.data(), .low = low.data()}});
  const void* kept = keeper == nullptr ? nullptr : keeper->values().data();
  BackwardInputs<T> inputs;
  inputs.rows = {.lse = lse.data(),
                 .low = kept == nullptr ? low.data() : static_cast<const T*>(kept),
                 .grad_lse = up.data()};
  const double dscale =
      backward_sweep<T>(pairs, inputs, {.x = dx.data(), .y = dy.data(), .scale = true});

  const Units a(x), b(y);
  std::vector<double> exact(kRows), da(x.size()), db(y.size()), of_scale(1);
  for (int64_t i = 0; i < kRows; ++i) {
    std::vector<double> dot(kKeys);
    double sum = 0;
    for (int64_t j = 0; j < kKeys; ++j) {
      for (int64_t k = 0; k < kDim; ++k) dot[j] += a.unit[i * kDim + k] * b.unit[j * kDim + k];
      sum += std::exp(kScale * dot[j]);
    }
    exact[i] = std::log(sum);
    for (int64_t j = 0; j < kKeys; ++j) {
      const double g = up[i] * std::exp(kScale * dot[j]) / sum;
      of_scale[0] += g * dot[j];
      for (int64_t k = 0; k < kDim; ++k) {
        da[i * kDim + k] += kScale * g * b.unit[j * kDim + k];
        db[j * kDim + k] += kScale * g * a.unit[i * kDim + k];
      }
    }
  }
  expect(lse, exact, "lse");
  expect(dx, a.gradient(da), "gradient of x");
  expect(dy, b.gradient(db), "gradient of y");
  expect(std::vector<T>{static_cast<T>(dscale)}, of_scale, "gradient of scale");
}

template <class T>
void check_whitening() {
  constexpr int64_t kGroups = 3;
  const auto x = randoms<T>(kGroups * kRows * kDim);
  std::vector<T> z(x.size()), inverse(kGroups * kDim * kDim);
  std::vector<int32_t> info(kGroups);
  whiten_cholesky<T>({kGroups, kRows, kDim, kDtype<T>}, 0.0, x.data(), z.data(), inverse.data(),
                     info.data());
  for (int64_t g = 0; g < kGroups; ++g) {
    std::vector<T> covariance;
    std::vector<double> identity;
    for (int64_t k = 0; k < kDim; ++k)
      for (int64_t l = 0; l < kDim; ++l) {
        double sum = 0;
        for (int64_t i = 0; i < kRows; ++i)
          sum += double(z[(g * kRows + i) * kDim + k]) * z[(g * kRows + i) * kDim + l];
        covariance.push_back(static_cast<T>(sum / (kRows - 1)));
        identity.push_back(k == l);
      }
    expect(covariance, identity, "covariance");
  }
}

template <class T>
void check() {
  for (bool keep : {false, true}) check_sweep<T>(keep);
  check_whitening<T>();
}

}  // namespace

int main() {
  check<float>();
  check<double>();
  std::puts("ok");
}
