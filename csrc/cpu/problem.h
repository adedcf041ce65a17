// One similarity matrix: its operands, masks and sizes, and what a thread needs to make tiles of
// it.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "fold.h"
#include "gemm.h"
#include "tile.h"
#include "workspace.h"

namespace ck {

using OptionalTensor = std::optional<at::Tensor>;

// The arguments that every operator over pairs begins with. Rows are those of x; the keys, rows of
// y, are the columns.
struct PairArguments {
  const at::Tensor& x;
  const OptionalTensor& x_more;  // rows (K, D) that follow those of x
  const OptionalTensor& y;       // (M, D); (N, M, D): keys of its own for each row; absent: y = x
  const OptionalTensor& y_more;
  const at::Tensor& scale;
  const OptionalTensor& bias;
  const OptionalTensor& exclude_rows;
  const OptionalTensor& exclude_cols;
  const OptionalTensor& keep_rows;
  const OptionalTensor& keep_cols;
  bool normalize;
};

template <class T>
constexpr at::ScalarType kScalar = std::is_same_v<T, float> ? at::kFloat : at::kDouble;

struct Range {
  int64_t begin;
  int64_t end;
  int64_t size() const { return end - begin; }
};

// Elements to read before waking another thread pays.
constexpr int64_t kSerialWork = 1 << 17;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of features of any dtype and strides, read as T; those of one tensor, or of two of a dtype.
template <class T>
class Features {
 public:
  // without norms, inverse() and largest_norm() are not to be asked for
  Features(const at::Tensor& tensor, bool normalize, bool with_norms = true,
           const OptionalTensor& more = {});

  int64_t rows() const { return rows_; }
  int64_t d() const { return d_; }
  // 1 / norm of each row, or 1
  const T* inverse() const { return inverse_.template const_data_ptr<T>(); }
  double largest_norm() const { return largest_norm_; }
  // whether all rows can be used where they lie
  bool direct() const { return parts_.size() == 1 && parts_[0].direct; }
  // whether they are bfloat16 that `bits` can give
  bool has_bits() const;
  // a pointer to the bits of `range`, copied to `buffer` where they lie in both tensors, and its
  // row stride
  const uint16_t* bits(Range range, std::vector<uint16_t>& buffer, int64_t* stride) const;
  // a pointer to `range`, copied to `buffer` unless it can be used where it lies, and its row
  // stride
  const T* read(Range range, T* buffer, int64_t* stride) const;
  // visit(range, its rows, their stride) for the rows of `all`, a block at a time, on all threads
  template <class Visit>
  void for_read_blocks(Range all, Visit visit) const;

 private:
  struct Part {
    int64_t begin, end;
    at::Tensor source, tensor;
    Dtype dtype;
    bool direct;
    const void* row(int64_t i) const {
      return static_cast<const char*>(tensor.const_data_ptr()) +
             (i - begin) * tensor.stride(0) * tensor.element_size();
    }
  };
  void add(const at::Tensor& tensor, bool copied);
  const Part& part_of(int64_t row) const {
    return row < parts_.front().end ? parts_.front() : parts_.back();
  }

  std::vector<Part> parts_;
  at::Tensor inverse_;
  int64_t rows_ = 0, d_;
  double largest_norm_ = 0;
};

template <class T>
template <class Visit>
void Features<T>::for_read_blocks(Range all, Visit visit) const {
  constexpr int64_t kBlock = 64;
  const int64_t grain = divide_up(kSerialWork, kBlock * d_);
  at::parallel_for(0, divide_up(all.size(), kBlock), grain, [&](int64_t begin, int64_t end) {
    const at::Tensor buffer = direct() ? at::Tensor() : at::empty({kBlock * d_}, kScalar<T>);
    T* copy = direct() ? nullptr : buffer.template data_ptr<T>();
    for (int64_t b = begin; b < end; ++b) {
      const Range range{all.begin + b * kBlock, std::min(all.end, all.begin + (b + 1) * kBlock)};
      int64_t stride;
      const T* rows = read(range, copy, &stride);
      visit(range, rows, stride);
    }
  });
}

// Pairs of ids, as wide as a lane.
template <class T>
class Ids {
 public:
  using Id = typename LaneId<T>::type;
  Ids(const OptionalTensor& rows, const OptionalTensor& keys);

  bool given() const { return rows_.defined(); }
  const Id* rows() const { return rows_.template const_data_ptr<Id>(); }
  const Id* keys() const { return keys_.template const_data_ptr<Id>(); }
  // whether some id may be both among the rows and among the keys of a tile
  bool meet(Range rows, Range keys) const;

 private:
  at::Tensor rows_, keys_;
};

template <class T>
struct Problem {
  explicit Problem(const PairArguments& arguments);

  Features<T> x;
  Features<T> y;
  bool symmetric;  // y is x
  bool paired;     // row i has the keys y[i * keys ...]
  int64_t keys;    // of a row
  bool bits;       // logits are products of bfloat16 as it lies
  bool normalize;
  T scale;
  at::Tensor bias, ones;  // (M,)
  double largest_bias = 0;
  Ids<T> exclude, keep;
  const TileKernels<T>& kernels = tile_kernels<T>();
  int64_t block_rows, block_keys;
  KeptLogits kept;
  bool keeps = false;  // tiles go there; else they come from there
};

// One thread's tile and its buffers; the rows of a block stay while tiles of keys pass.
template <class T>
class Worker {
 public:
  using Id = typename LaneId<T>::type;
  explicit Worker(const Problem<T>& problem, bool with_gradients);

  // takes the rows of a block: packs them, with 1 / norm and scale, for the product
  void take_rows(Range rows);
  // makes the logits of the block against `keys`; false: every pair is dropped, no tile was made
  bool make_tile(Range keys);

  const Tile<T>& tile() const { return tile_; }
  Range rows() const { return rows_; }
  Range keys() const { return keys_; }
  int padded_rows() const { return tile_.rows; }
  // copies values of the block's rows into lane buffer `slot` (of kSlots), padding with `pad`;
  // null gives `pad` everywhere
  const T* lanes(int slot, const T* values, T pad);
  // 1 for the block's rows, 0 for the padding, in lane buffer `slot`
  const T* valid_lanes(int slot);
  T* lane_buffer(int slot) { return lanes_.template data_ptr<T>() + slot * problem_.block_rows; }
  // out (rows, D) += tile^T keys, or = when not accumulating
  void add_to_rows(T* out, bool accumulate);
  // out (keys, D) += tile rows
  void add_to_keys(T* out);
  // the same for keys of their own: adds to rows (may be null), sets keys' gradients (may be null)
  void add_to_pairs(T* rows, const at::Tensor* keys);

  static constexpr int kSlots = 8;

 private:
  void make_paired_tile();
  void make_logits(Range keys);
  // the tile out to, or in from, its place among the logits that are kept
  void copy_kept(int64_t place);
  void read_keys();

  const Problem<T>& problem_;
  at::Tensor packed_, logits_, transposed_, x_buffer_, y_buffer_, lanes_, ids_, pair_inverse_,
      row_scale_;
  std::vector<uint16_t> bits_buffer_;
  Tile<T> tile_{};
  Range rows_{}, keys_{};
  const T* x_rows_ = nullptr;
  const T* y_rows_ = nullptr;
  int64_t x_stride_ = 0, y_stride_ = 0;
};

// Names the dtype of features for the tiles; raises for one they do not take.
Dtype feature_dtype(const at::Tensor& tensor);

// Calls `run(T{})` with T = double for float64 features, float otherwise.
template <class Run>
auto with_compute_type(const at::Tensor& x, Run run) {
  return x.scalar_type() == at::kDouble ? run(double{}) : run(float{});
}

}  // namespace ck
