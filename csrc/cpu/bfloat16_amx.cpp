// Products of bfloat16 numbers by AMX, four tiles of 16 x 16 sums at a time.
#ifndef CK_TILES
#define CK_TILES "amx.h"
#endif
#include CK_TILES

#include "bfloat16_pack.h"

namespace ck {
namespace CK_ISA {
namespace {

constexpr int kTile = 16;         // rows, and words of a row
constexpr int kSide = 2 * kTile;  // of the four tiles
static_assert(kPanel % kSide == 0);

// Where a tile of `rows` x `words` words lies, or its copy in `whole`, filled up with zeros.
struct TileSource {
  alignas(64) uint32_t whole[kTile * kTile];
  const void* data;
  int64_t stride;

  TileSource(const uint32_t* from, int64_t row, int64_t rows, int64_t words)
      : data(from), stride(row * 4) {
    if (rows >= kTile && words >= kTile) return;
    data = whole;
    stride = kTile * 4;
    for (int r = 0; r < kTile; ++r)
      for (int w = 0; w < kTile; ++w)
        whole[r * kTile + w] = r < rows && w < words ? from[r * row + w] : 0;
  }
};

// `sums` of at most kSide x kSide
CK_FOLD void put_sums(const float* sums, int64_t m, int64_t n, float* c, int64_t c_row, bool add) {
  for (int64_t i = 0; i < m && i < kSide; ++i, sums += kSide, c += c_row) {
    if (n >= kSide) {
      for (int j = 0; j < kSide; j += kWidth) {
        const auto part = load<Vec<float>>(sums + j);
        store(c + j, add ? load<Vec<float>>(c + j) + part : part);
      }
    } else {
      for (int64_t j = 0; j < n; ++j) c[j] = add ? c[j] + sums[j] : sums[j];
    }
  }
}

CK_FOLD void store_sums(TileRegisters& tiles, float* c, int64_t row) {
  tiles.store<0>(c, row * 4);
  tiles.store<1>(c + kTile, row * 4);
  tiles.store<2>(c + kTile * row, row * 4);
  tiles.store<3>(c + kTile * row + kTile, row * 4);
}

void multiply(int64_t m, int64_t n, int64_t k, LeftMatrix<uint32_t> a,
              PanelMatrix<const uint32_t> b, PanelMatrix<float> c, bool add) {
  TileRegisters tiles;
  alignas(64) float sums[kSide * kSide];
  for (int64_t i = 0; i < m; i += kSide) {
    for (int64_t j = 0; j < n; j += kSide) {
      const int64_t panel = j / kPanel, column = j % kPanel;
      float* const out = c.data + i * c.row + panel * c.panel + column;
      tiles.zero<0>(), tiles.zero<1>(), tiles.zero<2>(), tiles.zero<3>();
      for (int64_t p = 0; p < k; p += kTile) {
        const uint32_t* left = a.data + i * a.row + p;
        const uint32_t* right = b.data + panel * b.panel + p * b.row + column;
        const TileSource above(left, a.row, m - i, k - p);
        const TileSource below(left + kTile * a.row, a.row, m - i - kTile, k - p);
        const TileSource first(right, b.row, k - p, n - j);
        const TileSource second(right + kTile, b.row, k - p, n - j - kTile);
        tiles.load<4>(above.data, above.stride);
        tiles.load<5>(below.data, below.stride);
        tiles.load<6>(first.data, first.stride);
        tiles.load<7>(second.data, second.stride);
        tiles.add_products<0, 4, 6>();
        tiles.add_products<1, 4, 7>();
        tiles.add_products<2, 5, 6>();
        tiles.add_products<3, 5, 7>();
      }
      if (!add && m - i >= kSide && n - j >= kSide) {
        store_sums(tiles, out, c.row);
      } else {
        store_sums(tiles, sums, kSide);
        put_sums(sums, m - i, n - j, out, c.row, add);
      }
    }
  }
}

}  // namespace

const BFloat16Kernels& table() {
  static const BFloat16Kernels kernels = {.isa = "amx",
                                          .outrun_memory = true,
                                          .multiply = multiply,
                                          .pair_rows = pair_rows,
                                          .round = round,
                                          .round_transposed = round_transposed};
  return kernels;
}

}  // namespace CK_ISA
}  // namespace ck
