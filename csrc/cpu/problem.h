// One similarity matrix: its operands, masks and sizes, and what a thread needs to make tiles of
// it.
#pragma once

#include <limits>
#include <optional>
#include <vector>

#include "bfloat16_tile.h"
#include "buffer.h"
#include "feature_rows.h"
#include "fold.h"
#include "matrix.h"
#include "tile.h"
#include "workspace.h"

namespace ck {

// Whole numbers of 64 bits, or narrow ones of 32.
struct IdVector {
  const void* data = nullptr;  // null: none
  bool narrow = false;
  int64_t operator[](int64_t i) const {
    return narrow ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
  }
};

struct IdPair {
  IdVector rows, keys;
};

// The arguments that every operator over pairs begins with. Rows are those of x; the keys, rows of
// y, are the columns.
template <class T>
struct PairArguments {
  Matrix x, x_more;      // more: rows (K, D) that follow those of x
  Matrix y, y_more;      // y is not given: y = x
  int64_t own_keys = 0;  // each row has so many of the rows of y for itself; 0: all share them
  T scale = 1;
  const T* bias = nullptr;  // of each key; null: none
  IdPair exclude, keep;     // of a matrix with itself those of the rows, twice
  bool normalize = false;
};

// Pairs of ids, as wide as a lane.
template <class T>
class Ids {
 public:
  using Id = typename LaneId<T>::type;
  Ids(const IdPair& ids, int64_t rows, int64_t keys);

  bool given() const { return !ids_.empty(); }
  const Id* rows() const { return ids_.data(); }
  const Id* keys() const { return ids_.data() + rows_; }
  // whether some id may be both among the rows and among the keys of a tile
  bool meet(Range rows, Range keys) const;

 private:
  Buffer<Id> ids_;
  int64_t rows_;
};

template <class T>
struct Problem {
  // ends: where blocks of features end whose products are made one after the other, ascending to d
  explicit Problem(const PairArguments<T>& arguments, const std::vector<int64_t>& ends = {});
  Problem(const Problem&) = delete;

  bool bits;  // products are those of bfloat16: of features as they lie, and rounded tiles
  bool fast;  // and outrun memory
  Features<T> x;
  std::optional<Features<T>> other;
  const Features<T>& y;
  bool symmetric;             // y is x
  bool paired;                // row i has the keys y[i * keys ...]
  int64_t keys;               // of a row
  std::vector<Range> blocks;  // of features; one, of all, where products are made at once
  bool normalize;
  T scale;
  Buffer<T> zeros, ones;  // (M,)
  const T* bias;          // (M,)
  double largest_bias = 0;
  Ids<T> exclude, keep;
  const TileKernels<T>& kernels = tile_kernels<T>();
  int64_t block_rows, block_keys;
  KeptLogits kept;
  bool keeps = false;  // tiles go there; else they come from there

  // what the products of block k are sums over: features, or pairs of them, of which that at an odd
  // end is one of both blocks
  Range terms(int64_t k) const {
    const Range block = blocks[k];
    return bits ? Range{block.begin / 2, divide_up(block.end, 2)} : block;
  }
  // the number of those of the first `count` blocks
  int64_t terms_before(int64_t count) const {
    int64_t sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += terms(k).size();
    return sum;
  }
  int64_t all_terms() const { return terms_before(blocks.size()); }
  // products of so few are made again in no more time than it takes to keep what they give
  int64_t few_features() const { return fast ? 256 : 0; }
  // the key that belongs to a row: of joined rows that of the other half, which is mutual
  int64_t partner(int64_t row) const { return symmetric ? (row + keys / 2) % keys : row; }
};

// One thread's tile and its buffers; the rows of a block stay while tiles of keys pass.
template <class T>
class Worker {
 public:
  using Id = typename LaneId<T>::type;
  explicit Worker(const Problem<T>& problem);

  // takes the rows of a block: packs them, with 1 / norm and scale, for the product
  void take_rows(Range rows);
  // makes the logits of the block against `keys`; false: every pair is dropped, no tile was made
  bool make_tile(Range keys);

  const Tile<T>& tile() const { return tile_; }
  // a logit, of the row and the key there in the tile, and what it is without the bias
  T logit(int64_t i, int64_t j) const { return product(i, j) + tile_.bias[j]; }
  T product(int64_t i, int64_t j) const { return entry(i, j) * tile_.key_scale[j]; }
  // use(row, key, the row in the tile, the key there) for the partners in a tile
  template <class Use>
  void for_partners(Use use) {
    for (int64_t row = rows_.begin; row < rows_.end; ++row) {
      const int64_t key = problem_.partner(row), i = row - rows_.begin, j = key - keys_.begin;
      if (j >= 0 && key < keys_.end) use(row, key, i, j);
    }
  }
  Range rows() const { return rows_; }
  Range keys() const { return keys_; }
  int padded_rows() const { return tile_.rows; }
  // copies values of the block's rows into lane buffer `slot` (of kSlots), padding with `pad`;
  // null gives `pad` everywhere
  const T* lanes(int slot, const T* values, T pad);
  // 1 for the block's rows, 0 for the padding, in lane buffer `slot`
  const T* valid_lanes(int slot);
  T* lane_buffer(int slot) { return lanes_.data() + slot * problem_.block_rows; }
  // out (rows, D) += tile^T keys, or = when not accumulating, of one block of features
  void add_to_rows(T* out, bool accumulate, int64_t block = 0);
  // out (keys, D) += tile rows, likewise
  void add_to_keys(T* out, int64_t block = 0);
  // the same for keys of their own: adds to rows (may be null), sets the gradients of all keys
  // (N, M, D), of a dtype (may be null)
  void add_to_pairs(T* rows, void* keys, Dtype dtype);

  static constexpr int kSlots = 8;

 protected:
  // what a logit is made of, as it lies
  T entry(int64_t i, int64_t j) const {
    return tile_.logits.data[i / kPanel * tile_.logits.panel + j * tile_.logits.row + i % kPanel];
  }
  // the same, packed as they are unless `scaled`
  void take_rows(Range rows, bool scaled);
  // the tile's keys, masks and biases; false: every pair is dropped
  bool aim(Range keys);
  // where logits of the tile are kept, in a set of those of all rows; data is null where they are
  // not
  PanelMatrix<T> kept_place(int64_t set = 0) const;
  // the panel of an operand with lanes of rows that row `first` begins
  static PanelMatrix<T> panel(const PanelMatrix<T>& of, int64_t first) {
    return {of.data + first / kPanel * of.panel, of.row};
  }
  // out, a panel = the products of a block of features of keys and packed rows from `first` on, or
  // += with `add`
  void multiply(int64_t block, int64_t first, const PanelMatrix<T>& out, bool add);

  const Problem<T>& problem_;
  Tile<T> tile_{};
  Range rows_{}, keys_{};

 private:
  // the block's rows x, in terms, into panels of columns, times scales
  void pack(const T* x, int64_t stride, const T* scales);
  void make_paired_tile();
  void make_logits(const PanelMatrix<T>& out);
  BitRows read_bits(const Features<T>& features, Range range);
  void read_keys();  // for products

  Buffer<T> packed_, logits_, x_buffer_, y_buffer_, lanes_, pair_inverse_, row_scale_,
      pair_gradients_;
  Buffer<Id> ids_;
  std::vector<uint16_t> bits_buffer_;
  BitRows y_bits_;  // until other rows are read
  RowPairs x_pairs_, y_pairs_;
  RoundedTile rounded_;
  const T* x_rows_ = nullptr;  // where bits are multiplied, these are not read
  const T* y_rows_ = nullptr;
  int64_t x_stride_ = 0, y_stride_ = 0;
};

}  // namespace ck
