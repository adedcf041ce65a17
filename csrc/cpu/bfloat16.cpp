#include "bfloat16.h"

#include <cstring>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ck {

namespace bfloat16_avx512 {
const BFloat16Kernels& table();
}
namespace bfloat16_amx {
const BFloat16Kernels& table();
}

namespace {

#ifdef CK_HAVE_BFLOAT16_AMX
// The system grants the tile registers to a process that asks.
bool may_use_tiles() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const BFloat16Kernels* choose() {
  if (std::strcmp(tile_kernels<float>().isa, "avx512") != 0) return nullptr;
#ifdef CK_HAVE_BFLOAT16_AMX
  if (may_use_tiles()) return &bfloat16_amx::table();
#endif
#ifdef CK_HAVE_BFLOAT16_AVX512
  // Intel's take as long as four products of floats
  if (__builtin_cpu_is("amd") && __builtin_cpu_supports("avx512bf16"))
    return &bfloat16_avx512::table();
#endif
  return nullptr;
}

}  // namespace

const BFloat16Kernels* bfloat16_kernels() {
  static const BFloat16Kernels* const chosen = choose();
  return chosen;
}

}  // namespace ck
