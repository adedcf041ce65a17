// Forward sweeps at several prefixes of the features.
#include <cmath>

#include "nested.h"
#include "nested_problem.h"
#include "row_block.h"
#include "sums.h"

namespace ck {
namespace {

template <class T>
class NestedForward {
 public:
  NestedForward(const PairArguments<T>& arguments, const std::vector<int64_t>& ends,
                const ForwardOptions<T>& options)
      : options_(options),
        p_(arguments, ends),
        columns_(options.columns.lse != nullptr),
        rows_(0, kRank),
        keys_(0, kRank) {}

  std::unique_ptr<Keeper> run() {
    const bool softplus = options_.fold == Fold::kSoftplus;
    const FixedShift fixed = fixed_shift(p_, p_.logit_scale);
    keep();
    bool trusted = false;
    if (softplus || fixed.promising) {
      const T shift = softplus ? T{0} : static_cast<T>(fixed.shift);
      const Buffer<T> of_rows(p_.count() * p_.x.rows(), shift);
      sweep({of_rows.data(), nullptr});  // one shift for a row and a key
      std::fill_n(keys_.of(kShift), keys_.size(), shift);
      trusted = softplus || (above(rows_, fixed.smallest) && above(keys_, fixed.smallest));
    }
    if (!trusted) by_maxima();
    set(rows_, options_.rows);
    if (columns_) set(keys_, options_.columns);
    if (keeper_) keeper_->stand_for(options_.rows.low, rows_.size() * sizeof(T));
    return std::move(keeper_);
  }

 private:
  // Logits of the longest prefixes, one set after the other, as far as there is room.
  void keep() {
    constexpr int64_t kSmallest = 1 << 15;  // pairs whose product costs more than the memory does
    if (!options_.keep || p_.x.rows() * p_.keys < kSmallest) return;
    const int64_t padded = p_.padded_rows();
    const int64_t padded_keys = divide_up(p_.keys, p_.block_keys) * p_.block_keys;
    const double room = workspace_limit() - workspace_used();
    const int64_t sets = p_.best_kept(room / (padded * padded_keys * sizeof(T)));
    if (sets == 0) return;
    keeper_ = take_logits(sets * padded, p_.keys, p_.block_keys, sizeof(T), p_.symmetric);
    if (!keeper_) return;
    p_.kept = keeper_->logits();
    p_.keeps = true;
  }

  static bool above(Sums& sums, double smallest) {
    return std::all_of(sums.of(kSum), sums.of(kSum) + sums.size(),
                       [=](double sum) { return !(sum < smallest); });
  }

  // For logits of any size: one sweep finds the largest of each row and key, a second one sums.
  void by_maxima() {
    const T lowest = -static_cast<T>(kInfinity);
    Buffer<T> of_rows(p_.count() * p_.x.rows(), lowest);
    Buffer<T> of_keys(columns_ ? p_.count() * p_.keys : 0, lowest);
    T* const keys = p_.symmetric ? of_rows.data() : of_keys.data();
    visit_pairs([&](NestedWorker<T>& w, Range row_part, Range key_part) {
      enum Lanes { kMaxLanes, kValidLanes };
      const T* valid = nullptr;
      const auto push = [&](bool mirrored) {
        for (int64_t k = 0; k < p_.count(); ++k) {
          w.select(k);
          T* largest = w.lane_buffer(kMaxLanes);
          p_.kernels.row_max(w.tile(), largest);
          T* out = of_rows.data() + k * p_.x.rows() + w.rows().begin;
          for (int64_t i = 0; i < w.rows().size(); ++i) out[i] = std::max(out[i], largest[i]);
          if (p_.symmetric ? mirrored : columns_)
            p_.kernels.raise_key_max(w.tile(), valid, keys + k * p_.keys + w.keys().begin);
        }
      };
      for_tiles(
          p_, w, row_part, key_part, p_.symmetric,
          [&](Range) { valid = w.valid_lanes(kValidLanes); }, push, [](Range) {});
    });
    for (Buffer<T>* largest : {&of_rows, &of_keys})  // 0 where there is no pair
      std::replace(largest->data(), largest->data() + largest->size(), lowest, T{0});
    sweep({of_rows.data(), keys});
    if (columns_) std::copy_n(of_keys.data(), keys_.size(), keys_.of(kShift));
  }

  // The sums above these shifts, (prefixes, rows) and (prefixes, keys).
  void sweep(const Shifts<T>& shifts) {
    rows_ = Sums(p_.count() * p_.x.rows(), kRank);
    keys_ = Sums(columns_ ? p_.count() * p_.keys : 0, kRank);
    std::copy_n(shifts.rows, rows_.size(), rows_.of(kShift));
    visit_pairs([&](NestedWorker<T>& w, Range row_part, Range key_part) {
      Buffer<T> lanes(p_.count() * p_.block_rows);
      Buffer<double> sums(p_.count() * p_.block_rows);
      for_tiles(
          p_, w, row_part, key_part, p_.symmetric,
          [&](Range) {
            std::fill_n(sums.data(), sums.size(), 0.0);
            for (int64_t k = 0; k < p_.count(); ++k)
              w.put_lanes(shifts.rows, k, static_cast<T>(kInfinity), lanes.data());
          },
          [&](bool mirrored) { push(w, mirrored, shifts, lanes.data(), sums.data()); },
          [&](Range block) {
            for (int64_t k = 0; k < p_.count(); ++k)
              for (int64_t i = 0; i < block.size(); ++i)
                rows_.of(kSum)[k * p_.x.rows() + block.begin + i] += sums[k * p_.block_rows + i];
          });
    });
  }

  void push(NestedWorker<T>& w, bool mirrored, const Shifts<T>& shifts, const T* lanes,
            double* row_sums) {
    Sums& to_keys = p_.symmetric ? rows_ : keys_;
    for (int64_t k = 0; k < p_.count(); ++k) {
      w.select(k);
      if (options_.partner != nullptr) set_partners(w, mirrored, k);
      ForwardSums<T> sums{};
      const int64_t first_key = k * p_.keys + w.keys().begin;
      sums.shift = lanes + k * p_.block_rows;
      sums.row_sum = row_sums + k * p_.block_rows;
      if (p_.symmetric ? mirrored : columns_) {
        sums.key_sum = to_keys.of(kSum) + first_key;
        if (shifts.keys != nullptr) sums.key_shift = shifts.keys + first_key;
      }
      p_.kernels.forward(w.tile(), options_.fold, sums);
    }
  }

  void set_partners(NestedWorker<T>& w, bool mirrored, int64_t k) {
    T* out = options_.partner + k * p_.x.rows();
    w.for_partners([&](int64_t row, int64_t key, int64_t i, int64_t j) {
      out[row] = w.logit(i, j);
      if (mirrored) out[key] = out[row];
    });
  }

  template <class Visit>
  void visit_pairs(Visit visit) {
    NestedWorkers<T> workers(p_);
    if (p_.symmetric)
      for_half_pairs(p_, workers, visit);
    else
      for_all_pairs(p_, workers, {0, p_.x.rows()}, {0, p_.keys}, visit);
  }

  void set(Sums& sums, const Statistics<T>& to) const {
    const bool softplus = options_.fold == Fold::kSoftplus;
    for (int64_t i = 0; i < sums.size(); ++i) {
      const double sum = sums.of(kSum)[i], shift = sum == 0 ? 0 : sums.of(kShift)[i];
      put(softplus ? 0 : shift, softplus ? sum : std::log(sum), to.lse[i], to.low[i]);
    }
  }

  const ForwardOptions<T> options_;
  NestedProblem<T> p_;
  const bool columns_;  // of keys that are not the rows
  Sums rows_, keys_;
  std::unique_ptr<Keeper> keeper_;
};

}  // namespace

template <class T>
std::unique_ptr<Keeper> nested_forward(const PairArguments<T>& arguments,
                                       const std::vector<int64_t>& ends,
                                       const ForwardOptions<T>& options) {
  return NestedForward<T>(arguments, ends, options).run();
}

template std::unique_ptr<Keeper> nested_forward(const PairArguments<float>&,
                                                const std::vector<int64_t>&,
                                                const ForwardOptions<float>&);
template std::unique_ptr<Keeper> nested_forward(const PairArguments<double>&,
                                                const std::vector<int64_t>&,
                                                const ForwardOptions<double>&);

}  // namespace ck
