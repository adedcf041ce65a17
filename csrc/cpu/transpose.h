// Squares of as many vectors as a vector has lanes, transposed in registers.
#pragma once

#include <utility>

#include "simd.h"

namespace ck {
namespace CK_ISA {

// swaps the off-diagonal step x step blocks of rows i and i + step
template <int Step, class V, std::size_t... L>
CK_FOLD void swap_blocks(V& a, V& b, std::index_sequence<L...>) {
  constexpr int W = sizeof...(L);
  const V low = __builtin_shufflevector(a, b, ((L & Step) == 0 ? L : W + L - Step)...);
  const V high = __builtin_shufflevector(a, b, ((L & Step) == 0 ? L + Step : W + L)...);
  a = low;
  b = high;
}

template <int Step, class T>
CK_FOLD void transpose_steps(Vec<T>* rows) {
  constexpr int W = kLanes<T>;
  if constexpr (Step < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if ((i & Step) == 0)
        swap_blocks<Step>(rows[i], rows[i + Step], std::make_index_sequence<W>{});
    transpose_steps<Step * 2, T>(rows);
  }
}

}  // namespace CK_ISA
}  // namespace ck
