// Tile registers as a plain struct, where there are none.
#pragma once

#include <cstdint>
#include <cstring>

namespace ck {

inline int tiles_in_use = 0;

class TileRegisters {
 public:
  TileRegisters() {
    ++tiles_in_use;
    std::memset(tiles_, 0xff, sizeof(tiles_));
  }
  ~TileRegisters() { --tiles_in_use; }
  template <int Tile>
  void zero() {
    std::memset(tiles_[Tile], 0, sizeof(tiles_[Tile]));
  }
  template <int Tile>
  void load(const void* rows, int64_t stride) {
    for (int r = 0; r < 16; ++r)
      std::memcpy(tiles_[Tile][r], static_cast<const char*>(rows) + r * stride, 64);
  }
  template <int Tile>
  void store(void* rows, int64_t stride) {
    for (int r = 0; r < 16; ++r)
      std::memcpy(static_cast<char*>(rows) + r * stride, tiles_[Tile][r], 64);
  }
  template <int Sums, int A, int B>
  void add_products() {
    for (int i = 0; i < 16; ++i)
      for (int p = 0; p < 16; ++p)
        for (int j = 0; j < 16; ++j) {
          float sum = number(tiles_[Sums][i][j]);
          sum += number(tiles_[A][i][p] << 16) * number(tiles_[B][p][j] << 16);
          sum += number(tiles_[A][i][p] & 0xffff0000u) * number(tiles_[B][p][j] & 0xffff0000u);
          std::memcpy(&tiles_[Sums][i][j], &sum, sizeof(sum));
        }
  }

 private:
  static float number(uint32_t word) {
    float value;
    std::memcpy(&value, &word, sizeof(value));
    return value;
  }
  uint32_t tiles_[8][16][16];
};

}  // namespace ck
