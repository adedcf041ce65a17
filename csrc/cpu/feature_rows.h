// Rows of features of any dtype and strides, read as T.
#pragma once

#include <vector>

#include "buffer.h"
#include "matrix.h"

namespace ck {

// Whether products of bfloat16 can take them as they lie.
inline bool has_bits(const Matrix& m) {
  return m.dtype == Dtype::kBFloat16 && m.col_stride == 1 && m.row_stride >= m.d &&
         m.row_stride % 2 == 0 && m.d % 2 == 0;
}

// Those of one matrix, or of two of a dtype.
template <class T>
class Features {
 public:
  // without norms, inverse(), largest_norm() and longest() are not to be asked for; seldom_read:
  // `read` gives no more than a few times what there is
  Features(const Matrix& matrix, bool normalize, bool with_norms = true, const Matrix& more = {},
           bool seldom_read = false);

  int64_t rows() const { return rows_; }
  int64_t d() const { return d_; }
  // 1 / norm of each row, or 1
  const T* inverse() const { return inverse_.data(); }
  double largest_norm() const { return largest_norm_; }
  double longest() const { return longest_; }  // the same before rows are normalised
  // whether all rows can be used where they lie
  bool direct() const { return parts_.size() == 1 && parts_[0].direct; }
  // a pointer to the bits of `range`, where the matrices have them, copied to `buffer` where they
  // lie in both matrices, and its row stride
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
    Matrix source, matrix;
    Buffer<T> copy;
    bool direct;
    const void* row(int64_t i) const { return matrix.row(i - begin); }
  };
  void add(const Matrix& matrix, bool copied);
  const Part& part_of(int64_t row) const {
    return row < parts_.front().end ? parts_.front() : parts_.back();
  }

  std::vector<Part> parts_;
  Buffer<T> inverse_;
  int64_t rows_ = 0, d_;
  double largest_norm_ = 0, longest_ = 0;
};

template <class T>
template <class Visit>
void Features<T>::for_read_blocks(Range all, Visit visit) const {
  constexpr int64_t kBlock = 64;
  const int64_t grain = divide_up(kSerialWork, kBlock * d_);
  parallel_for(0, divide_up(all.size(), kBlock), grain, [&](int64_t begin, int64_t end) {
    Buffer<T> copy(direct() ? 0 : kBlock * d_);
    for (int64_t b = begin; b < end; ++b) {
      const Range range{all.begin + b * kBlock, std::min(all.end, all.begin + (b + 1) * kBlock)};
      int64_t stride;
      const T* rows = read(range, copy.data(), &stride);
      visit(range, rows, stride);
    }
  });
}

// The rows `which` of a matrix, or of two, in a copy of their dtype that lies in `memory`; with
// `each` > 1 row i stands for the rows from i * each on.
Matrix gather(const Matrix& matrix, const Matrix& more, const std::vector<int64_t>& which,
              int64_t each, Buffer<char>& memory);

}  // namespace ck
