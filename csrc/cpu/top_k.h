// The largest logits of each row, with their keys.
#pragma once

#include "problem.h"

namespace ck {

template <class T>
struct TopKOptions {
  int64_t k;
  const T* floor;    // (N,); only logits above it count. Null: all do
  const T* ceiling;  // (N,); only logits below it count, NaN besides. Null: all do
  T* values;         // (N, k), the largest first, NaN before all, of equals that of the first key;
  int64_t* ids;      // (N, k); -inf and -1 where there are fewer
};

// Shared keys, of which a logit of -inf counts as none.
template <class T>
void top_k(const PairArguments<T>& arguments, const TopKOptions<T>& options);

}  // namespace ck
