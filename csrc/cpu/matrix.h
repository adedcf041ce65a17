// Tensors as Python hands them over: addresses, sizes, strides. Python has checked that they fit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "threads.h"
#include "tile.h"

namespace ck {

struct Range {
  int64_t begin;
  int64_t end;
  int64_t size() const { return end - begin; }
};

// Calls visit(block) for the blocks of `range`.
template <class Visit>
void for_blocks(Range range, int64_t block, Visit visit) {
  for (int64_t i = range.begin; i < range.end; i += block)
    visit(Range{i, std::min(range.end, i + block)});
}

// Elements to read before waking another thread pays.
constexpr int64_t kSerialWork = 1 << 17;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
constexpr Dtype kDtype = std::is_same_v<T, float> ? Dtype::kFloat : Dtype::kDouble;

inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
}

// Features of any dtype and strides (in elements).
struct Matrix {
  const void* data = nullptr;  // null: there are none
  int64_t rows = 0, d = 0, row_stride = 0, col_stride = 1;
  Dtype dtype = Dtype::kFloat;

  bool given() const { return data != nullptr; }
  const void* row(int64_t i) const {
    return static_cast<const char*>(data) + i * row_stride * size_of(dtype);
  }
};

// Rows that lie one after the other.
template <class T>
Matrix matrix_of(const T* data, int64_t rows, int64_t d) {
  return {data, rows, d, d, 1, kDtype<T>};
}

// run(begin, end) for parts of `size` elements that are moved, on all threads
template <class Run>
void for_elements(int64_t size, Run run) {
  parallel_for(0, size, kSerialWork, run);
}

template <class T>
void clear(T* data, int64_t size) {
  for_elements(size,
               [=](int64_t begin, int64_t end) { std::fill(data + begin, data + end, T{0}); });
}

// out (size) = the sum of `count` vectors one after the other
template <class T>
void add_up(const T* vectors, int64_t count, int64_t size, T* out) {
  for_elements(size, [=](int64_t begin, int64_t end) {
    std::copy(vectors + begin, vectors + end, out + begin);
    for (int64_t v = 1; v < count; ++v)
      for (int64_t i = begin; i < end; ++i) out[i] += vectors[v * size + i];
  });
}

}  // namespace ck
