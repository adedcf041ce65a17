// Forward sweeps: statistics of rows and columns.
#include "forward.h"

#include <cmath>

#include "row_block.h"
#include "schedule.h"
#include "sums.h"

namespace ck {
namespace {

// The same as `to` for some of its rows, in memory of its own.
template <class T>
struct Subset {
  Subset(const std::vector<int64_t>& which, int64_t d, const Statistics<T>& to)
      : which(which), to(to) {
    const int64_t size = static_cast<int64_t>(which.size());
    const auto take = [&](T* Statistics<T>::* field, int64_t each) {
      if (to.*field == nullptr) return;
      memory.emplace_back(size * each);
      own.*field = memory.back().data();
    };
    for (auto field : kNumbers) take(field, 1);
    take(&Statistics<T>::attended, d);
  }

  void put_back(int64_t d) {
    for (size_t i = 0; i < which.size(); ++i) {
      for (auto field : kNumbers)
        if (to.*field != nullptr) (to.*field)[which[i]] = (own.*field)[i];
      if (to.attended != nullptr) std::copy_n(own.attended + i * d, d, to.attended + which[i] * d);
    }
  }

  static constexpr T* Statistics<T>::* kNumbers[] = {
      &Statistics<T>::lse, &Statistics<T>::low, &Statistics<T>::mean, &Statistics<T>::mean_low};
  const std::vector<int64_t>& which;
  const Statistics<T>& to;
  Statistics<T> own;
  std::vector<Buffer<T>> memory;
};

template <class T>
class ForwardSweep {
 public:
  ForwardSweep(const PairArguments<T>& arguments, const ForwardOptions<T>& options)
      : arguments_(arguments), options_(options), p_(arguments) {}

  std::unique_ptr<Keeper> run() {
    const FixedShift fixed = fixed_shift(p_);
    const bool softplus = options_.fold == Fold::kSoftplus;
    const bool one_shift = !softplus && fixed.promising;
    const bool two_ways = options_.columns.lse != nullptr || (p_.symmetric && !softplus);
    if (two_ways && options_.rows.attended == nullptr) {
      if (!one_shift && p_.symmetric) {
        both_by_factor();
      } else {
        keep(p_.symmetric);
        one_shift ? both(fixed) : both_by_maxima();
      }
    } else {
      keep(false);
      Sums sums(0, kRank);
      rows(one_shift ? std::optional(fixed.shift) : std::nullopt, sums);
      if (one_shift) redo(sums, fixed.smallest, false);
    }
    if (keeper_) keeper_->stand_for(options_.rows.low, p_.x.rows() * sizeof(T));
    return std::move(keeper_);
  }

 private:
  int row_fields() const { return options_.threshold != nullptr ? kFields : kRank; }

  // From now on logits are kept, as far as there is room.
  void keep(bool half) {
    constexpr int64_t kSmallest = 1 << 15;  // pairs whose product costs more than the memory does
    if (!options_.keep || p_.paired) return;
    if (p_.x.rows() * p_.keys < kSmallest) return;
    if (p_.x.d() <= p_.few_features()) return;
    keeper_ = take_logits(p_.x.rows(), p_.keys, p_.block_keys, sizeof(T), half);
    if (!keeper_) return;
    p_.kept = keeper_->logits();
    p_.keeps = true;
  }

  // Rows and columns in one sweep. Of a symmetric matrix the columns are rows: half the tiles.
  void both(const FixedShift& fixed) {
    Sums rows(p_.x.rows(), row_fields());
    if (p_.symmetric) {
      rows_and_keys(rows, rows, fixed.shift);
    } else {
      Sums keys(p_.keys, kRank);
      rows_and_keys(rows, keys, fixed.shift);
      std::fill_n(keys.of(kShift), keys.size(), static_cast<T>(fixed.shift));
      set(keys, options_.columns);
      redo(keys, fixed.smallest, true);
    }
    set_rows(rows);
    redo(rows, fixed.smallest, false);
  }

  // The same for logits of any size: one sweep finds the largest of each row and key, a second one
  // sums. Logits are those of the backward sweep, bit by bit: with sides exchanged they would be
  // rounded otherwise, and exp(z - lse) be off by as much as logits are.
  void both_by_maxima() {
    const T lowest = -static_cast<T>(kInfinity);
    Buffer<T> row_max(p_.x.rows(), lowest), key_max(p_.symmetric ? 0 : p_.keys, lowest);
    const Shifts<T> shifts{row_max.data(), p_.symmetric ? row_max.data() : key_max.data()};
    find_maxima(row_max.data(), p_.symmetric ? row_max.data() : key_max.data());
    for (Buffer<T>* largest : {&row_max, &key_max})  // 0 where there is no pair
      std::replace(largest->data(), largest->data() + largest->size(), lowest, T{0});
    Sums rows(p_.x.rows(), row_fields());
    if (p_.symmetric) {
      rows_and_keys(rows, rows, {}, shifts);
    } else {
      Sums keys(p_.keys, kRank);
      rows_and_keys(rows, keys, {}, shifts);
      std::copy_n(shifts.keys, keys.size(), keys.of(kShift));
      set(keys, options_.columns);
    }
    set_rows(rows);
  }

  void both_by_factor() {
    const Buffer<T> factor = symmetric_factor(p_);
    ForwardSweep(with_factor(p_, arguments_, factor), options_).both_by_maxima();
  }

  void find_maxima(T* of_rows, T* of_keys) {
    const int64_t size = p_.x.rows();
    const auto parts = few_rows(sizeof(T));
    Buffer<T> largest_of_rows(parts.size() * size, -static_cast<T>(kInfinity));
    Workers<T> workers(p_);
    const auto visit = [&](Worker<T>& w, Range row_part, Range key_part, int64_t index) {
      enum Lanes { kMaxLanes, kValidLanes };
      const T* valid = nullptr;
      const auto push = [&](bool mirrored) {
        T* largest = w.lane_buffer(kMaxLanes);
        p_.kernels.row_max(w.tile(), largest);
        T* out = w.rows().begin + (parts.empty() ? of_rows : largest_of_rows.data() + index * size);
        for (int64_t i = 0; i < w.rows().size(); ++i) out[i] = std::max(out[i], largest[i]);
        if (mirrored || !p_.symmetric)
          p_.kernels.raise_key_max(w.tile(), valid, of_keys + w.keys().begin);
      };
      for_tiles(
          p_, w, row_part, key_part, p_.symmetric,
          [&](Range) { valid = w.valid_lanes(kValidLanes); }, push, [](Range) {});
    };
    visit_pairs(workers, parts, visit);
    for (int64_t i = 0; i < largest_of_rows.size(); ++i)
      of_rows[i % size] = std::max(of_rows[i % size], largest_of_rows[i]);
  }

  // Rows only; without a shift, for logits of any size.
  void rows(std::optional<double> shift, Sums& sums) {
    const auto parts = key_parts(p_);
    const int64_t count = static_cast<int64_t>(parts.size()), size = p_.x.rows() * p_.x.d();
    sums = Sums(p_.x.rows(), row_fields(), count);
    Buffer<T> memory;  // of more than one part
    T* attended = options_.rows.attended;
    if (attended != nullptr) {
      if (count > 1) memory = Buffer<T>(count * size);
      if (count > 1) attended = memory.data();
      clear(attended, count * size);
    }
    sweep_rows(sums, parts, attended, shift);
    const Buffer<double> factors = sums.merge();
    if (attended != nullptr) {
      divide(attended, factors, sums);
      if (count > 1) add_up(attended, count, size, options_.rows.attended);
    }
    set_rows(sums);
  }

  // the sums of weighted keys of each part (parts, rows, D) by those of the weights of all
  void divide(T* attended, const Buffer<double>& factors, Sums& sums) {
    const int64_t rows = p_.x.rows(), d = p_.x.d(), grain = divide_up(kSerialWork, d);
    parallel_for(0, factors.size(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const double sum = sums.of(kSum)[i % rows];
        const T weight = sum == 0 ? T{0} : static_cast<T>(factors[i] / sum);
        for (int64_t k = 0; k < d; ++k) attended[i * d + k] *= weight;
      }
    });
  }

  void rows_and_keys(Sums& rows, Sums& keys, std::optional<double> shift,
                     const Shifts<T>& shifts = {}) {
    const auto parts = few_rows(kFields * sizeof(double));
    if (!parts.empty()) rows = Sums(rows.size(), rows.fields(), parts.size());
    Workers<T> workers(p_);
    const auto visit = [&](Worker<T>& w, Range row_part, Range key_part, int64_t index) {
      RowBlock<T> block(p_, w, options_.fold, shift, options_.threshold, options_.partner, shifts);
      for_tiles(
          p_, w, row_part, key_part, p_.symmetric, [&](Range) { block.start(); },
          [&](bool mirrored) {
            block.push(p_.symmetric && !mirrored ? nullptr : &keys, mirrored, nullptr);
          },
          [&](Range) { block.finish(rows, index); });
    };
    visit_pairs(workers, parts, visit);
    rows.merge();
  }

  std::vector<Range> few_rows(int64_t row_bytes) const {
    if (p_.symmetric) return {};
    return parts_of_few_rows(p_, {0, p_.x.rows()}, {0, p_.keys}, row_bytes);
  }

  // visit(worker, rows, keys, index of the sums that the rows have there)
  template <class Visit>
  void visit_pairs(Workers<T>& workers, const std::vector<Range>& parts, Visit visit) {
    const auto first = [&](Worker<T>& w, Range rows, Range keys) { visit(w, rows, keys, 0); };
    if (p_.symmetric)
      for_half_pairs(p_, workers, first);
    else if (parts.empty())
      for_all_pairs(p_, workers, {0, p_.x.rows()}, {0, p_.keys}, first);
    else
      for_key_parts(workers, parts, [&](Worker<T>& w, Range keys, int64_t index) {
        visit(w, Range{0, p_.x.rows()}, keys, index);
      });
  }

  void sweep_rows(Sums& rows, const std::vector<Range>& parts, T* attended,
                  std::optional<double> shift) {
    Workers<T> workers(p_);
    for_row_blocks(
        p_, workers, {0, p_.x.rows()}, parts, [&](Worker<T>& w, Range row_range, int64_t part) {
          RowBlock<T> block(p_, w, options_.fold, shift, options_.threshold, options_.partner);
          T* out = nullptr;
          if (attended != nullptr)
            out = attended + (part * p_.x.rows() + row_range.begin) * p_.x.d();
          for_tiles(
              p_, w, row_range, parts[part], false, [&](Range) { block.start(); },
              [&](bool) { block.push(nullptr, false, out); },
              [&](Range) { block.finish(rows, part); });
        });
  }

  // statistics from their sums
  void set(Sums& sums, const Statistics<T>& to) const {
    for (int64_t i = 0; i < sums.size(); ++i) {
      const double sum = sums.of(kSum)[i], shift = sums.of(kShift)[i];
      if (options_.fold == Fold::kSoftplus) {
        put(0, sum, to.lse[i], to.low[i]);
        continue;
      }
      const bool empty = sum == 0;
      put(empty ? 0 : shift, std::log(sum), to.lse[i], to.low[i]);
      if (to.mean == nullptr) continue;
      const SoftmaxState<double> state{sum, sums.of(kWeighted)[i]};
      const double above = empty ? 0 : SoftmaxFold<true>::mean(state);
      put(empty ? 0 : shift, above, to.mean[i], to.mean_low[i]);
    }
  }

  void set_rows(Sums& sums) const {
    set(sums, options_.rows);
    if (options_.threshold == nullptr) return;
    std::copy_n(sums.of(kRank), sums.size(), options_.rank);
    std::copy_n(sums.of(kTotal), sums.size(), options_.total);
    std::copy_n(sums.of(kCount), sums.size(), options_.count);
  }

  // Does the rows (or keys) again whose sum is too small to be trusted under the fixed shift.
  void redo(Sums& sums, double smallest, bool of_keys) {
    std::vector<int64_t> which;
    for (int64_t i = 0; i < sums.size(); ++i)
      if (sums.of(kSum)[i] < smallest) which.push_back(i);
    if (which.empty()) return;
    const Statistics<T>& to = of_keys ? options_.columns : options_.rows;
    if (static_cast<int64_t>(which.size()) == sums.size()) return online(nullptr, of_keys, to);
    Subset<T> subset(which, p_.x.d(), to);
    online(&which, of_keys, subset.own);
    subset.put_back(p_.x.d());
  }

  // Statistics of some rows, null: of all, or of keys, with both sides swapped.
  void online(const std::vector<int64_t>* which, bool of_keys, const Statistics<T>& to) {
    PairArguments<T> a = arguments_;
    if (!a.y.given()) a.y = a.x;
    a.y_more = a.x_more;
    if (of_keys) {
      std::swap(a.x, a.y);
      for (IdPair* ids : {&a.exclude, &a.keep}) std::swap(ids->rows, ids->keys);
      a.bias = nullptr;
    }
    Buffer<char> rows, keys;
    Buffer<int64_t> exclude, keep;
    if (which != nullptr) {
      a.x = gather(a.x, a.x_more, *which, 1, rows);
      a.x_more = {};
      if (p_.paired) a.y = gather(a.y, {}, *which, p_.keys, keys);
      a.exclude.rows = select(a.exclude.rows, *which, exclude);
      a.keep.rows = select(a.keep.rows, *which, keep);
    }
    ForwardSweep sweep(a, {.fold = options_.fold, .rows = to});
    Sums sums(0, kRank);
    sweep.rows(std::nullopt, sums);
    if (!of_keys || arguments_.bias == nullptr) return;
    for (int64_t i = 0; i < sums.size(); ++i) {  // a key's bias is the same for all its logits
      const double shift = arguments_.bias[which != nullptr ? (*which)[i] : i];
      if (to.lse[i] == -static_cast<T>(kInfinity)) continue;
      put(to.lse[i], to.low[i] + shift, to.lse[i], to.low[i]);
      if (to.mean != nullptr) put(to.mean[i], to.mean_low[i] + shift, to.mean[i], to.mean_low[i]);
    }
  }

  static IdVector select(const IdVector& ids, const std::vector<int64_t>& which,
                         Buffer<int64_t>& memory) {
    if (ids.data == nullptr) return ids;
    memory = Buffer<int64_t>(which.size());
    std::transform(which.begin(), which.end(), memory.data(), [&](int64_t i) { return ids[i]; });
    return {memory.data(), false};
  }

  const PairArguments<T> arguments_;
  const ForwardOptions<T> options_;
  Problem<T> p_;
  std::unique_ptr<Keeper> keeper_;
};

}  // namespace

template <class T>
std::unique_ptr<Keeper> forward_sweep(const PairArguments<T>& arguments,
                                      const ForwardOptions<T>& options) {
  return ForwardSweep<T>(arguments, options).run();
}

template std::unique_ptr<Keeper> forward_sweep(const PairArguments<float>&,
                                               const ForwardOptions<float>&);
template std::unique_ptr<Keeper> forward_sweep(const PairArguments<double>&,
                                               const ForwardOptions<double>&);

}  // namespace ck
