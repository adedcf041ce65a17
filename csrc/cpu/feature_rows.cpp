#include "feature_rows.h"

#include <algorithm>
#include <cstring>

namespace ck {
namespace {

// Other features are widened tile by tile, each time a tile passes; a matrix of at most this many
// elements (16 MB) is copied once.
constexpr int64_t kCopyElements = 1 << 22;

// A row stride below D (expanded rows) is not a matrix that a product takes.
template <class T>
bool is_direct(const Matrix& m) {
  return m.dtype == kDtype<T> && m.col_stride == 1 && m.row_stride >= m.d;
}

template <class T>
void read_rows(const Matrix& m, int64_t first, int64_t count, T* out) {
  tile_kernels<T>().read_rows(m.row(first), m.dtype, m.row_stride, m.col_stride, count, m.d, out);
}

}  // namespace

template <class T>
void Features<T>::add(const Matrix& source, bool copied) {
  Part part{rows_, rows_ + source.rows, source, source, {}, is_direct<T>(source)};
  if (!part.direct && copied) {
    part.copy = Buffer<T>(source.rows * d_);
    T* copy = part.copy.data();
    parallel_for(0, source.rows, divide_up(kSerialWork, d_), [&](int64_t begin, int64_t end) {
      read_rows(source, begin, end - begin, copy + begin * d_);
    });
    part.matrix = matrix_of(copy, source.rows, d_);
    part.direct = true;
  }
  rows_ = part.end;
  parts_.push_back(std::move(part));
}

template <class T>
Features<T>::Features(const Matrix& matrix, bool normalize, bool with_norms, const Matrix& more,
                      bool seldom_read)
    : d_(matrix.d) {
  const bool copied = !seldom_read && (matrix.rows + more.rows) * d_ <= kCopyElements;
  add(matrix, copied);
  if (more.given()) add(more, copied);
  if (!with_norms) return;
  inverse_ = Buffer<T>(rows_);
  Buffer<T> norms(rows_);
  for_read_blocks({0, rows_}, [&](Range range, const T* rows, int64_t stride) {
    tile_kernels<T>().norms(rows, stride, range.size(), d_, inverse_.data() + range.begin,
                            norms.data() + range.begin);
  });
  if (!normalize) std::fill_n(inverse_.data(), rows_, T{1});
  for (int64_t i = 0; i < rows_; ++i) {
    largest_norm_ = std::max(largest_norm_, static_cast<double>(norms[i] * inverse_[i]));
    longest_ = std::max(longest_, static_cast<double>(norms[i]));
  }
}

template <class T>
const uint16_t* Features<T>::bits(Range range, std::vector<uint16_t>& buffer,
                                  int64_t* stride) const {
  const auto row = [](const Part& part, int64_t i) {
    return static_cast<const uint16_t*>(part.source.row(i - part.begin));
  };
  const Part& part = part_of(range.begin);
  if (range.end <= part.end) {
    *stride = part.source.row_stride;
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
    *stride = first.matrix.row_stride;
    return static_cast<const T*>(first.row(range.begin));
  }
  *stride = d_;
  for (int64_t i = range.begin; i < range.end;) {
    const Part& part = part_of(i);
    const int64_t count = std::min(range.end, part.end) - i;
    read_rows(part.matrix, i - part.begin, count, buffer + (i - range.begin) * d_);
    i += count;
  }
  return buffer;
}

Matrix gather(const Matrix& matrix, const Matrix& more, const std::vector<int64_t>& which,
              int64_t each, Buffer<char>& memory) {
  const int64_t size = size_of(matrix.dtype), length = matrix.d * size;
  const int64_t count = static_cast<int64_t>(which.size()) * each;
  memory = Buffer<char>(count * length);
  parallel_for(0, count, divide_up(kSerialWork, matrix.d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = which[i / each] * each + i % each;
      const Matrix& from = at < matrix.rows ? matrix : more;
      const char* row =
          static_cast<const char*>(from.row(at < matrix.rows ? at : at - matrix.rows));
      char* out = memory.data() + i * length;
      if (from.col_stride == 1)
        std::memcpy(out, row, length);
      else
        for (int64_t k = 0; k < matrix.d; ++k)
          std::memcpy(out + k * size, row + k * from.col_stride * size, size);
    }
  });
  return {memory.data(), count, matrix.d, matrix.d, 1, matrix.dtype};
}

template class Features<float>;
template class Features<double>;

}  // namespace ck
