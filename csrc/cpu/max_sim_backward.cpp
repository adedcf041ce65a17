// Gradients of the tokens: those of winners are gathered, those of a smooth maximum are products
// with logits that are made again.
#include "max_sim_pairs.h"
#include "sums.h"

namespace ck {
namespace {

template <class T>
class MaxSimBackward {
 public:
  MaxSimBackward(const MaxSimArguments<T>& arguments, const MaxSimState<T>& state, const T* grad,
                 void* dx, void* dy)
      : a_(arguments),
        state_(state),
        grad_(grad),
        dx_(dx),
        dy_(dy),
        x_(a_.queries),
        x_features_(x_.matrix(), a_.normalize),
        y_features_(a_.documents.tokens, a_.normalize) {}

  void run() {
    if (a_.smooth()) return smooth();
    if (dx_ != nullptr) gather_documents();
    if (dy_ != nullptr) gather_queries();
  }

 private:
  // The gradient of a score, where row and slot meet.
  T upstream(int64_t row, int64_t slot) const { return grad_[x_.set_of(row) * a_.slots() + slot]; }
  int64_t d() const { return x_features_.d(); }
  // the rows of the queries that meet a document, and in which slot they do
  Range rows_of(int64_t document) const {
    return a_.own > 0 ? x_.of(document / a_.own) : Range{0, x_.rows()};
  }
  int64_t slot_of(int64_t document) const { return a_.own > 0 ? document % a_.own : document; }

  // use(the token that won for a row in a slot, the gradient of their product), if it is one of
  // `among`
  template <class Use>
  void with_winner(int64_t row, int64_t slot, Range among, Use use) const {
    const int64_t winner = state_.winners[slot * a_.queries.tokens.rows + x_.token(row)];
    const T g = upstream(row, slot);
    if (g == 0 || winner < among.begin || winner >= among.end) return;
    use(winner, g * x_features_.inverse()[row] * y_features_.inverse()[winner]);
  }

  // Of blocks of the queries' tokens: the documents' winners.
  void gather_documents() {
    const Range all{0, y_features_.rows()};
    const int64_t blocks = divide_up(x_.rows(), kBlock);
    const int64_t grain = divide_up(kSerialWork, kBlock * a_.slots() * d());
    parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      Buffer<T> sums(kBlock * d()), copy(d());
      for (int64_t block = begin; block < end; ++block) {
        const Range rows{block * kBlock, std::min(x_.rows(), (block + 1) * kBlock)};
        std::fill_n(sums.data(), sums.size(), T{0});
        for (int64_t slot = 0; slot < a_.slots(); ++slot)
          for (int64_t row = rows.begin; row < rows.end; ++row)
            with_winner(row, slot, all, [&](int64_t winner, T weight) {
              int64_t stride;
              const T* key = y_features_.read({winner, winner + 1}, copy.data(), &stride);
              kernels_.add_scaled(weight, key, d(), sums.data() + (row - rows.begin) * d());
            });
        for (int64_t row = rows.begin; row < rows.end; ++row)
          finish_query(row, sums.data() + (row - rows.begin) * d(), copy.data());
      }
    });
  }

  // Of each document: the tokens of queries whose winners are there.
  void gather_queries() {
    parallel_for(0, a_.documents.sets, 1, [&](int64_t begin, int64_t end) {
      Buffer<T> sums(kTokens * d()), copy(d());
      for (int64_t document = begin; document < end; ++document) {
        const Range rows = rows_of(document);
        for_blocks(a_.documents.of(document), kTokens, [&](Range part) {
          std::fill_n(sums.data(), part.size() * d(), T{0});
          for (int64_t row = rows.begin; row < rows.end; ++row)
            with_winner(row, slot_of(document), part, [&](int64_t winner, T weight) {
              int64_t stride;
              const T* own = x_features_.read({row, row + 1}, copy.data(), &stride);
              kernels_.add_scaled(weight, own, d(), sums.data() + (winner - part.begin) * d());
            });
          finish_document(part, sums.data(), copy.data());
        });
      }
    });
  }

  // A document is whole when all rows have met it; for the rows each part of the documents has
  // sums of its own, which are then added in their order.
  void smooth() {
    const TokenPairs<T> pairs(a_, x_);
    const int64_t size = x_.rows() * d(), slots = a_.slots();
    const int64_t most = std::max<int64_t>(1, kSumElements / std::max<int64_t>(1, size));
    const auto parts = cut(a_.documents.sets, std::min(most, num_threads()), 1);
    const int64_t count = static_cast<int64_t>(parts.size());
    Buffer<T> sums(dx_ == nullptr ? 0 : count * size, T{0});
    std::optional<Workers<T>> workers;
    if (x_.rows() > 0 && y_features_.rows() > 0) workers.emplace(pairs.problem());
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> to_tokens;
      Buffer<T> copy(d());
      for (int64_t part = begin; part < end; ++part)
        for (int64_t j = parts[part].begin; j < parts[part].end; ++j) {
          const Range tokens = a_.documents.of(j);
          to_tokens.assign(tokens.size() * d(), T{0});
          if (workers)
            meet(pairs, workers->mine(), j, dx_ == nullptr ? nullptr : sums.data() + part * size,
                 to_tokens.data());
          if (dy_ != nullptr) finish_document(tokens, to_tokens.data(), copy.data());
        }
    });
    if (dx_ == nullptr || slots == 0) return;
    Buffer<T> total(size);
    add_up(sums.data(), count, size, total.data());
    parallel_for(0, x_.rows(), divide_up(kSerialWork, d()), [&](int64_t begin, int64_t end) {
      Buffer<T> copy(d());
      for (int64_t row = begin; row < end; ++row)
        finish_query(row, total.data() + row * d(), copy.data());
    });
  }

  enum Lanes { kLseLanes, kGradLanes, kScaleLanes, kValidLanes };

  // All rows that meet a document: adds dL/dz times the others' features.
  void meet(const TokenPairs<T>& pairs, Worker<T>& worker, int64_t document, T* to_rows,
            T* to_tokens) {
    const Problem<T>& problem = pairs.problem();
    const int64_t slot = slot_of(document), first = a_.documents.of(document).begin;
    for_blocks(rows_of(document), problem.block_rows, [&](Range rows) {
      worker.take_rows(rows);
      T *lse = worker.lane_buffer(kLseLanes), *grad = worker.lane_buffer(kGradLanes);
      const T infinity = static_cast<T>(kInfinity);
      std::fill_n(lse, worker.padded_rows(), infinity);
      std::fill_n(grad, worker.padded_rows(), T{0});
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const T found = state_.lse[slot * a_.queries.tokens.rows + x_.token(row)];
        if (found == -infinity) continue;
        lse[row - rows.begin] = found;
        grad[row - rows.begin] = upstream(row, slot);
      }
      BackwardTile<T> tile{};
      tile.row = {lse, nullptr, grad, nullptr};
      tile.row_scale = worker.lanes(kScaleLanes, problem.x.inverse(), 0);
      tile.row_valid = worker.valid_lanes(kValidLanes);
      pairs.for_tiles(worker, document, [&](Range keys) {
        problem.kernels.backward(worker.tile(), Fold::kLse, tile);
        if (to_rows != nullptr) worker.add_to_rows(to_rows + rows.begin * d(), true);
        if (dy_ != nullptr) worker.add_to_keys(to_tokens + (keys.begin - first) * d());
      });
    });
  }

  // the sum of a row less what lies along its features, where they are normalised
  void finish(const Features<T>& features, Range row, T* sum, T* copy) const {
    if (!a_.normalize) return;
    int64_t stride;
    const T* own = features.read(row, copy, &stride);
    kernels_.project(sum, own, features.inverse()[row.begin], true, T{1}, d(), sum);
  }

  void finish_document(Range tokens, T* sums, T* copy) const {
    const bool* kept = a_.documents.kept;
    for (int64_t j = tokens.begin; j < tokens.end; ++j) {
      T* const sum = sums + (j - tokens.begin) * d();
      // what does not count may be NaN
      if (kept == nullptr || kept[j]) finish(y_features_, {j, j + 1}, sum, copy);
      write(sum, a_.documents.tokens.dtype, dy_, j);
    }
  }

  void finish_query(int64_t row, T* sum, T* copy) const {
    finish(x_features_, {row, row + 1}, sum, copy);
    write(sum, a_.queries.tokens.dtype, dx_, x_.token(row));
  }

  void write(const T* row, Dtype dtype, void* out, int64_t at) const {
    kernels_.write(row, d(), dtype, static_cast<char*>(out) + at * d() * size_of(dtype));
  }

  static constexpr int64_t kBlock = 32, kTokens = 512;  // tokens whose sums a thread holds
  static constexpr int64_t kSumElements = 1 << 22;      // of all parts

  const MaxSimArguments<T>& a_;
  const MaxSimState<T>& state_;
  const T* grad_;
  void *dx_, *dy_;
  const TileKernels<T>& kernels_ = tile_kernels<T>();
  KeptTokens x_;
  Features<T> x_features_, y_features_;
};

}  // namespace

template <class T>
void max_sim_backward(const MaxSimArguments<T>& arguments, const MaxSimState<T>& state,
                      const T* grad, void* dx, void* dy) {
  MaxSimBackward<T>(arguments, state, grad, dx, dy).run();
}

template void max_sim_backward(const MaxSimArguments<float>&, const MaxSimState<float>&,
                               const float*, void*, void*);
template void max_sim_backward(const MaxSimArguments<double>&, const MaxSimState<double>&,
                               const double*, void*, void*);

}  // namespace ck
