// Which thread takes which part of the matrix, so that no two threads ever write the same row or
// the same key, and the order of additions never depends on timing.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "problem.h"

namespace ck {

// Equal parts of a range, cut at multiples of `unit` from its begin.
inline std::vector<Range> cut(Range all, int64_t parts, int64_t unit) {
  const int64_t units = divide_up(all.size(), unit);
  parts = std::clamp<int64_t>(parts, 1, units);
  std::vector<Range> out;
  for (int64_t p = 0; p < parts; ++p)
    out.push_back({all.begin + units * p / parts * unit,
                   std::min(all.end, all.begin + units * (p + 1) / parts * unit)});
  return out;
}

inline std::vector<Range> cut(int64_t size, int64_t parts, int64_t unit) {
  return cut(Range{0, size}, parts, unit);
}

// One worker W for each thread, made of a problem P when the thread first needs it.
template <class T, class W = Worker<T>, class P = Problem<T>>
class Workers {
 public:
  explicit Workers(const P& problem) : problem_(problem), workers_(num_threads()) {}
  W& mine() {
    auto& worker = workers_[thread_num()];
    if (!worker) worker = std::make_unique<W>(problem_);
    return *worker;
  }

 private:
  const P& problem_;
  std::vector<std::unique_ptr<W>> workers_;
};

// visit(worker, rows, part) for every block of `all_rows` and every part of the keys; blocks are
// independent. The keys are cut only where there are fewer blocks than threads.
template <class T, class Visit>
void for_row_blocks(const Problem<T>& problem, Workers<T>& workers, Range all_rows,
                    const std::vector<Range>& key_parts, Visit visit) {
  const auto blocks =
      cut(all_rows, divide_up(all_rows.size(), problem.block_rows), problem.block_rows);
  const int64_t parts = static_cast<int64_t>(key_parts.size());
  parallel_for(0, static_cast<int64_t>(blocks.size()) * parts, 1, [&](int64_t b, int64_t e) {
    for (int64_t task = b; task < e; ++task)
      visit(workers.mine(), blocks[task / parts], task % parts);
  });
}

template <class T>
std::vector<Range> key_parts(const Problem<T>& problem) {
  const int64_t blocks = divide_up(problem.x.rows(), problem.block_rows);
  return cut(problem.keys, num_threads() / blocks, problem.block_keys);
}

// Parts of the keys for all rows at once, each with sums of its own for the rows: where there are
// too few rows for `for_all_pairs` to keep all threads busy; else there are none. The sums of a row
// take `row_bytes`.
template <class T>
std::vector<Range> parts_of_few_rows(const Problem<T>& problem, Range all_rows, Range all_keys,
                                     int64_t row_bytes) {
  constexpr int64_t kMost = 1 << 24;  // bytes of all sums
  const int64_t parts = std::min({num_threads(), divide_up(all_keys.size(), problem.block_keys),
                                  std::max<int64_t>(1, kMost / (all_rows.size() * row_bytes))});
  if (parts <= divide_up(all_rows.size(), kRowPadding)) return {};
  return cut(all_keys, parts, problem.block_keys);
}

// visit(worker, rows, keys) for every pair of parts of `all_rows` and `all_keys`: a Latin square,
// in whose every round each part of the rows meets another part of the keys.
template <class T, class W, class P, class Visit>
void for_all_pairs(const Problem<T>& problem, Workers<T, W, P>& workers, Range all_rows,
                   Range all_keys, Visit visit) {
  const int64_t threads = num_threads();
  const int64_t most = std::min(divide_up(all_rows.size(), kRowPadding),
                                divide_up(all_keys.size(), problem.block_keys));
  const int64_t parts = std::clamp<int64_t>(most, 1, threads);
  const auto rows = cut(all_rows, parts, kRowPadding);
  const auto keys = cut(all_keys, parts, problem.block_keys);
  for (int64_t round = 0; round < parts; ++round)
    parallel_for(0, parts, 1, [&](int64_t b, int64_t e) {
      for (int64_t p = b; p < e; ++p) visit(workers.mine(), rows[p], keys[(p + round) % parts]);
    });
}

// visit(worker, keys, index) for each part of the keys
template <class T, class Visit>
void for_key_parts(Workers<T>& workers, const std::vector<Range>& parts, Visit visit) {
  parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t b, int64_t e) {
    for (int64_t p = b; p < e; ++p) visit(workers.mine(), parts[p], p);
  });
}

// visit(worker, a, b) once for every unordered pair of parts of a symmetric matrix, a = b too: a
// round-robin tournament, in whose every round each part plays once.
template <class T, class W, class P, class Visit>
void for_half_pairs(const Problem<T>& problem, Workers<T, W, P>& workers, Visit visit) {
  const int64_t threads = num_threads();
  const int64_t size = problem.x.rows();
  auto parts = cut(size, threads == 1 ? 1 : 2 * threads, kRowPadding);
  const int64_t players = static_cast<int64_t>(parts.size());
  parallel_for(0, players, 1, [&](int64_t b, int64_t e) {
    for (int64_t p = b; p < e; ++p) visit(workers.mine(), parts[p], parts[p]);
  });
  const int64_t seats = players + players % 2;  // with an odd number one part rests
  for (int64_t round = 0; round < seats - 1; ++round)
    parallel_for(0, seats / 2, 1, [&](int64_t b, int64_t e) {
      for (int64_t match = b; match < e; ++match) {
        // the circle method: the last seat stays, the others move on by one each round
        const int64_t first = match == 0 ? seats - 1 : (round + match) % (seats - 1);
        const int64_t second = (round + seats - 1 - match) % (seats - 1);
        const auto [low, high] = std::minmax(first, second);
        if (high < players) visit(workers.mine(), parts[low], parts[high]);
      }
    });
}

// Walks the part rows x keys of the matrix tile by tile: start(rows) for each block of rows,
// push(mirrored) for each tile made, finish(rows) after a block. With `half`, for a symmetric
// matrix, a tile stands for its transpose too (mirrored); in a part on the diagonal tiles left of
// a block's own square are left out, and the square itself is not mirrored.
template <class T, class W, class Start, class Push, class Finish>
void for_tiles(const Problem<T>& problem, W& worker, Range rows, Range keys, bool half, Start start,
               Push push, Finish finish) {
  const bool diagonal = half && rows.begin == keys.begin;
  for_blocks(rows, problem.block_rows, [&](Range block) {
    worker.take_rows(block);
    start(block);
    const auto walk = [&](Range part, bool mirrored) {
      for_blocks(part, problem.block_keys, [&](Range tile_keys) {
        if (worker.make_tile(tile_keys)) push(mirrored);
      });
    };
    if (diagonal) {
      walk(block, false);
      walk({block.end, keys.end}, true);
    } else {
      walk(keys, half);
    }
    finish(block);
  });
}

}  // namespace ck
