// Operands of bfloat16 products, for the instruction set they are compiled for.
#pragma once

#include "bfloat16.h"
#include "simd.h"
#include "transpose.h"

namespace ck {
namespace CK_ISA {
namespace {

constexpr int kWidth = kLanes<float>;
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));

CK_FOLD Halves rounded(Vec<float> x) {
  const Words word = bits<Words>(x);
  const Words nearest = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? nearest : (word >> 16) | 0x40, Halves);
}

inline void pair_rows(const uint16_t* x, int64_t stride, int64_t rows, int64_t n, uint32_t* out,
                      int64_t ld_out) {
  for (int64_t p = 0; p < rows; p += 2, x += 2 * stride, out += ld_out) {
    const bool both = p + 1 < rows;
    int64_t j = 0;
    for (; j + kWidth <= n; j += kWidth) {
      Words pair = __builtin_convertvector(load<Halves>(x + j), Words);
      if (both) pair |= __builtin_convertvector(load<Halves>(x + stride + j), Words) << 16;
      store(out + j, pair);
    }
    for (; j < n; ++j) out[j] = x[j] | (both ? static_cast<uint32_t>(x[stride + j]) << 16 : 0);
  }
}

inline void round(const float* tile, int64_t ld, int keys, int rows, uint16_t* out,
                  int64_t ld_out) {
  for (int j = 0; j < keys; ++j)
    for (int i = 0; i < rows; i += kWidth)
      store(out + j * ld_out + i, rounded(load<Vec<float>>(tile + j * ld + i)));
}

inline void round_transposed(const float* tile, int64_t ld, int keys, int rows, uint16_t* out,
                             int64_t ld_out) {
  for (int i = 0; i < rows; i += kWidth) {
    for (int j = 0; j < keys; j += kWidth) {
      Vec<float> block[kWidth];
#pragma GCC unroll 16
      for (int k = 0; k < kWidth; ++k)
        block[k] = j + k < keys ? load<Vec<float>>(tile + (j + k) * ld + i) : Vec<float>{};
      transpose_steps<1, float>(block);
#pragma GCC unroll 16
      for (int k = 0; k < kWidth; ++k) store(out + (i + k) * ld_out + j, rounded(block[k]));
    }
  }
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
