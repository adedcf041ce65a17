// Picks the table of tile kernels for this machine.
#include <string>

#include "tile.h"

namespace ck {

namespace baseline {
template <class T>
const TileKernels<T>& kernels();
}
namespace avx2 {
template <class T>
const TileKernels<T>& kernels();
}
namespace avx512 {
template <class T>
const TileKernels<T>& kernels();
}

namespace {

std::string& capability() {
  static std::string name;
  return name;
}

template <class T>
const TileKernels<T>& pick() {
#ifdef CK_HAVE_AVX512
  if (capability() == "AVX512") return avx512::kernels<T>();
#endif
#ifdef CK_HAVE_AVX2
  if (capability() == "AVX2" || capability() == "AVX512") return avx2::kernels<T>();
#endif
  return baseline::kernels<T>();
}

}  // namespace

void set_capability(const char* name) { capability() = name; }

template <class T>
const TileKernels<T>& tile_kernels() {
  static const TileKernels<T>& picked = pick<T>();
  return picked;
}

template const TileKernels<float>& tile_kernels<float>();
template const TileKernels<double>& tile_kernels<double>();

}  // namespace ck
