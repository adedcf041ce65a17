#include "gemm.h"

namespace ck {

bool has_bfloat16_products() { return false; }

void gemm(int64_t, int64_t, int64_t, const uint16_t*, int64_t, const uint16_t*, int64_t, float*,
          int64_t) {}

}  // namespace ck
