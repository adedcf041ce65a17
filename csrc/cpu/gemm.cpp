#include "gemm.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

namespace ck {

// oneDNN's batch-reduce kernel: no packing, no threads, and torch falls back to its BLAS where the
// processor has no such kernel
void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
          float* c, int64_t ldc, bool accumulate) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c);
}

void gemm(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b,
          int64_t ldb, double* c, int64_t ldc, bool accumulate) {
  const auto view = [](const double* p, int64_t rows, int64_t cols, int64_t ld) {
    return at::from_blob(const_cast<double*>(p), {rows, cols}, {ld, 1}, at::kDouble);
  };
  const at::Tensor left = view(a, m, k, lda), right = view(b, k, n, ldb);
  at::Tensor out = view(c, m, n, ldc);
  if (accumulate)
    out.addmm_(left, right);
  else
    at::mm_out(out, left, right);
}

bool has_bfloat16_products() {
#if defined(__x86_64__) && defined(CPUBLAS_BRGEMM_BF16BF16F32)
  // tile registers (AMX) would have to be released after use
  static const bool supported = __builtin_cpu_supports("avx512bf16") &&
                                !__builtin_cpu_supports("amx-bf16") &&
                                at::get_cpu_capability() == "AVX512";
  return supported && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

void gemm(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda, const uint16_t* b,
          int64_t ldb, float* c, int64_t ldc) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, false,
                              reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c);
}

}  // namespace ck
