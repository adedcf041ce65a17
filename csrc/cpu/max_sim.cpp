#include "max_sim.h"

#include "max_sim_pairs.h"
#include "row_block.h"

namespace ck {
namespace {

template <class T>
class MaxSim {
 public:
  MaxSim(const MaxSimArguments<T>& arguments, const MaxSimState<T>& state, T* scores)
      : a_(arguments), state_(state), scores_(scores), x_(a_.queries), pairs_(a_, x_) {}

  void run() {
    std::fill_n(scores_, a_.queries.sets * a_.slots(), T{0});
    if (state_.winners != nullptr)
      std::fill_n(state_.winners, a_.slots() * a_.queries.tokens.rows, -1);
    if (x_.rows() == 0 || a_.slots() == 0) return;
    if (a_.documents.tokens.rows == 0) return without_tokens();
    const Problem<T>& problem = pairs_.problem();
    Workers<T> workers(problem);
    const auto groups = query_groups(problem.block_rows);
    const auto parts = cut(a_.slots(), num_threads(), 1);
    const int64_t count = static_cast<int64_t>(groups.size());
    const int64_t tasks = count * static_cast<int64_t>(parts.size());
    parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      Room room(problem.block_rows);
      for (int64_t task = begin; task < end; ++task)
        visit(workers.mine(), groups[task % count], parts[task / count], room);
    });
  }

 private:
  using Id = typename LaneId<T>::type;
  struct Room {
    explicit Room(int64_t rows) : largest(rows), which(rows) {}
    Buffer<T> largest;
    Buffer<Id> which;
  };

  void without_tokens() {
    for (int64_t row = 0; row < x_.rows(); ++row)
      std::fill_n(scores_ + x_.set_of(row) * a_.slots(), a_.slots(), -static_cast<T>(kInfinity));
    if (state_.lse != nullptr)
      std::fill_n(state_.lse, a_.slots() * a_.queries.tokens.rows, -static_cast<T>(kInfinity));
  }

  // Whole queries of at most `most` tokens together, or one; one each, if documents are their own.
  std::vector<Range> query_groups(int64_t most) const {
    std::vector<Range> groups;
    for (int64_t query = 0; query < a_.queries.sets; ++query) {
      const bool joins =
          !groups.empty() && a_.own == 0 && x_.of({groups.back().begin, query + 1}).size() <= most;
      if (joins)
        groups.back().end = query + 1;
      else
        groups.push_back({query, query + 1});
    }
    return groups;
  }

  void visit(Worker<T>& worker, Range queries, Range slots, Room& room) {
    for_blocks(x_.of(queries), pairs_.problem().block_rows, [&](Range rows) {
      worker.take_rows(rows);
      std::optional<RowBlock<T>> sums;
      if (a_.smooth())
        sums.emplace(pairs_.problem(), worker, Fold::kLse, std::nullopt, nullptr, nullptr);
      for (int64_t slot = slots.begin; slot < slots.end; ++slot) {
        const int64_t document = a_.document(queries.begin, slot);
        if (sums)
          add_smooth(worker, document, slot, *sums);
        else
          add_largest(worker, document, slot, room);
      }
    });
  }

  void add_largest(Worker<T>& worker, int64_t document, int64_t slot, Room& room) {
    T* largest = room.largest.data();
    Id* which = room.which.data();
    std::fill_n(largest, worker.padded_rows(), -static_cast<T>(kInfinity));
    std::fill_n(which, worker.padded_rows(), Id{-1});
    pairs_.for_tiles(worker, document, [&](Range keys) {
      pairs_.problem().kernels.raise_largest(worker.tile(), static_cast<Id>(keys.begin), largest,
                                             which);
    });
    const bool zero = a_.zeros && a_.documents.drops_of(document);
    add_scores(worker.rows(), slot, [&](int64_t i, int64_t token) {
      if (zero && largest[i] < 0) {
        largest[i] = 0;
        which[i] = -1;
      }
      if (state_.winners != nullptr)
        state_.winners[slot * a_.queries.tokens.rows + token] = static_cast<int32_t>(which[i]);
      return static_cast<double>(largest[i]);
    });
  }

  void add_smooth(Worker<T>& worker, int64_t document, int64_t slot, RowBlock<T>& sums) {
    sums.start();
    pairs_.for_tiles(worker, document, [&](Range) { sums.push(nullptr, false, nullptr); });
    add_scores(worker.rows(), slot, [&](int64_t i, int64_t token) {
      const double lse = sums.lse(i);
      if (state_.lse != nullptr)
        state_.lse[slot * a_.queries.tokens.rows + token] = static_cast<T>(lse);
      return a_.temperature * lse;
    });
  }

  // value(row of the block, token) of each row, summed for each query
  template <class Value>
  void add_scores(Range rows, int64_t slot, Value value) {
    for (int64_t row = rows.begin; row < rows.end;) {
      const int64_t query = x_.set_of(row), end = std::min(rows.end, x_.of(query).end);
      double sum = 0;
      for (; row < end; ++row) sum += value(row - rows.begin, x_.token(row));
      scores_[query * a_.slots() + slot] += static_cast<T>(sum);
    }
  }

  const MaxSimArguments<T>& a_;
  const MaxSimState<T>& state_;
  T* scores_;
  KeptTokens x_;
  TokenPairs<T> pairs_;
};

}  // namespace

template <class T>
void max_sim(const MaxSimArguments<T>& arguments, const MaxSimState<T>& state, T* scores) {
  MaxSim<T>(arguments, state, scores).run();
}

template void max_sim(const MaxSimArguments<float>&, const MaxSimState<float>&, float*);
template void max_sim(const MaxSimArguments<double>&, const MaxSimState<double>&, double*);

}  // namespace ck
