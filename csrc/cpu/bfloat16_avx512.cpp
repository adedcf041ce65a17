// Products of bfloat16 numbers by AVX-512 BF16.
#include <immintrin.h>

#include "bfloat16_pack.h"
#include "product.h"

namespace ck {
namespace CK_ISA {
namespace {

struct Pairs {
  using Term = uint32_t;
  using Sum = float;
  static CK_FOLD Vec<float> add(Vec<float> sums, Term a, Vec<float> b) {
    const auto pair = bits<__m512bh>(Words{} + a);
    return bits<Vec<float>>(_mm512_dpbf16_ps(bits<__m512>(sums), pair, bits<__m512bh>(b)));
  }
};

}  // namespace

const BFloat16Kernels& table() {
  static const BFloat16Kernels kernels = {.isa = "avx512bf16",
                                          .outrun_memory = false,
                                          .multiply = multiply<Pairs>,
                                          .pair_rows = pair_rows,
                                          .round = round,
                                          .round_transposed = round_transposed};
  return kernels;
}

}  // namespace CK_ISA
}  // namespace ck
