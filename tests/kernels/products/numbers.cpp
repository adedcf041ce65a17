// Products of floats and of doubles, for one instruction set.
#include <limits>
#include <utility>

#include "check.h"
#include "product.h"

template <class T>
void check_all() {
  using namespace ck;
  const auto fill = [](auto& numbers) { numbers.fill_random(); };
  const auto product = [](double a, double b) { return std::pair(a * b, std::abs(a * b)); };
  const auto multiply = [](int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row,
                           int64_t a_col, const T* b, int64_t b_row, int64_t b_panel, T* c,
                           int64_t c_row, int64_t c_panel, bool add) {
    CK_ISA::multiply<CK_ISA::Numbers<T>>(m, n, k, {a, a_row, a_col}, {b, b_row, b_panel},
                                         {c, c_row, c_panel}, add);
  };
  for_shapes(true, [&](int64_t m, int64_t n, int64_t k, auto... layout) {
    check<T, T>(m, n, k, layout..., std::numeric_limits<T>::epsilon(), fill, product, multiply);
  });
}

int main() {
  check_all<float>();
  check_all<double>();
  std::puts("ok");
}
