// Products of bfloat16 on the calling thread. The work is a library's.
#pragma once

#include <cstdint>

namespace ck {

// Whether products of bfloat16 are faster here than those of the same numbers widened to float.
bool has_bfloat16_products();
// c (m, n) = a (m, k) b (k, n) in float for bfloat16 bits: k even, b with each two consecutive rows
// interleaved, ldb counted in elements of one row. Exact products, so equal to the float ones.
void gemm(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda, const uint16_t* b,
          int64_t ldb, float* c, int64_t ldc);

}  // namespace ck
