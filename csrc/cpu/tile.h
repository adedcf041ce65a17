// What is done to one tile of logits. Compiled once for each instruction set (tile.cpp); the table
// of the best one is picked at run time.
//
// A tile holds the logits of `rows` queries against `keys` keys, transposed: entry (j, i) of key j
// and query i lies at tile[j * ld + i], so that a row of the similarity matrix is a lane. Row
// vectors are padded to a multiple of kRowPadding; a padded row has shift or lse = +inf, and
// gradients and scale 0, which makes it add nothing anywhere.
#pragma once

#include <cstdint>

namespace ck {

constexpr int kRowPadding = 64;
constexpr int kPanel = 64;
constexpr int kMatrices = 4;  // most matrices that `eigen` takes at once

// rows are divided by their norm, which counts as at least 1e-12
template <class T>
constexpr T kLargestInverse = T(1e12);

enum class Fold { kLse, kLseMean, kSoftplus };

enum class Dtype { kFloat, kDouble, kBFloat16, kHalf };

// ids are as wide as a lane, so that comparing them gives lane masks
template <class T>
struct LaneId;
template <>
struct LaneId<float> {
  using type = int32_t;
};
template <>
struct LaneId<double> {
  using type = int64_t;
};

// entry (i, j) at data[i * row + (j / kPanel) * panel + j % kPanel]; a plain matrix has panel =
// kPanel
template <class T>
struct PanelMatrix {
  T* data;
  int64_t row;
  int64_t panel = kPanel;
};

template <class T>
struct Tile {
  using Id = typename LaneId<T>::type;
  T* data;
  int64_t ld;
  int rows;  // padded
  int keys;
  // where the logits lie, in data or elsewhere: logit = entry (j, i) * key_scale[j] + bias[j]
  PanelMatrix<const T> logits;
  const T* key_scale;
  const T* bias;
  // a pair is dropped where exclude ids are equal or keep ids differ; only looked at when masked
  bool masked;
  const Id* exclude_row;
  const Id* exclude_key;
  const Id* keep_row;
  const Id* keep_key;
};

// sums over the keys of a tile for each row, and over its rows for each key; added to what is there
template <class T>
struct ForwardSums {
  const T* shift;      // (rows); +inf: the row adds nothing
  const T* key_shift;  // (keys), for the sums of the keys; null: those of the rows serve both
  double* row_sum;
  double* row_weighted;
  double* key_sum;  // null: no column statistics
  double* key_weighted;
  bool store;  // leave exp(z - shift) key_scale in the tile
};

// statistics of a row or a key, and the gradients that came for them
template <class T>
struct Coefficients {
  const T* lse;
  const T* mean;
  const T* grad_lse;
  const T* grad_mean;
};

template <class T>
struct BackwardTile {
  Coefficients<T> row;
  Coefficients<T> key;  // lse null: no column statistics
  bool one_shift;       // lse of the keys is that of the rows: one exponential serves both
  const T* row_scale;   // (rows); 0 for padded rows
  const T* row_valid;   // (rows); 1, or 0 for padded rows
  // added: sum of dL/dz over the rows of each key, and of dL/dz (z - bias) over all pairs; null,
  // key_total or both: not wanted
  double *key_total, *slope;
};

// the same where a tile gathers the coefficients of several prefixes of the features, and entries
// of logits are products of normalised features
template <class T>
struct PrefixTile {
  BackwardTile<T> of;
  const T* key_inverse;           // (keys): a coefficient is dL/dz row_scale key_inverse
  bool add;                       // to the coefficients that are there
  double *row_along, *key_along;  // sums of dL/dz times the entry for each row and key, added;
                                  // those of the keys may be null
};

// how many logits are above a threshold (rank; NaN is, and all are above NaN), the sum of all and
// their number; added to what is there
template <class T>
struct Counts {
  const T* row_threshold;  // +inf and row_valid 0 for padded rows
  const T* row_valid;
  double *row_rank, *row_total, *row_count;
  const T* key_threshold;  // null: rows only
  double *key_rank, *key_total, *key_count;
};

// a logit of a tile, of one of its rows and one of its keys
template <class T>
struct Found {
  T value;
  int32_t row, key;
};

// entry (i, k) at data[i * row + k * col]
template <class T>
struct LeftMatrix {
  const T* data;
  int64_t row, col;
};

template <class T>
struct TileKernels {
  const char* isa;
  // rows of any dtype and strides as T, contiguous with row length d
  void (*read_rows)(const void* x, Dtype dtype, int64_t row_stride, int64_t col_stride,
                    int64_t rows, int64_t d, T* out);
  // the opposite, of `size` values one after the other, rounded to nearest even
  void (*write)(const T* x, int64_t size, Dtype dtype, void* out);
  // 1 / max(norm, 1e-12) and, unless null, the norm of contiguous-in-d rows
  void (*norms)(const T* x, int64_t stride, int64_t rows, int64_t d, T* inverse, T* norm);
  // out[k * ld + i] = x[i, k] scale[i], or x[i, k] bit by bit when scale is null; columns from rows
  // up to ld are set to 0
  void (*pack)(const T* x, int64_t stride, int rows, int64_t d, const T* scale, T* out, int64_t ld);
  // tile[j * ld + i] *= scale[i]
  void (*scale_rows)(T* tile, int64_t ld, int keys, int rows, const T* scale);
  // out = tile[j * ld + i] (row_factor[i] key_factor[j]), which is the same where rows are keys
  void (*scaled_tile)(const T* tile, int64_t ld, int keys, int rows, const T* row_factor,
                      const T* key_factor, PanelMatrix<T> out);
  // largest logit of each row, -inf when every pair is dropped
  void (*row_max)(const Tile<T>& tile, T* out);
  // the same of each key, over the rows with row_valid > 0; raises what is there
  void (*raise_key_max)(const Tile<T>& tile, const T* row_valid, T* out);
  // raises the largest logit so far of each row, and notes which it was: key j is first + j. Of
  // equal ones the first counts, and of NaN
  void (*raise_largest)(const Tile<T>& tile, typename LaneId<T>::type first, T* largest,
                        typename LaneId<T>::type* which);
  void (*forward)(const Tile<T>& tile, Fold fold, const ForwardSums<T>& sums);
  // replaces logits by dL/dz row_scale key_scale
  void (*backward)(const Tile<T>& tile, Fold fold, const BackwardTile<T>& backward);
  // sets or adds dL/dz row_scale key_inverse, for logits that lie elsewhere
  void (*prefix_backward)(const Tile<T>& tile, Fold fold, const PrefixTile<T>& prefix);
  void (*add_counts)(const Tile<T>& tile, const Counts<T>& counts);
  // the logits of the keys from `begin` to `end` that are above the floor of their row and, unless
  // null, below its ceiling; NaN is both. Returns how many, in no order; padded rows may be among
  // them
  int (*find)(const Tile<T>& tile, int begin, int end, const T* floor, const T* ceiling,
              Found<T>* out);
  // for keys of its own of one row: out[j * ld] = scale <x, y_j> / |y_j| and inverse[j * ld] =
  // 1 / |y_j|, without the norm (and 1) unless `normalize`
  void (*dots)(const T* x, const T* y, int64_t stride, bool normalize, T scale, int64_t keys,
               int64_t d, T* out, T* inverse, int64_t ld);
  // out = scale (u - [normalize] inverse^2 <x, u> x); returns <x, u>. out may be u
  T (*project)(const T* u, const T* x, T inverse, bool normalize, T scale, int64_t d, T* out);
  // out = factor x; out may be x
  void (*scaled)(T factor, const T* x, int64_t d, T* out);
  // |y - x|^2
  T (*distance)(const T* x, const T* y, int64_t d);
  // with r = y - x: u += weight r, and out = of_r r + of_x x
  void (*add_difference)(const T* x, const T* y, T weight, T of_r, T of_x, int64_t d, T* u, T* out);
  // u += weight y
  void (*add_scaled)(T weight, const T* y, int64_t d, T* u);
  // c (m, n) = a (m, k) b (k, n), or += with `add` (product.h)
  void (*multiply)(int64_t m, int64_t n, int64_t k, LeftMatrix<T> a, PanelMatrix<const T> b,
                   PanelMatrix<T> c, bool add);
  // columns.h
  void (*center)(const T* x, int64_t rows, int64_t d, T* out, double* mean);
  void (*column_squares)(const T* x, int64_t rows, int64_t d, double* sums);
  bool (*eliminate)(T* upper, int64_t ld, T* inverse, int64_t begin, int64_t end, int64_t d,
                    const T* lowest);
  // eigen.h
  void (*eigen)(int count, int64_t d, int64_t ld, T* matrices, double* values, double* beside,
                T* room);
};

// Names what torch finds that the processor can do, before any table is asked for.
void set_capability(const char* name);

// The table for this machine; `T` is float or double.
template <class T>
const TileKernels<T>& tile_kernels();

}  // namespace ck
