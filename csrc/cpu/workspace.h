// Logits that a forward sweep leaves to its backward: those of as many rows as fit into a workspace
// of limited size, which all calls of a process share. What does not fit is made again.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

#include "workspace_limit.h"

namespace ck {

// Those of all rows with some blocks of `block` keys, spread evenly among the `blocks` that there
// are, so that no thread has more than others. kRowPadding rows lie after the others, in each of
// them the keys that are kept.
struct KeptLogits {
  at::Tensor memory;  // undefined: none
  int64_t keys = 0, block = 1, blocks = 0, kept = 0;
  bool half = false;  // of a symmetric matrix, of which `threads` threads walk half
  int threads = 0;

  int64_t stride() const { return kept * block; }
  // the place of the keys from `begin` to `end` among those that are kept, or -1
  int64_t place(int64_t begin, int64_t end) const {
    if (kept == blocks) return kept > 0 ? begin : -1;
    if (begin % block != 0 || end != std::min(begin + block, keys)) return -1;
    const int64_t index = begin / block, slot = index * kept / blocks;
    return (index + 1) * kept / blocks > slot ? slot * block : -1;
  }
};

// Takes memory for logits, as far as there is room, of half a matrix for all or none; it goes back
// with its tensor.
KeptLogits take_logits(int64_t rows, int64_t keys, int64_t block, at::ScalarType type, bool half);

// A copy of `values` that holds them.
at::Tensor tie_logits(const at::Tensor& values, const KeptLogits& kept);

// What `values` holds: nothing if it is another tensor, as a copy is.
KeptLogits find_logits(const at::Tensor& values);

}  // namespace ck
