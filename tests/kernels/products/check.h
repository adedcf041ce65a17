// Operands between pages that cannot be touched, and how to compare products of them.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

inline std::mt19937 generator(7);

inline void expect(bool right, const char* what, int64_t m, int64_t n, int64_t k) {
  if (right) return;
  std::printf("%s of m %d, n %d, k %d\n", what, int(m), int(n), int(k));
  std::exit(1);
}

// `size` numbers, right behind such a page or right before one
template <class T>
class Guarded {
 public:
  Guarded(int64_t size, bool at_end) : size_(size) {
    const int64_t used = (size * sizeof(T) + kPage) / kPage * kPage;
    length_ = used + 2 * kPage;
    memory_ =
        static_cast<char*>(mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(memory_ + kPage, used, PROT_READ | PROT_WRITE);
    data_ = reinterpret_cast<T*>(memory_ + kPage + (at_end ? used - size * sizeof(T) : 0));
  }
  ~Guarded() { munmap(memory_, length_); }
  Guarded(const Guarded&) = delete;

  void fill_random() {
    std::uniform_real_distribution<double> uniform(-1, 1);
    for (int64_t i = 0; i < size_; ++i) data_[i] = static_cast<T>(uniform(generator));
  }
  T* data() { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  static constexpr int64_t kPage = 4096;
  int64_t size_, length_;
  char* memory_;
  T* data_;
};

template <class T>
bool same_bits(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

// Where the entries of a matrix (rows, columns) lie, plain or in panels.
struct Layout {
  int64_t rows, columns, row, panel;
  static Layout plain(int64_t rows, int64_t columns, int64_t gap) {
    return {rows, columns, columns + gap, 64};
  }
  static Layout panels(int64_t rows, int64_t columns) { return {rows, columns, 64, 64 * rows}; }
  int64_t at(int64_t i, int64_t j) const { return i * row + j / 64 * panel + j % 64; }
  int64_t size() const { return rows * columns == 0 ? 0 : at(rows - 1, columns - 1) + 1; }
};

// Calls `multiply` for c = a b or c += a b of one shape and compares with sums in double of
// term(a, b); then for single entries, which must come out bit by bit.
template <class T, class Term, class Fill, class Product, class Multiply>
void check(int64_t m, int64_t n, int64_t k, bool left_by_columns, bool in_panels, bool add,
           bool at_end, double epsilon, Fill fill, Product product, Multiply multiply) {
  const int64_t a_row = left_by_columns ? 1 : k + 3, a_col = left_by_columns ? m + 5 : 1;
  const Layout of_b = in_panels ? Layout::panels(k, n) : Layout::plain(k, n, 2);
  const Layout of_c = in_panels ? Layout::panels(m, n) : Layout::plain(m, n, 1);
  Guarded<Term> a(k == 0 ? 0 : (m - 1) * a_row + (k - 1) * a_col + 1, at_end);
  Guarded<Term> b(of_b.size(), at_end);
  Guarded<T> c(of_c.size(), at_end), before(of_c.size(), at_end);
  fill(a), fill(b);
  before.fill_random();
  std::memcpy(c.data(), before.data(), c.size() * sizeof(T));
  multiply(m, n, k, a.data(), a_row, a_col, b.data(), of_b.row, of_b.panel, c.data(), of_c.row,
           of_c.panel, add);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const int64_t place = of_c.at(i, j);
      double sum = add ? before[place] : 0, size = std::abs(sum);
      for (int64_t p = 0; p < k; ++p) {
        const auto [value, magnitude] = product(a[i * a_row + p * a_col], b[of_b.at(p, j)]);
        sum += value;
        size += magnitude;
      }
      expect(std::abs(c[place] - sum) <= epsilon * (k + 2) * size, "product", m, n, k);
      if ((i * n + j) % (m * n / 12 + 1) == 0) {
        T alone = before[place];
        multiply(1, 1, k, a.data() + i * a_row, a_row, a_col, b.data() + of_b.at(0, j), of_b.row,
                 64, &alone, 1, 64, add);
        expect(same_bits(alone, c[place]), "bits", m, n, k);
      }
      before[place] = c[place];
    }
  for (int64_t i = 0; i < c.size(); ++i)
    expect(same_bits(before[i], c[i]), "write outside", m, n, k);
}

// check(m, n, k, ...) over awkward sizes and all layouts
template <class Check>
void for_shapes(bool left_by_columns, Check check) {
  const int64_t counts[] = {1, 5, 6, 7, 8, 13, 33, 66},
                widths[] = {1, 3, 8, 17, 31, 32, 63, 65, 140};
  const int64_t terms[] = {0, 1, 2, 17, 64, 131, 260};
  int64_t shape = 0;
  for (int64_t m : counts)
    for (int64_t n : widths)
      for (int64_t k : terms) {
        const int64_t flags = shape++ * 5;
        for (int64_t bit : {0, 3, 9})
          check(m, n, k, left_by_columns && ((flags ^ bit) & 1), ((flags ^ bit) >> 1) & 1,
                ((flags ^ bit) >> 2) & 1, ((flags ^ bit) >> 3) & 1);
      }
}
