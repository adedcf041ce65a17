"""csrc/cpu/fold.h alone: the folds as monoids, their derivatives, and that CUDA can include it; and
the exp, log1p, softplus and sigmoid of csrc/cpu/simd.h for each instruction set."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests import compiled

NVCC = shutil.which("nvcc")

HOST = r"""
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>
#include "fold.h"

using namespace ck;
using Fold = SoftmaxFold<true>;
using State = SoftmaxState<double>;

struct Math {
  static double exp(double x) { return std::exp(x); }
  static double log1p(double x) { return std::log1p(x); }
};

static void near(double a, double b, const char* what) {
  if (!(std::abs(a - b) <= 1e-12 * (1 + std::abs(b)))) {
    std::printf("%s: %.17g is not %.17g\n", what, a, b);
    std::exit(1);
  }
}

// state of z[begin, end) relative to its own shift
static State part(const std::vector<double>& z, int begin, int end, double shift) {
  State s = Fold::init<double>();
  for (int j = begin; j < end; ++j) Fold::push(s, std::exp(z[j] - shift), z[j] - shift);
  return s;
}

int main() {
  std::mt19937 random(1);
  std::normal_distribution<double> normal(0, 5);
  std::vector<double> z(23);
  for (double& value : z) value = normal(random);
  const State whole = part(z, 0, 23, 0.0);

  for (int cut = 0; cut <= 23; ++cut) {
    const double left = 3, right = -2;  // shifts of the parts
    State merged = part(z, 0, cut, left);
    Fold::merge(merged, part(z, cut, 23, right), right - left, std::exp(right - left));
    near(std::log(merged.sum) + left, std::log(whole.sum), "lse of any split");
    near(Fold::mean(merged) + left, Fold::mean(whole), "mean of any split");
  }

  State a = part(z, 0, 7, 0), b = part(z, 7, 12, 0), c = part(z, 12, 23, 0);
  State first = a, second = b;
  Fold::merge(first, b, 0.0, 1.0);
  Fold::merge(first, c, 0.0, 1.0);
  Fold::merge(second, c, 0.0, 1.0);
  State other = a;
  Fold::merge(other, second, 0.0, 1.0);
  near(first.sum, other.sum, "associative sum");
  near(first.weighted, other.weighted, "associative mean");
  State same = a;
  Fold::merge(same, Fold::init<double>(), -HUGE_VAL, 0.0);
  if (same.sum != a.sum || same.weighted != a.weighted) return 2;

  // coefficients against central differences of u lse + v mean
  const double u = 0.7, v = -1.3, h = 1e-6, mean = Fold::mean(whole);
  for (int j = 0; j < 23; ++j) {
    double value[2];
    for (int side = 0; side < 2; ++side) {
      std::vector<double> moved = z;
      moved[j] += side == 0 ? h : -h;
      const State s = part(moved, 0, 23, 0.0);
      value[side] = u * std::log(s.sum) + v * Fold::mean(s);
    }
    const double p = std::exp(z[j]) / whole.sum;
    const double coefficient = softmax_coefficient<true>(p, z[j], mean, u, v);
    if (std::abs((value[0] - value[1]) / (2 * h) - coefficient) > 1e-7) return 3;
  }
  near(softmax_coefficient<false>(0.25, 9.0, 9.0, 2.0, 5.0), 0.5, "without mean");

  for (double x : {-800.0, -40.0, -1.0, 0.0, 1e-9, 2.0, 40.0, 800.0}) {
    const double e = std::exp(-std::abs(x));
    near(softplus<Math>(x), (x > 0 ? x : 0) + std::log1p(e), "softplus");
    near(sigmoid<Math>(x), x > 0 ? 1 / (1 + e) : e / (1 + e), "sigmoid");
  }
  std::puts("ok");
}
"""

VECTORS = r"""
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include "simd.h"

using namespace ck;
using namespace ck::CK_ISA;

template <class T>
static T first(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int i = 1; i < kLanes<T>; ++i)
    if (bits<typename Simd<T>::Integer>(lanes[i]) != bits<typename Simd<T>::Integer>(lanes[0]))
      std::exit(1);
  return lanes[0];
}

static void expect(bool right, const char* what, double x) {
  if (!right) std::printf("%s of %.17g\n", what, x), std::exit(1);
}

template <class T>
static void near(T got, double exact, const char* what, double x) {
  expect(std::abs(got - exact) <= 4 * std::numeric_limits<T>::epsilon() * std::abs(exact), what, x);
}

template <class T, class Bits = std::make_unsigned_t<typename Simd<T>::Integer>>
static void check(Bits infinity, int mantissa, T lowest, T highest) {
  const auto exp = [](T x) { return first<T>(exp_of(Vec<T>{} + x)); };
  const auto log1p = [](T x) { return first<T>(log1p_of(Vec<T>{} + x)); };
  const auto plus = [](T x) { return first<T>(softplus<VectorMath>(Vec<T>{} + x)); };
  const auto slope = [](T x) { return first<T>(sigmoid<VectorMath>(Vec<T>{} + x)); };
  // by the bits, since arithmetic makes a signalling NaN a quiet one
  for (Bits sign : {Bits{0}, Bits{1} << (8 * sizeof(T) - 1)})
    for (int bit = 0; bit < mantissa; ++bit)
      for (Bits payload : {Bits{1} << bit, (Bits{2} << bit) - 1, (Bits{1} << mantissa) - 1}) {
        const typename Simd<T>::Integer pattern = sign | infinity | payload;
        const Vec<T> nan = bits<Vec<T>>(IVec<T>{} + pattern);
        const Vec<T> made[] = {exp_of(nan), log1p_of(nan), softplus<VectorMath>(nan),
                               sigmoid<VectorMath>(nan)};
        for (const Vec<T>& v : made) {
          T lanes[kLanes<T>];
          store(lanes, v);
          for (T lane : lanes) expect(lane != lane, "function of NaN", bit);
        }
      }
  const T inf = std::numeric_limits<T>::infinity();
  expect(exp(-inf) == 0 && exp(2 * lowest) == 0, "exp", -inf);
  expect(plus(-inf) == 0 && plus(2 * lowest) == 0, "softplus", -inf);
  expect(plus(inf) == inf && slope(inf) == 1 && slope(-inf) == 0, "softplus or sigmoid", inf);
  expect(exp(0) == 1 && log1p(0) == 0, "exp or log1p", 0);
  volatile T start = lowest;  // else the compiler computes it, which rounds otherwise than FMA
  for (T x = start; x < highest; x += T(0.37)) {
    near(exp(x), std::exp(double(x)), "exp", x);
    near(plus(x), (x > 0 ? x : 0) + std::log1p(std::exp(-std::abs(double(x)))), "softplus", x);
    near(slope(x), 1 / (1 + std::exp(-double(x))), "sigmoid", x);
  }
}

int main() {
  check<float>(0x7f800000u, 23, -86.9f, 88.7f);
  check<double>(0x7ff0000000000000u, 52, -708.0, 709.7);
  std::puts("ok");
}
"""

DEVICE = r"""
#include "fold.h"

struct Math {
  static __device__ float exp(float x) { return __expf(x); }
  static __device__ float log1p(float x) { return log1pf(x); }
};

__global__ void fold(const float* z, int keys, float* out) {
  ck::SoftmaxState<float> s = ck::SoftmaxFold<true>::init<float>();
  for (int j = 0; j < keys; ++j) ck::SoftmaxFold<true>::push(s, Math::exp(z[j]), z[j]);
  ck::SoftmaxFold<true>::merge(s, s, -0.5f, 0.5f);
  out[0] = ck::SoftmaxFold<true>::mean(s) + ck::softplus<Math>(z[0]) * ck::sigmoid<Math>(z[1]) +
           ck::softmax_coefficient<true>(s.sum, z[0], z[1], 1.0f, 2.0f);
}
"""


@compiled.needs_compiler
def test_folds_are_monoids_with_right_derivatives(tmp_path):
    (tmp_path / "fold.cpp").write_text(HOST)
    compiled.build(tmp_path / "fold.cpp", tmp_path / "fold", "-std=c++17")
    compiled.run(tmp_path / "fold")


@compiled.needs_compiler
@pytest.mark.parametrize("isa", compiled.ISAS)
def test_functions_of_vectors(tmp_path, isa):
    """Precision over the whole range, exact values at both infinities, and NaN of any bits."""
    flags = compiled.isa_flags(isa)
    (tmp_path / "vectors.cpp").write_text(VECTORS)
    compiled.build(tmp_path / "vectors.cpp", tmp_path / "vectors", *flags)
    compiled.run(tmp_path / "vectors")


@pytest.mark.skipif(NVCC is None, reason="no CUDA compiler here")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_cuda_can_include_the_folds(tmp_path, architecture):
    source = tmp_path / "fold.cu"
    source.write_text(DEVICE)
    command = [
        NVCC,
        "-std=c++17",
        f"-arch={architecture}",
        "-I",
        compiled.HEADERS,
        "-cubin",
        source,
    ]
    done = subprocess.run([*command, "-o", tmp_path / "fold.cubin"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fold.cubin").stat().st_size > 0
