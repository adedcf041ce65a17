#include "problem.h"

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

// torch's own choice, so that ATEN_CPU_CAPABILITY holds here too
template <class T>
const TileKernels<T>& tile_kernels() {
  [[maybe_unused]] static const std::string capability = at::get_cpu_capability();
#ifdef CK_HAVE_AVX512
  if (capability == "AVX512") return avx512::kernels<T>();
#endif
#ifdef CK_HAVE_AVX2
  if (capability == "AVX2" || capability == "AVX512") return avx2::kernels<T>();
#endif
  return baseline::kernels<T>();
}

template const TileKernels<float>& tile_kernels<float>();
template const TileKernels<double>& tile_kernels<double>();

Dtype feature_dtype(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat;
    case at::kDouble:
      return Dtype::kDouble;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kHalf;
    default:
      TORCH_CHECK_TYPE(false, "features must be float32, float64, bfloat16 or float16, got ",
                       tensor.scalar_type());
  }
}

// Other features are widened tile by tile, each time a tile passes; a matrix of at most this many
// elements (16 MB) is copied once.
constexpr int64_t kCopyElements = 1 << 22;

// A row stride below D (expanded rows) is not a matrix a library takes.
template <class T>
bool is_direct(const at::Tensor& t) {
  return t.scalar_type() == kScalar<T> && t.stride(1) == 1 && t.stride(0) >= t.size(1);
}

template <class T>
void Features<T>::add(const at::Tensor& source, bool copied) {
  const at::Tensor tensor =
      is_direct<T>(source) || !copied ? source : source.to(kScalar<T>).contiguous();
  parts_.push_back(
      {rows_, rows_ + tensor.size(0), source, tensor, feature_dtype(tensor), is_direct<T>(tensor)});
  rows_ += tensor.size(0);
}

template <class T>
Features<T>::Features(const at::Tensor& tensor, bool normalize, bool with_norms,
                      const OptionalTensor& more)
    : d_(tensor.size(1)) {
  const bool copied = tensor.numel() + (more ? more->numel() : 0) <= kCopyElements;
  add(tensor, copied);
  if (more) add(*more, copied);
  if (!with_norms) return;
  inverse_ = at::empty({rows_}, kScalar<T>);
  const at::Tensor norm = at::empty({rows_}, kScalar<T>);
  T* inverse = inverse_.template data_ptr<T>();
  T* norms = norm.template data_ptr<T>();
  for_read_blocks({0, rows_}, [&](Range range, const T* rows, int64_t stride) {
    tile_kernels<T>().norms(rows, stride, range.size(), d_, inverse + range.begin,
                            norms + range.begin);
  });
  for (int64_t i = 0; i < rows_; ++i)
    largest_norm_ = std::max(largest_norm_, static_cast<double>(norms[i]));
  if (normalize)
    largest_norm_ = std::min(largest_norm_, 1.0);
  else
    inverse_.fill_(1);
}

template <class T>
bool Features<T>::has_bits() const {
  return std::all_of(parts_.begin(), parts_.end(), [&](const Part& part) {
    const at::Tensor& t = part.source;
    return std::is_same_v<T, float> && t.scalar_type() == at::kBFloat16 && t.stride(1) == 1 &&
           t.stride(0) >= d_ && t.stride(0) % 2 == 0 && d_ % 2 == 0;
  });
}

template <class T>
const uint16_t* Features<T>::bits(Range range, std::vector<uint16_t>& buffer,
                                  int64_t* stride) const {
  const auto row = [](const Part& part, int64_t i) {
    return static_cast<const uint16_t*>(part.source.const_data_ptr()) +
           (i - part.begin) * part.source.stride(0);
  };
  const Part& part = part_of(range.begin);
  if (range.end <= part.end) {
    *stride = part.source.stride(0);
    return row(part, range.begin);
  }
  *stride = d_;
  buffer.resize(range.size() * d_);
  for (int64_t i = range.begin; i < range.end; ++i)
    std::copy_n(row(part_of(i), i), d_, &buffer[(i - range.begin) * d_]);
  return buffer.data();
}

template <class T>
const T* Features<T>::read(Range range, T* buffer, int64_t* stride) const {
  const Part& first = part_of(range.begin);
  if (first.direct && range.end <= first.end) {
    *stride = first.tensor.stride(0);
    return static_cast<const T*>(first.row(range.begin));
  }
  *stride = d_;
  for (int64_t i = range.begin; i < range.end;) {
    const Part& part = part_of(i);
    const int64_t count = std::min(range.end, part.end) - i;
    tile_kernels<T>().read_rows(part.row(i), part.dtype, part.tensor.stride(0),
                                part.tensor.stride(1), count, d_, buffer + (i - range.begin) * d_);
    i += count;
  }
  return buffer;
}

template <class T>
Ids<T>::Ids(const OptionalTensor& rows, const OptionalTensor& keys) {
  if (!rows.has_value()) return;
  at::Tensor both = at::cat({rows->to(at::kLong), keys->to(at::kLong)});
  // ids too large for a lane are numbered anew
  if (sizeof(Id) < sizeof(int64_t) && both.numel() > 0) {
    const auto [low, high] = at::aminmax(both);
    using Limits = std::numeric_limits<Id>;
    if (low.item<int64_t>() < Limits::min() || high.item<int64_t>() > Limits::max())
      both = std::get<1>(at::_unique2(both, /*sorted=*/true, /*return_inverse=*/true));
  }
  both = both.to(c10::CppTypeToScalarType<Id>::value);
  rows_ = both.narrow(0, 0, rows->size(0));
  keys_ = both.narrow(0, rows->size(0), keys->size(0));
}

template <class T>
bool Ids<T>::meet(Range rows, Range keys) const {
  const auto [row_low, row_high] =
      std::minmax_element(this->rows() + rows.begin, this->rows() + rows.end);
  const auto [key_low, key_high] =
      std::minmax_element(this->keys() + keys.begin, this->keys() + keys.end);
  return *row_low <= *key_high && *key_low <= *row_high;
}

template <class T>
Problem<T>::Problem(const PairArguments& a)
    : x(a.x, a.normalize, true, a.x_more),
      y(!a.y.has_value()  ? x
        : a.y->dim() == 3 ? Features<T>(a.y->reshape({-1, a.y->size(2)}), a.normalize, false)
                          : Features<T>(*a.y, a.normalize, true, a.y_more)),
      symmetric(!a.y.has_value()),
      paired(a.y.has_value() && a.y->dim() == 3),
      keys(paired ? a.y->size(1) : y.rows()),
      bits(!paired && has_bfloat16_products() && x.has_bits() && y.has_bits()),
      normalize(a.normalize),
      scale(a.scale.to(kScalar<T>).template item<T>()),
      exclude(a.exclude_rows, a.exclude_cols),
      keep(a.keep_rows, a.keep_cols) {
  if (a.bias.has_value()) {
    bias = a.bias->to(kScalar<T>).contiguous();
    largest_bias = bias.abs().max().template item<double>();
  } else {
    bias = at::zeros({keys}, kScalar<T>);
  }
  if (paired) ones = at::ones({keys}, kScalar<T>);
  // a tile, the packed rows and the keys of a tile together stay within a core's L2 cache
  const int64_t d = x.d() * static_cast<int64_t>(sizeof(T)) / 4;
  const int64_t most_rows = d <= 256 ? 256 : d <= 1024 ? 128 : 64;
  const int64_t share = divide_up(x.rows(), at::get_num_threads());
  block_rows =
      std::clamp(divide_up(share, kRowPadding) * kRowPadding, int64_t{kRowPadding}, most_rows);
  block_keys = d <= 512 ? 128 : 64;
}

template <class T>
Worker<T>::Worker(const Problem<T>& problem, bool with_gradients) : problem_(problem) {
  const int64_t rows = problem.block_rows, keys = problem.block_keys, d = problem.x.d();
  const auto options = at::TensorOptions(kScalar<T>);
  packed_ = at::empty({d * rows}, options);
  logits_ = at::empty({keys * rows}, options);
  if (with_gradients) transposed_ = at::empty({rows * keys}, options);
  if (!problem.x.direct()) x_buffer_ = at::empty({rows * d}, options);
  if (problem.paired) pair_inverse_ = at::empty({keys * rows}, options);
  if (!problem.y.direct()) y_buffer_ = at::empty({keys * d}, options);
  lanes_ = at::empty({kSlots * rows}, options);
  row_scale_ = at::zeros({rows}, options);
  // the ids that never drop a pair: exclude ids that differ, keep ids that agree
  ids_ = at::zeros({2 * rows + 2 * keys}, c10::CppTypeToScalarType<Id>::value);
  tile_.data = logits_.template data_ptr<T>();
}

template <class T>
void Worker<T>::take_rows(Range rows) {
  rows_ = rows;
  const int64_t count = rows.size();
  tile_.rows = static_cast<int>(divide_up(count, kRowPadding) * kRowPadding);
  tile_.ld = tile_.rows;
  T* buffer = problem_.x.direct() ? nullptr : x_buffer_.template data_ptr<T>();
  x_rows_ = problem_.x.read(rows, buffer, &x_stride_);
  T* scales = row_scale_.template data_ptr<T>();
  for (int64_t i = 0; i < count; ++i)
    scales[i] = problem_.scale * problem_.x.inverse()[rows.begin + i];
  T* packed = packed_.template data_ptr<T>();
  if (problem_.paired)
    std::fill_n(tile_.data, problem_.block_keys * tile_.ld, T{0});  // padded rows stay so
  else if (problem_.bits) {                                         // pairs of features move as one
    int64_t stride;
    const uint16_t* bits = problem_.x.bits(rows, bits_buffer_, &stride);
    problem_.kernels.pack(reinterpret_cast<const T*>(bits), stride / 2, static_cast<int>(count),
                          problem_.x.d() / 2, nullptr, packed, tile_.rows);
  } else
    problem_.kernels.pack(x_rows_, x_stride_, static_cast<int>(count), problem_.x.d(), scales,
                          packed, tile_.rows);
  if (!problem_.exclude.given() && !problem_.keep.given()) return;
  Id* ids = ids_.template data_ptr<Id>();
  for (int64_t i = 0; i < tile_.rows; ++i) {
    const bool real = i < count;
    if (problem_.exclude.given()) ids[i] = real ? problem_.exclude.rows()[rows.begin + i] : 0;
    if (problem_.keep.given())
      ids[problem_.block_rows + i] = real ? problem_.keep.rows()[rows.begin + i] : 0;
  }
}

template <class T>
bool Worker<T>::make_tile(Range keys) {
  const bool exclude = problem_.exclude.given() && problem_.exclude.meet(rows_, keys);
  if (problem_.keep.given() && !problem_.keep.meet(rows_, keys)) return false;
  keys_ = keys;
  tile_.keys = static_cast<int>(keys.size());
  tile_.key_scale = problem_.paired ? problem_.ones.template const_data_ptr<T>()
                                    : problem_.y.inverse() + keys.begin;
  tile_.bias = problem_.bias.template const_data_ptr<T>() + keys.begin;
  tile_.masked = exclude || problem_.keep.given();
  if (tile_.masked) {
    Id* ids = ids_.template data_ptr<Id>();
    Id* key_ids = ids + 2 * problem_.block_rows;
    tile_.exclude_row = ids;
    tile_.keep_row = ids + problem_.block_rows;
    tile_.keep_key =
        problem_.keep.given() ? problem_.keep.keys() + keys.begin : key_ids + problem_.block_keys;
    tile_.exclude_key = problem_.exclude.given() ? problem_.exclude.keys() + keys.begin : key_ids;
    if (!problem_.exclude.given()) std::fill_n(key_ids, problem_.block_keys, Id{1});
  }
  if (problem_.paired) {
    make_paired_tile();
    return true;
  }
  const int64_t place = problem_.kept.place(keys.begin, keys.end);
  if (place >= 0 && !problem_.keeps) {
    copy_kept(place);
    y_rows_ = nullptr;
    return true;
  }
  make_logits(keys);
  if (place >= 0) copy_kept(place);
  return true;
}

template <class T>
void Worker<T>::copy_kept(int64_t place) {
  T* const memory = static_cast<T*>(problem_.kept.memory.data_ptr());
  for (int64_t i = 0; i < tile_.rows; i += kRowPadding) {
    T* kept = memory + (rows_.begin + i) * problem_.kept.stride() + place * kRowPadding;
    T* tile = tile_.data + i;
    for (int64_t j = 0; j < keys_.size(); ++j, kept += kRowPadding, tile += tile_.ld)
      std::copy_n(problem_.keeps ? tile : kept, kRowPadding, problem_.keeps ? kept : tile);
  }
}

template <class T>
void Worker<T>::make_logits(Range keys) {
  const T* packed = packed_.template const_data_ptr<T>();
  if constexpr (std::is_same_v<T, float>) {
    if (problem_.bits) {
      int64_t stride;
      const uint16_t* bits = problem_.y.bits(keys, bits_buffer_, &stride);
      gemm(keys.size(), tile_.rows, problem_.x.d(), bits, stride,
           reinterpret_cast<const uint16_t*>(packed), tile_.rows, tile_.data, tile_.ld);
      problem_.kernels.scale_rows(tile_.data, tile_.ld, tile_.keys, tile_.rows,
                                  row_scale_.template const_data_ptr<T>());
      y_rows_ = nullptr;
      return;
    }
  }
  read_keys();
  gemm(keys.size(), tile_.rows, problem_.x.d(), y_rows_, y_stride_, packed, tile_.rows, tile_.data,
       tile_.ld, false);
}

template <class T>
void Worker<T>::read_keys() {
  T* buffer = problem_.y.direct() ? nullptr : y_buffer_.template data_ptr<T>();
  y_rows_ = problem_.y.read(keys_, buffer, &y_stride_);
}

template <class T>
void Worker<T>::make_paired_tile() {
  T* buffer = problem_.y.direct() ? nullptr : y_buffer_.template data_ptr<T>();
  for (int64_t i = 0; i < rows_.size(); ++i) {
    const int64_t first = (rows_.begin + i) * problem_.keys + keys_.begin;
    y_rows_ = problem_.y.read({first, first + keys_.size()}, buffer, &y_stride_);
    problem_.kernels.dots(x_rows_ + i * x_stride_, y_rows_, y_stride_, problem_.normalize,
                          problem_.scale * problem_.x.inverse()[rows_.begin + i], keys_.size(),
                          problem_.x.d(), tile_.data + i, pair_inverse_.template data_ptr<T>() + i,
                          tile_.ld);
  }
}

template <class T>
void Worker<T>::add_to_pairs(T* rows, const at::Tensor* keys) {
  const int64_t d = problem_.x.d();
  T* buffer = problem_.y.direct() ? nullptr : y_buffer_.template data_ptr<T>();
  const at::Tensor gradients = at::empty({keys_.size(), d}, kScalar<T>);
  T* out = gradients.template data_ptr<T>();
  for (int64_t i = 0; i < rows_.size(); ++i) {
    const T* x = x_rows_ + i * x_stride_;
    const int64_t first = (rows_.begin + i) * problem_.keys + keys_.begin;
    y_rows_ = problem_.y.read({first, first + keys_.size()}, buffer, &y_stride_);
    for (int64_t j = 0; j < keys_.size(); ++j) {
      const T* y = y_rows_ + j * y_stride_;
      const T inverse = pair_inverse_.template const_data_ptr<T>()[j * tile_.ld + i];
      const T weight = tile_.data[j * tile_.ld + i] * inverse;
      if (rows != nullptr) problem_.kernels.add_scaled(weight, y, d, rows + i * d);
      if (keys != nullptr)
        problem_.kernels.project(x, y, inverse, problem_.normalize, weight * problem_.scale, d,
                                 out + j * d);
    }
    if (keys != nullptr)
      keys->select(0, rows_.begin + i).narrow(0, keys_.begin, keys_.size()).copy_(gradients);
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
void Worker<T>::add_to_rows(T* out, bool accumulate) {
  if (y_rows_ == nullptr) read_keys();
  T* transposed = transposed_.template data_ptr<T>();
  const int64_t ld = problem_.block_keys;
  problem_.kernels.transpose(tile_.data, tile_.ld, tile_.keys, tile_.rows, transposed, ld);
  gemm(rows_.size(), problem_.x.d(), keys_.size(), transposed, ld, y_rows_, y_stride_, out,
       problem_.x.d(), accumulate);
}

template <class T>
void Worker<T>::add_to_keys(T* out) {
  gemm(keys_.size(), problem_.x.d(), rows_.size(), tile_.data, tile_.ld, x_rows_, x_stride_, out,
       problem_.x.d(), true);
}

template class Features<float>;
template class Features<double>;
template class Ids<float>;
template class Ids<double>;
template struct Problem<float>;
template struct Problem<double>;
template class Worker<float>;
template class Worker<double>;

}  // namespace ck
