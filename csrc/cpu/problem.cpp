#include "problem.h"

#include <cmath>

namespace ck {

template <class T>
Ids<T>::Ids(const IdPair& given, int64_t rows, int64_t keys) : rows_(rows) {
  if (given.rows.data == nullptr) return;
  ids_ = Buffer<Id>(rows + keys);
  const auto at = [&](int64_t i) { return i < rows ? given.rows[i] : given.keys[i - rows]; };
  using Limits = std::numeric_limits<Id>;
  bool narrow = true;
  for (int64_t i = 0; i < rows + keys; ++i) {
    const int64_t id = at(i);
    narrow &= id >= Limits::min() && id <= Limits::max();
    ids_[i] = static_cast<Id>(id);
  }
  if (narrow) return;
  // those too large for a lane are numbered anew
  std::vector<int64_t> found(rows + keys);
  for (int64_t i = 0; i < rows + keys; ++i) found[i] = at(i);
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  for (int64_t i = 0; i < rows + keys; ++i)
    ids_[i] = static_cast<Id>(std::lower_bound(found.begin(), found.end(), at(i)) - found.begin());
}

template <class T>
bool Ids<T>::meet(Range rows, Range keys) const {
  const auto [row_low, row_high] =
      std::minmax_element(this->rows() + rows.begin, this->rows() + rows.end);
  const auto [key_low, key_high] =
      std::minmax_element(this->keys() + keys.begin, this->keys() + keys.end);
  return *row_low <= *key_high && *key_low <= *row_high;
}

namespace {

// NaN if one is
template <class T>
double largest_magnitude(const T* values, int64_t size) {
  double largest = 0;
  for (int64_t i = 0; i < size; ++i) {
    const double magnitude = std::abs(values[i]);
    if (magnitude > largest || std::isnan(magnitude)) largest = magnitude;
    if (std::isnan(largest)) break;
  }
  return largest;
}

template <class T>
bool multiplies_bits(const PairArguments<T>& a) {
  if (!std::is_same_v<T, float> || a.own_keys > 0 || bfloat16_kernels() == nullptr) return false;
  const auto fits = [](const Matrix& m) { return !m.given() || has_bits(m); };
  return fits(a.x) && fits(a.x_more) && fits(a.y) && fits(a.y_more);
}

template <class T>
std::optional<Features<T>> other_features(const PairArguments<T>& a, bool bits) {
  if (!a.y.given()) return std::nullopt;
  return Features<T>(a.y, a.normalize, a.own_keys == 0, a.y_more, bits);
}

std::vector<Range> between(const std::vector<int64_t>& ends, int64_t d) {
  if (ends.empty()) return {{0, d}};
  std::vector<Range> blocks;
  for (int64_t end : ends) blocks.push_back({blocks.empty() ? 0 : blocks.back().end, end});
  return blocks;
}

}  // namespace

template <class T>
Problem<T>::Problem(const PairArguments<T>& a, const std::vector<int64_t>& ends)
    : bits(multiplies_bits(a)),
      x(a.x, a.normalize, true, a.x_more, bits),
      other(other_features(a, bits)),
      y(other ? *other : x),
      symmetric(!a.y.given()),
      paired(a.own_keys > 0),
      keys(paired ? a.own_keys : y.rows()),
      blocks(between(ends, a.x.d)),
      normalize(a.normalize),
      scale(a.scale),
      zeros(a.bias == nullptr ? keys : 0, T{0}),
      ones(paired ? keys : 0, T{1}),
      bias(a.bias == nullptr ? zeros.data() : a.bias),
      exclude(a.exclude, x.rows(), keys),
      keep(a.keep, x.rows(), keys) {
  // products of bits are scaled when they are there
  constexpr double kLargestProduct = 1e37;
  if (bits && !(x.longest() * y.longest() < kLargestProduct)) bits = false;
  fast = bits && bfloat16_kernels()->outrun_memory;
  if (a.bias != nullptr) largest_bias = largest_magnitude(bias, keys);
  // a tile, the packed rows and the keys of a tile together stay within a core's L2 cache
  const int64_t d = x.d() * static_cast<int64_t>(sizeof(T)) / 4;
  int64_t most_rows = d <= 256 ? 256 : d <= 1024 ? 128 : 64, most_keys = d <= 512 ? 128 : 64;
  // fast products wait for the sums of gradients, which come and go once for each tile
  if (fast && d <= 8192) most_rows = d <= 2048 ? 256 : 128, most_keys = 128;
  const int64_t share = divide_up(x.rows(), num_threads());
  block_rows =
      std::clamp(divide_up(share, kRowPadding) * kRowPadding, int64_t{kRowPadding}, most_rows);
  // fewer keys where threads would have none
  const int64_t key_share = divide_up(divide_up(keys, num_threads()), 32) * 32;
  block_keys = std::clamp<int64_t>(key_share, 32, most_keys);
}

// A cache line more than a tile's rows: the entries of one row, which a product walks through,
// would all fall into a few sets of the cache.
template <class T>
int64_t tile_stride(int64_t rows) {
  return rows + 64 / static_cast<int64_t>(sizeof(T));
}

template <class T>
Worker<T>::Worker(const Problem<T>& problem) : problem_(problem) {
  const int64_t rows = problem.block_rows, keys = problem.block_keys, d = problem.x.d();
  packed_ = Buffer<T>(problem.all_terms() * rows);
  logits_ = Buffer<T>(keys * tile_stride<T>(rows));
  if (!problem.bits && !problem.x.direct()) x_buffer_ = Buffer<T>(rows * d);
  if (problem.paired) pair_inverse_ = Buffer<T>(keys * tile_stride<T>(rows));
  if (!problem.bits && !problem.y.direct()) y_buffer_ = Buffer<T>(keys * d);
  lanes_ = Buffer<T>(kSlots * rows);
  row_scale_ = Buffer<T>(rows, T{0});
  // the ids that never drop a pair: exclude ids that differ, keep ids that agree
  ids_ = Buffer<Id>(2 * rows + 2 * keys, Id{0});
  tile_.data = logits_.data();
}

template <class T>
void Worker<T>::take_rows(Range rows) {
  take_rows(rows, true);
}

template <class T>
void Worker<T>::take_rows(Range rows, bool scaled) {
  rows_ = rows;
  const int64_t count = rows.size();
  tile_.rows = static_cast<int>(divide_up(count, kRowPadding) * kRowPadding);
  tile_.ld = tile_stride<T>(tile_.rows);
  T* scales = row_scale_.data();
  for (int64_t i = 0; i < count; ++i)
    scales[i] = problem_.scale * problem_.x.inverse()[rows.begin + i];
  if (problem_.bits) {  // pairs of features move as one
    const BitRows bits = read_bits(problem_.x, rows);
    pack(reinterpret_cast<const T*>(bits.data), bits.stride / 2, nullptr);
    x_pairs_.forget();
  } else {
    x_rows_ = problem_.x.read(rows, x_buffer_.data(), &x_stride_);
    if (problem_.paired)
      std::fill_n(tile_.data, problem_.block_keys * tile_.ld, T{0});  // padded rows stay so
    else
      pack(x_rows_, x_stride_, scaled ? scales : nullptr);
  }
  if (!problem_.exclude.given() && !problem_.keep.given()) return;
  Id* ids = ids_.data();
  for (int64_t i = 0; i < tile_.rows; ++i) {
    const bool real = i < count;
    if (problem_.exclude.given()) ids[i] = real ? problem_.exclude.rows()[rows.begin + i] : 0;
    if (problem_.keep.given())
      ids[problem_.block_rows + i] = real ? problem_.keep.rows()[rows.begin + i] : 0;
  }
}

template <class T>
void Worker<T>::pack(const T* x, int64_t stride, const T* scales) {
  for_blocks({0, rows_.size()}, kPanel, [&](Range part) {
    T* out = packed_.data() + part.begin * problem_.all_terms();
    for (int64_t k = 0; k < static_cast<int64_t>(problem_.blocks.size()); ++k) {
      const Range terms = problem_.terms(k), block = problem_.blocks[k];
      problem_.kernels.pack(x + part.begin * stride + terms.begin, stride,
                            static_cast<int>(part.size()), terms.size(),
                            scales == nullptr ? nullptr : scales + part.begin, out, kPanel);
      if (problem_.bits && block.begin % 2 != 0) keep_half(reinterpret_cast<uint32_t*>(out), false);
      out += terms.size() * kPanel;
      if (problem_.bits && block.end % 2 != 0)
        keep_half(reinterpret_cast<uint32_t*>(out) - kPanel, true);
    }
  });
}

template <class T>
bool Worker<T>::make_tile(Range keys) {
  if (!aim(keys)) return false;
  PanelMatrix<T> logits = kept_place();
  const bool kept = logits.data != nullptr;
  if (!kept) logits = {tile_.data, tile_.ld};
  tile_.logits = {logits.data, logits.row, logits.panel};
  if (problem_.paired)
    make_paired_tile();
  else if (!kept || problem_.keeps)
    make_logits(logits);
  return true;
}

template <class T>
bool Worker<T>::aim(Range keys) {
  const bool exclude = problem_.exclude.given() && problem_.exclude.meet(rows_, keys);
  if (problem_.keep.given() && !problem_.keep.meet(rows_, keys)) return false;
  keys_ = keys;
  tile_.keys = static_cast<int>(keys.size());
  tile_.key_scale = problem_.paired ? problem_.ones.data() : problem_.y.inverse() + keys.begin;
  tile_.bias = problem_.bias + keys.begin;
  tile_.masked = exclude || problem_.keep.given();
  if (tile_.masked) {
    Id* ids = ids_.data();
    Id* key_ids = ids + 2 * problem_.block_rows;
    tile_.exclude_row = ids;
    tile_.keep_row = ids + problem_.block_rows;
    tile_.keep_key =
        problem_.keep.given() ? problem_.keep.keys() + keys.begin : key_ids + problem_.block_keys;
    tile_.exclude_key = problem_.exclude.given() ? problem_.exclude.keys() + keys.begin : key_ids;
    if (!problem_.exclude.given()) std::fill_n(key_ids, problem_.block_keys, Id{1});
  }
  y_rows_ = nullptr;
  y_bits_ = {};
  y_pairs_.forget();
  return true;
}

template <class T>
PanelMatrix<T> Worker<T>::kept_place(int64_t set) const {
  const int64_t place = problem_.kept.place(keys_.begin, keys_.end);
  if (place < 0) return {nullptr, 0};
  const int64_t stride = problem_.kept.stride();
  const int64_t first = set * divide_up(problem_.x.rows(), kRowPadding) * kRowPadding;
  T* const memory = static_cast<T*>(problem_.kept.memory);
  return {memory + (first + rows_.begin) * stride + place * kPanel, kPanel, stride * kPanel};
}

template <class T>
void Worker<T>::make_logits(const PanelMatrix<T>& out) {
  for (int64_t i = 0; i < tile_.rows; i += kPanel) {  // what the first-level cache holds
    const PanelMatrix<T> part = panel(out, i);
    multiply(0, i, part, false);
    if (problem_.bits)
      problem_.kernels.scale_rows(part.data, part.row, tile_.keys, kPanel, row_scale_.data() + i);
  }
}

template <class T>
void Worker<T>::multiply(int64_t block, int64_t first, const PanelMatrix<T>& out, bool add) {
  if (y_rows_ == nullptr && y_bits_.data == nullptr) read_keys();
  const Range terms = problem_.terms(block);
  const int64_t at = first * problem_.all_terms() + problem_.terms_before(block) * kPanel;
  const T* rows = packed_.data() + at;
  if constexpr (std::is_same_v<T, float>) {
    if (problem_.bits) {
      const auto* keys = reinterpret_cast<const uint32_t*>(y_bits_.data);
      bfloat16_kernels()->multiply(keys_.size(), kPanel, terms.size(),
                                   {keys + terms.begin, y_bits_.stride / 2, 1},
                                   {reinterpret_cast<const uint32_t*>(rows), kPanel}, out, add);
      return;
    }
  }
  problem_.kernels.multiply(keys_.size(), kPanel, terms.size(),
                            {y_rows_ + terms.begin, y_stride_, 1}, {rows, kPanel}, out, add);
}

template <class T>
BitRows Worker<T>::read_bits(const Features<T>& features, Range range) {
  BitRows rows;
  rows.data = features.bits(range, bits_buffer_, &rows.stride);
  return rows;
}

template <class T>
void Worker<T>::read_keys() {
  if (problem_.bits)
    y_bits_ = read_bits(problem_.y, keys_);
  else
    y_rows_ = problem_.y.read(keys_, y_buffer_.data(), &y_stride_);
}

template <class T>
void Worker<T>::make_paired_tile() {
  T* buffer = y_buffer_.data();
  for (int64_t i = 0; i < rows_.size(); ++i) {
    const int64_t first = (rows_.begin + i) * problem_.keys + keys_.begin;
    y_rows_ = problem_.y.read({first, first + keys_.size()}, buffer, &y_stride_);
    problem_.kernels.dots(x_rows_ + i * x_stride_, y_rows_, y_stride_, problem_.normalize,
                          problem_.scale * problem_.x.inverse()[rows_.begin + i], keys_.size(),
                          problem_.x.d(), tile_.data + i, pair_inverse_.data() + i, tile_.ld);
  }
}

template <class T>
void Worker<T>::add_to_pairs(T* rows, void* keys, Dtype dtype) {
  const int64_t d = problem_.x.d();
  if (keys != nullptr && pair_gradients_.empty())
    pair_gradients_ = Buffer<T>(problem_.block_keys * d);
  T* out = pair_gradients_.data();
  for (int64_t i = 0; i < rows_.size(); ++i) {
    const T* x = x_rows_ + i * x_stride_;
    const int64_t first = (rows_.begin + i) * problem_.keys + keys_.begin;
    y_rows_ = problem_.y.read({first, first + keys_.size()}, y_buffer_.data(), &y_stride_);
    for (int64_t j = 0; j < keys_.size(); ++j) {
      const T* y = y_rows_ + j * y_stride_;
      const T inverse = pair_inverse_[j * tile_.ld + i];
      const T weight = tile_.data[j * tile_.ld + i] * inverse;
      if (rows != nullptr) problem_.kernels.add_scaled(weight, y, d, rows + i * d);
      if (keys != nullptr)
        problem_.kernels.project(x, y, inverse, problem_.normalize, weight * problem_.scale, d,
                                 out + j * d);
    }
    if (keys != nullptr)
      problem_.kernels.write(out, keys_.size() * d, dtype,
                             static_cast<char*>(keys) + first * d * size_of(dtype));
  }
}

template <class T>
const T* Worker<T>::lanes(int slot, const T* values, T pad) {
  T* out = lane_buffer(slot);
  const int64_t count = values == nullptr ? 0 : rows_.size();
  std::copy_n(values == nullptr ? out : values + rows_.begin, count, out);
  std::fill(out + count, out + tile_.rows, pad);
  return out;
}

template <class T>
const T* Worker<T>::valid_lanes(int slot) {
  T* out = lane_buffer(slot);
  std::fill_n(out, rows_.size(), T{1});
  std::fill(out + rows_.size(), out + tile_.rows, T{0});
  return out;
}

template <class T>
void Worker<T>::add_to_rows(T* out, bool accumulate, int64_t block) {
  const int64_t d = problem_.x.d(), room = problem_.block_rows * problem_.block_keys;
  const Range features = problem_.blocks[block];
  if constexpr (std::is_same_v<T, float>) {
    if (problem_.bits) {
      const auto keys = y_pairs_.of(problem_.blocks, block, keys_.size(), problem_.block_keys,
                                    [&] { return read_bits(problem_.y, keys_); });
      bfloat16_kernels()->multiply(rows_.size(), features.size(), divide_up(keys_.size(), 2),
                                   rounded_.of_rows(tile_, room), keys, {out + features.begin, d},
                                   accumulate);
      return;
    }
  }
  if (y_rows_ == nullptr) read_keys();
  for_blocks({0, rows_.size()}, kPanel, [&](Range part) {  // of the tile as much as a cache holds
    problem_.kernels.multiply(part.size(), features.size(), keys_.size(),
                              {tile_.data + part.begin, 1, tile_.ld},
                              {y_rows_ + features.begin, y_stride_},
                              {out + part.begin * d + features.begin, d}, accumulate);
  });
}

template <class T>
void Worker<T>::add_to_keys(T* out, int64_t block) {
  const int64_t d = problem_.x.d(), room = problem_.block_rows * problem_.block_keys;
  const Range features = problem_.blocks[block];
  if constexpr (std::is_same_v<T, float>) {
    if (problem_.bits) {
      const auto rows = x_pairs_.of(problem_.blocks, block, rows_.size(), problem_.block_rows,
                                    [&] { return read_bits(problem_.x, rows_); });
      bfloat16_kernels()->multiply(keys_.size(), features.size(), divide_up(rows_.size(), 2),
                                   rounded_.of_keys(tile_, rows_.size(), room), rows,
                                   {out + features.begin, d}, true);
      return;
    }
  }
  problem_.kernels.multiply(keys_.size(), features.size(), rows_.size(), {tile_.data, tile_.ld, 1},
                            {x_rows_ + features.begin, x_stride_}, {out + features.begin, d}, true);
}

template class Ids<float>;
template class Ids<double>;
template struct Problem<float>;
template struct Problem<double>;
template class Worker<float>;
template class Worker<double>;

}  // namespace ck
