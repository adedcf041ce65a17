// The products of the tokens of queries with those of documents, tile by tile.
#pragma once

#include "max_sim.h"
#include "schedule.h"

namespace ck {

template <class T>
class TokenPairs {
 public:
  // queries: of `arguments`; there are some
  TokenPairs(const MaxSimArguments<T>& arguments, const KeptTokens& queries)
      : a_(arguments), dropped_(ids_of(arguments, queries.rows())) {
    if (queries.rows() == 0 || a_.documents.tokens.rows == 0) return;
    PairArguments<T> pairs;
    pairs.x = queries.matrix();
    pairs.y = a_.documents.tokens;
    pairs.scale = a_.smooth() ? 1 / a_.temperature : T{1};
    pairs.normalize = a_.normalize;
    if (!dropped_.empty()) {
      pairs.exclude.rows = {dropped_.data(), true};
      pairs.exclude.keys = {dropped_.data() + queries.rows(), true};
    }
    problem_.emplace(pairs);
  }

  const Problem<T>& problem() const { return *problem_; }

  // push(keys) after each tile of the worker's rows with tokens of a document
  template <class Push>
  void for_tiles(Worker<T>& worker, int64_t document, Push push) const {
    for_blocks(a_.documents.kept_range(document), problem_->block_keys, [&](Range keys) {
      worker.make_tile(keys);
      push(keys);
    });
  }

 private:
  // 1 for every row, and for each token of a document that does not count
  static Buffer<int32_t> ids_of(const MaxSimArguments<T>& a, int64_t rows) {
    if (a.documents.kept == nullptr) return {};
    Buffer<int32_t> ids(rows + a.documents.tokens.rows, 1);
    for (int64_t j = 0; j < a.documents.tokens.rows; ++j) ids[rows + j] = !a.documents.kept[j];
    return ids;
  }

  const MaxSimArguments<T>& a_;
  Buffer<int32_t> dropped_;
  std::optional<Problem<T>> problem_;
};

}  // namespace ck
