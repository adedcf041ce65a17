// Operands of bfloat16 products, for the instruction set they are compiled for.
#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <utility>

#include "bfloat16.h"
#include "simd.h"
#include "transpose.h"

namespace ck {
namespace CK_ISA {
namespace {

constexpr int kWidth = kLanes<float>;
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(4 * kWidth)));

#ifdef __AVX512BF16__
// a, then b; numbers too small to be normal become 0, as the products take them
CK_FOLD Halves rounded(Vec<float> a, Vec<float> b) {
  return bits<Halves>(_mm512_cvtne2ps_pbh(bits<__m512>(b), bits<__m512>(a)));
}
#else
CK_FOLD Halves rounded(Vec<float> a, Vec<float> b) {
  uint16_t out[2 * kWidth];
  for (int l = 0; l < 2 * kWidth; ++l) {
    const float x = l < kWidth ? a[l] : b[l - kWidth];
    const uint32_t word = bits<uint32_t>(x);
    const uint32_t nearest = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    out[l] = static_cast<uint16_t>(x == x ? nearest : (word >> 16) | 0x40);
  }
  return load<Halves>(out);
}
#endif

// Pairs of one of kWidth numbers, from `First` on in a and then b, and one of those from `Second`.
template <int First, int Second, std::size_t... L>
CK_FOLD Words pairs(Halves a, Halves b, std::index_sequence<L...>) {
  return bits<Words>(__builtin_shufflevector(a, b, (L / 2 + (L % 2 == 0 ? First : Second))...));
}

using Lanes = std::make_index_sequence<2 * kWidth>;

inline void pair_rows(const uint16_t* x, int64_t stride, int64_t rows, int64_t n, uint32_t* out,
                      int64_t ld_out) {
  for (int64_t p = 0; p < rows; p += 2, x += 2 * stride, out += ld_out) {
    const bool both = p + 1 < rows;
    int64_t j = 0;
    for (; j + 2 * kWidth <= n; j += 2 * kWidth) {
      const Halves first = load<Halves>(x + j);
      const Halves second = both ? load<Halves>(x + stride + j) : Halves{};
      store(out + j, pairs<0, 2 * kWidth>(first, second, Lanes{}));
      store(out + j + kWidth, pairs<kWidth, 3 * kWidth>(first, second, Lanes{}));
    }
    for (; j < n; ++j) out[j] = x[j] | (both ? static_cast<uint32_t>(x[stride + j]) << 16 : 0);
  }
}

inline void round(const float* tile, int64_t ld, int keys, int rows, uint16_t* out,
                  int64_t ld_out) {
  for (int j = 0; j < keys; ++j)
    for (int i = 0; i < rows; i += 2 * kWidth) {
      const float* at = tile + j * ld + i;
      store(out + j * ld_out + i, rounded(load<Vec<float>>(at), load<Vec<float>>(at + kWidth)));
    }
}

// Pairs of keys come first: they are half as many words to transpose.
inline void round_transposed(const float* tile, int64_t ld, int keys, int rows, uint16_t* out,
                             int64_t ld_out) {
  for (int i = 0; i < rows; i += kWidth) {
    const auto key = [=](int j) {
      return j < keys ? load<Vec<float>>(tile + j * ld + i) : Vec<float>{};
    };
    for (int j = 0; j < (keys + 31) / 32 * 32; j += 2 * kWidth) {
      Vec<float> block[kWidth];
#pragma GCC unroll 16
      for (int k = 0; k < kWidth; ++k) {
        const Halves both = rounded(key(j + 2 * k), key(j + 2 * k + 1));
        block[k] = bits<Vec<float>>(pairs<0, kWidth>(both, both, Lanes{}));
      }
      transpose_steps<1, float>(block);
#pragma GCC unroll 16
      for (int k = 0; k < kWidth; ++k) store(out + (i + k) * ld_out + j, block[k]);
    }
  }
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
