// C = A B, or C += A B, for row-major tiles, on the calling thread. The work is a library's.
#pragma once

#include <cstdint>

namespace ck {

// a (m, k), b (k, n), c (m, n), each with its row stride
void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
          float* c, int64_t ldc, bool accumulate);
void gemm(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b,
          int64_t ldb, double* c, int64_t ldc, bool accumulate);

}  // namespace ck
