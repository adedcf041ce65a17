// Vectors of float or double through the compiler's own vector types, sized by the instruction set
// this file is compiled for, with the two functions the folds need. GCC and Clang.
#pragma once

#include <cstdint>
#include <cstring>

#include "fold.h"

namespace ck {
namespace CK_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  using Integer = int32_t;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  using Integer = int64_t;
};

template <class T>
using Vec = typename Simd<T>::V;
template <class T>
using IVec = typename Simd<T>::I;
template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <class V, class T>
CK_FOLD V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class T>
CK_FOLD void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

// u += weight y, vectors of d
template <class T>
CK_FOLD void add_scaled(T weight, const T* y, int64_t d, T* u) {
  constexpr int W = kLanes<T>;
  int64_t k = 0;
  for (; k + W <= d; k += W) store(u + k, load<Vec<T>>(u + k) + weight * load<Vec<T>>(y + k));
  for (; k < d; ++k) u[k] += weight * y[k];
}

template <class To, class From>
CK_FOLD To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &v, sizeof(To));
  return out;
}

// whether a lane of a comparison holds
template <class I>
CK_FOLD bool any_lane(I lanes) {
  uint64_t parts[sizeof(I) / sizeof(uint64_t)], some = 0;
  std::memcpy(parts, &lanes, sizeof(I));
  for (uint64_t part : parts) some |= part;
  return some != 0;
}

template <class T>
CK_FOLD T sum_lanes(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// exp for x <= 89 (double: 710): 2^(n - 1) times 2 e^r, |r| <= ln2 / 2, and e^r by a polynomial
// (float: minimax, relative error 3e-9; double: Taylor). Made of the bits of n, 2^(n - 1) is 0 for
// the least n, to which x is raised: what would be no normal number is 0, and so is exp(-inf). It
// is multiplied, not added to the exponent: NaN stays NaN, whatever its bits.
CK_FOLD Vec<float> exp_of(Vec<float> x) {
  using V = Vec<float>;
  using I = IVec<float>;
  x = -87.4f > x ? V{} - 87.4f : x;  // n = -126
  // 1.5 * 2^23 rounds, and holds n in its low bits; 126 is the bias of the exponent, less 1
  const V shifted = x * 1.44269504f + (12582912.f + 126.f);
  const V n = shifted - (12582912.f + 126.f);
#ifdef __FMA__
  const V r = x - n * 0.693147182f;  // an error below the rounding that x itself carries
#else
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
#endif
  V p = r * (2 * 1.38145984e-3f) + 2 * 8.3687169e-3f;
  p = p * r + 2 * 4.16683881e-2f;
  p = p * r + 2 * 1.66665206e-1f;
  p = p * r + 2 * 4.99999934e-1f;
  p = p * r + 2.f;
  p = p * r + 2.f;
  return p * bits<V>(bits<I>(shifted) << 23);
}

CK_FOLD Vec<double> exp_of(Vec<double> x) {
  using V = Vec<double>;
  using I = IVec<double>;
  x = -708.4 > x ? V{} - 708.4 : x;                                        // n = -1022
  const V shifted = x * 1.4426950408889634 + (6755399441055744. + 1022.);  // 1.5 * 2^52
  const V n = shifted - (6755399441055744. + 1022.);
  const V r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  V p = r * (2 * 1.6059043836821613e-10) + 2 * 2.0876756987868098e-9;
  p = p * r + 2 * 2.5052108385441720e-8;
  p = p * r + 2 * 2.7557319223985893e-7;
  p = p * r + 2 * 2.7557319223985888e-6;
  p = p * r + 2 * 2.4801587301587302e-5;
  p = p * r + 2 * 1.9841269841269841e-4;
  p = p * r + 2 * 1.3888888888888889e-3;
  p = p * r + 2 * 8.3333333333333333e-3;
  p = p * r + 2 * 4.1666666666666667e-2;
  p = p * r + 2 * 1.6666666666666667e-1;
  p = p * r + 1.;
  p = p * r + 2.;
  p = p * r + 2.;
  return p * bits<V>(bits<I>(shifted) << 52);
}

// log(1 + t) = 2 atanh(u), u = t / (2 + t), for t in [0, 1]: u is at most 1/3, so each term of the
// series gains a factor of 9.
template <class T, int Terms>
CK_FOLD Vec<T> log1p_series(Vec<T> t) {
  const Vec<T> u = t / (2 + t);
  const Vec<T> square = u * u;
  Vec<T> p{};
#pragma GCC unroll 20
  for (int k = Terms; k >= 0; --k) p = p * square + T(1) / (2 * k + 1);
  return 2 * u * p;
}

CK_FOLD Vec<float> log1p_of(Vec<float> t) { return log1p_series<float, 7>(t); }
CK_FOLD Vec<double> log1p_of(Vec<double> t) { return log1p_series<double, 17>(t); }

struct VectorMath {
  template <class V>
  static CK_FOLD V exp(V x) {
    return exp_of(x);
  }
  template <class V>
  static CK_FOLD V log1p(V x) {
    return log1p_of(x);
  }
};

}  // namespace CK_ISA
}  // namespace ck
