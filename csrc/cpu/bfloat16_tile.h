// What one thread multiplies where features are bfloat16 as they lie: the operands of a tile's
// three products, and the products.
#pragma once

#include <vector>

#include "bfloat16.h"
#include "buffer.h"
#include "matrix.h"

namespace ck {

// Rows of bfloat16 features as they lie.
struct BitRows {
  const uint16_t* data = nullptr;
  int64_t stride = 0;
};

// Of each pair of a panel's row the number that a block of features has, 0 in the other's place.
inline void keep_half(uint32_t* pairs, bool first) {
  for (int i = 0; i < kPanel; ++i) pairs[i] &= first ? 0x0000ffffu : 0xffff0000u;
}

// Rows of the features of one side, two by two, in panels of columns, those of each block of
// features after those of the one before: made when first asked for.
class RowPairs {
 public:
  void forget() { made_ = false; }
  // of blocks[k]; read() gives the rows as they lie; room: the most rows that there may be
  template <class Read>
  PanelMatrix<const uint32_t> of(const std::vector<Range>& blocks, int64_t k, int64_t rows,
                                 int64_t room, Read read) {
    const int64_t pairs = divide_up(rows, 2);
    if (!made_) {
      if (memory_.empty())
        memory_ = Buffer<uint32_t>(divide_up(room, 2) * panels(blocks, blocks.size()) * kPanel);
      const BitRows from = read();
      uint32_t* out = memory_.data();
      for (const Range& block : blocks)
        for_blocks(block, kPanel, [&](Range part) {
          bfloat16_kernels()->pair_rows(from.data + part.begin, from.stride, rows, part.size(), out,
                                        kPanel);
          out += pairs * kPanel;
        });
      made_ = true;
    }
    return {memory_.data() + panels(blocks, k) * pairs * kPanel, kPanel, pairs * kPanel};
  }

 private:
  // how many the first `count` blocks have
  static int64_t panels(const std::vector<Range>& blocks, int64_t count) {
    int64_t sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += divide_up(blocks[k].size(), kPanel);
    return sum;
  }
  Buffer<uint32_t> memory_;
  bool made_ = false;
};

// The entries of a tile as rounded numbers, two by two along what they are summed over.
class RoundedTile {
 public:
  // of each row its keys, for sums over them; room: the most entries of a tile
  LeftMatrix<uint32_t> of_rows(const Tile<float>& tile, int64_t room) {
    constexpr int64_t kUnit = 32;
    const int64_t stride = divide_up(tile.keys, kUnit) * kUnit;
    bfloat16_kernels()->round_transposed(tile.data, tile.ld, tile.keys, tile.rows, start(room),
                                         stride);
    return left(stride);
  }
  // of each key its rows, of which `rows` are no padding
  LeftMatrix<uint32_t> of_keys(const Tile<float>& tile, int64_t rows, int64_t room) {
    uint16_t* out = start(room);
    bfloat16_kernels()->round(tile.data, tile.ld, tile.keys, tile.rows, out, tile.rows);
    if (rows % 2 != 0)  // what the padding holds may not be finite
      for (int j = 0; j < tile.keys; ++j) out[j * tile.rows + rows] = 0;
    return left(tile.rows);
  }

 private:
  uint16_t* start(int64_t room) {
    if (memory_.empty()) memory_ = Buffer<uint16_t>(room);
    return memory_.data();
  }
  LeftMatrix<uint32_t> left(int64_t stride) const {
    return {reinterpret_cast<const uint32_t*>(memory_.data()), stride / 2, 1};
  }
  Buffer<uint16_t> memory_;
};

}  // namespace ck
