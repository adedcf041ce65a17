// Products of bfloat16 numbers with sums in float, where the processor has them. Their terms are
// pairs: what is one number in a product of floats is two here, next to each other in the sum, the
// first in the lower half. Rows of bfloat16 numbers are rows of pairs as they lie.
#pragma once

#include "tile.h"

namespace ck {

struct BFloat16Kernels {
  const char* isa;
  // whether products take less time than it does to bring operands from beyond a core's caches
  bool outrun_memory;
  // c (m, n) = a (m, k) b (k, n), or += with `add`, of k pairs. An element's bits depend on k
  // alone, as those of TileKernels::multiply; a.col is 1.
  void (*multiply)(int64_t m, int64_t n, int64_t k, LeftMatrix<uint32_t> a,
                   PanelMatrix<const uint32_t> b, PanelMatrix<float> c, bool add);
  // the rows of x (rows, n) two by two, for b: ((rows + 1) / 2, n), ended by zeros
  void (*pair_rows)(const uint16_t* x, int64_t stride, int64_t rows, int64_t n, uint32_t* out,
                    int64_t ld_out);
  // a tile rounded to nearest even, NaN stays NaN: out[j * ld_out + i], of whole pairs of rows
  void (*round)(const float* tile, int64_t ld, int keys, int rows, uint16_t* out, int64_t ld_out);
  // the same transposed: out[i * ld_out + j], zeros where j is beyond the keys, up to the next
  // multiple of 32, which ld_out is not below
  void (*round_transposed)(const float* tile, int64_t ld, int keys, int rows, uint16_t* out,
                           int64_t ld_out);
};

// null: products of the same numbers widened to float are as fast, or there are no others. The
// environment's CK_BFLOAT16, looked at once, names others: avx512, amx or none. Nothing else asks
// the processor whether it has them.
const BFloat16Kernels* bfloat16_kernels();

}  // namespace ck
