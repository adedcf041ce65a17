"""csrc/cpu/fold.h alone: the folds as monoids, their derivatives, and that CUDA can include it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HEADERS = Path(__file__).resolve().parents[2] / "csrc" / "cpu"
COMPILER = shutil.which("c++")
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
  for (int j = begin; j < end; ++j) Fold::push(s, std::exp(z[j] - shift), z[j]);
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
    Fold::merge(merged, part(z, cut, 23, right), std::exp(right - left));
    near(std::log(merged.sum) + left, std::log(whole.sum), "lse of any split");
    near(Fold::mean(merged), Fold::mean(whole), "mean of any split");
  }

  State a = part(z, 0, 7, 0), b = part(z, 7, 12, 0), c = part(z, 12, 23, 0);
  State first = a, second = b;
  Fold::merge(first, b, 1.0);
  Fold::merge(first, c, 1.0);
  Fold::merge(second, c, 1.0);
  State other = a;
  Fold::merge(other, second, 1.0);
  near(first.sum, other.sum, "associative sum");
  near(first.weighted, other.weighted, "associative mean");
  State same = a;
  Fold::merge(same, Fold::init<double>(), 1.0);
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

DEVICE = r"""
#include "fold.h"

struct Math {
  static __device__ float exp(float x) { return __expf(x); }
  static __device__ float log1p(float x) { return log1pf(x); }
};

__global__ void fold(const float* z, int keys, float* out) {
  ck::SoftmaxState<float> s = ck::SoftmaxFold<true>::init<float>();
  for (int j = 0; j < keys; ++j) ck::SoftmaxFold<true>::push(s, Math::exp(z[j]), z[j]);
  ck::SoftmaxFold<true>::merge(s, s, 0.5f);
  out[0] = ck::SoftmaxFold<true>::mean(s) + ck::softplus<Math>(z[0]) * ck::sigmoid<Math>(z[1]) +
           ck::softmax_coefficient<true>(s.sum, z[0], z[1], 1.0f, 2.0f);
}
"""


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
def test_folds_are_monoids_with_right_derivatives(tmp_path):
    (tmp_path / "fold.cpp").write_text(HOST)
    command = [COMPILER, "-std=c++17", "-I", HEADERS, tmp_path / "fold.cpp", "-o"]
    subprocess.run([*command, tmp_path / "fold"], check=True)
    done = subprocess.run([tmp_path / "fold"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "ok\n", (done.returncode, done.stdout)


@pytest.mark.skipif(NVCC is None, reason="no CUDA compiler here")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_cuda_can_include_the_folds(tmp_path, architecture):
    source = tmp_path / "fold.cu"
    source.write_text(DEVICE)
    command = [NVCC, "-std=c++17", f"-arch={architecture}", "-I", HEADERS, "-cubin", source]
    done = subprocess.run([*command, "-o", tmp_path / "fold.cubin"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fold.cubin").stat().st_size > 0
