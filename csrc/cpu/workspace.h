// Logits that a forward sweep leaves to its backward: those of as many rows as fit into a workspace
// of limited size, which all calls of a process share. What does not fit is made again.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "buffer.h"

namespace ck {

// Those of all rows with some blocks of `block` keys, spread evenly among the `blocks` that there
// are, so that no thread has more than others. kRowPadding rows lie after the others, in each of
// them the keys that are kept; products write there and folds read it.
struct KeptLogits {
  void* memory = nullptr;  // null: none
  int64_t rows = 0;        // padded
  int64_t keys = 0, block = 1, blocks = 0, kept = 0;
  bool half = false;  // of a symmetric matrix, of which `threads` threads walk half
  int64_t threads = 0;

  int64_t stride() const { return kept * block; }
  // the place of the keys from `begin` to `end` among those that are kept, or -1
  int64_t place(int64_t begin, int64_t end) const {
    if (kept == blocks) return kept > 0 ? begin : -1;
    if (begin % block != 0 || end != std::min(begin + block, keys)) return -1;
    const int64_t index = begin / block, slot = index * kept / blocks;
    return (index + 1) * kept / blocks > slot ? slot * block : -1;
  }
};

// Logits together with a copy of values that stands for them: whoever has the values, where they
// lie, finds the logits. Both go back when it ends.
class Keeper {
 public:
  Keeper(const KeptLogits& logits, Buffer<char> memory)
      : logits_(logits), memory_(std::move(memory)) {}
  Keeper(const Keeper&) = delete;
  ~Keeper();

  const KeptLogits& logits() const { return logits_; }
  Buffer<char>& values() { return values_; }
  void stand_for(const void* values, int64_t bytes);

 private:
  KeptLogits logits_;
  Buffer<char> memory_, values_;
};

// Takes memory for logits of `size` bytes, as far as there is room, of half a matrix for all or
// none; null: there is none.
std::unique_ptr<Keeper> take_logits(int64_t rows, int64_t keys, int64_t block, int64_t size,
                                    bool half);

// What the values that lie there stand for: nothing if they are a copy.
KeptLogits find_logits(const void* values);

int64_t workspace_limit();
void set_workspace_limit(int64_t bytes);
// bytes that wait now
int64_t workspace_used();

}  // namespace ck
