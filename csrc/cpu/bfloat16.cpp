#include "bfloat16.h"

#include <cstdlib>
#include <cstring>

#ifdef CK_HAVE_BFLOAT16_AMX
#include <cpuid.h>
#endif
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
// Clang does not know them by name.
bool has_tiles() {
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24, kBoth = kBFloat16 | kTiles;
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kBoth) == kBoth;
}

// The system grants the tile registers to a process that asks. Numbers are rounded by AVX-512 BF16.
bool may_use_tiles() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return has_tiles() && __builtin_cpu_supports("avx512bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

enum class Kind { kNone, kAvx512, kAmx };

Kind fastest() {
  if (std::strcmp(tile_kernels<float>().isa, "avx512") != 0) return Kind::kNone;
#ifdef CK_HAVE_BFLOAT16_AMX
  if (may_use_tiles()) return Kind::kAmx;
#endif
#ifdef CK_HAVE_BFLOAT16_AVX512
  // Intel's take as long as four products of floats
  if (__builtin_cpu_is("amd") && __builtin_cpu_supports("avx512bf16")) return Kind::kAvx512;
#endif
  return Kind::kNone;
}

Kind choose() {
  const char* const wanted = std::getenv("CK_BFLOAT16");
  if (wanted == nullptr) return fastest();
  const auto is = [=](const char* name) { return std::strcmp(wanted, name) == 0; };
  return is("avx512") ? Kind::kAvx512 : is("amx") ? Kind::kAmx : Kind::kNone;
}

const BFloat16Kernels* pick() {
  switch (choose()) {
#ifdef CK_HAVE_BFLOAT16_AVX512
    case Kind::kAvx512:
      return &bfloat16_avx512::table();
#endif
#ifdef CK_HAVE_BFLOAT16_AMX
    case Kind::kAmx:
      return may_use_tiles() ? &bfloat16_amx::table() : nullptr;
#endif
    default:
      return nullptr;
  }
}

}  // namespace

const BFloat16Kernels* bfloat16_kernels() {
  static const BFloat16Kernels* const picked = pick();
  return picked;
}

}  // namespace ck
