// Sets of tokens: of each query, or of each document, some rows of one matrix.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "feature_rows.h"

namespace ck {

// The tokens of a set end before row ends[set], where those of the next one begin.
struct TokenSets {
  Matrix tokens;
  const int64_t* ends;
  int64_t sets;
  const bool* kept = nullptr;  // of each token whether it counts; null: all do

  Range of(int64_t set) const { return {set > 0 ? ends[set - 1] : 0, ends[set]}; }
  // whether some do not count
  bool drops_of(int64_t set) const {
    const Range range = of(set);
    return kept != nullptr && !std::all_of(kept + range.begin, kept + range.end, std::identity{});
  }
  // from the first to the last that counts
  Range kept_range(int64_t set) const {
    Range range = of(set);
    if (kept == nullptr) return range;
    while (range.begin < range.end && !kept[range.begin]) ++range.begin;
    while (range.begin < range.end && !kept[range.end - 1]) --range.end;
    return range;
  }
};

// The tokens that count, one after the other: a copy where some do not.
class KeptTokens {
 public:
  explicit KeptTokens(const TokenSets& sets)
      : matrix_(sets.tokens), ends_(sets.ends, sets.ends + sets.sets) {
    if (sets.kept != nullptr) {
      for (int64_t set = 0; set < sets.sets; ++set) {
        for (int64_t i = sets.of(set).begin; i < sets.of(set).end; ++i)
          if (sets.kept[i]) tokens_.push_back(i);
        ends_[set] = static_cast<int64_t>(tokens_.size());
      }
      matrix_ = gather(sets.tokens, {}, tokens_, 1, memory_);
      copied_ = true;
    }
    for (int64_t set = 0; set < sets.sets; ++set)
      owners_.insert(owners_.end(), of(set).size(), set);
  }

  const Matrix& matrix() const { return matrix_; }
  int64_t rows() const { return static_cast<int64_t>(owners_.size()); }
  Range of(int64_t set) const { return {set > 0 ? ends_[set - 1] : 0, ends_[set]}; }
  Range of(Range sets) const { return {of(sets.begin).begin, of(sets.end - 1).end}; }
  int64_t set_of(int64_t row) const { return owners_[row]; }
  // which of all tokens a row is
  int64_t token(int64_t row) const { return copied_ ? tokens_[row] : row; }

 private:
  Matrix matrix_;
  std::vector<int64_t> ends_, tokens_, owners_;
  Buffer<char> memory_;
  bool copied_ = false;
};

}  // namespace ck
