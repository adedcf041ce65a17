// The sums of a forward sweep that one block of rows gathers while tiles pass.
#pragma once

#include <cmath>
#include <optional>

#include "sums.h"

namespace ck {

// A shift for each row and each key, their largest logits; null: there is another one.
template <class T>
struct Shifts {
  const T* rows = nullptr;
  const T* keys = nullptr;
};

// The sums of one block of rows while tiles pass.
template <class T>
class RowBlock {
 public:
  // no shift: it follows the largest logit met so far
  RowBlock(const Problem<T>& problem, Worker<T>& worker, Fold fold, std::optional<double> shift,
           const T* threshold, T* partner, const Shifts<T>& shifts = {})
      : p_(problem),
        w_(worker),
        fold_(fold),
        fixed_(shift),
        threshold_(threshold),
        partner_(partner),
        shifts_(shifts) {
    sums_.resize(kFields * p_.block_rows);
  }

  void start() {
    std::fill(sums_.begin(), sums_.end(), 0.0);
    const T infinity = static_cast<T>(kInfinity);
    const int64_t real = w_.rows().size(), padded = w_.padded_rows();
    T* shift = w_.lane_buffer(kShiftLanes);
    std::fill_n(shift, real, fixed_ ? static_cast<T>(*fixed_) : -infinity);
    std::fill(shift + real, shift + padded, infinity);
    if (shifts_.rows != nullptr) w_.lanes(kShiftLanes, shifts_.rows, infinity);
    if (threshold_ != nullptr) {
      w_.lanes(kThresholdLanes, threshold_, infinity);
      w_.valid_lanes(kValidLanes);
    }
    first_ = true;
  }

  // Adds the worker's tile; to `keys` as well, and to `attended` (rows, D) the weighted keys. A
  // mirrored tile counts for its keys too.
  void push(Sums* keys, bool mirrored, T* attended) {
    if (partner_ != nullptr) set_partners(mirrored);
    if (threshold_ != nullptr) push_counts(mirrored ? keys : nullptr);
    ForwardSums<T> sums{};
    sums.shift = w_.lane_buffer(kShiftLanes);
    if (!fixed_ && shifts_.rows == nullptr && fold_ != Fold::kSoftplus)
      sums.shift = raise_shift(attended);
    if (shifts_.keys != nullptr) sums.key_shift = shifts_.keys + w_.keys().begin;
    sums.row_sum = sum(kSum);
    sums.row_weighted = sum(kWeighted);
    if (keys != nullptr) {
      sums.key_sum = keys->of(kSum) + w_.keys().begin;
      sums.key_weighted = keys->of(kWeighted) + w_.keys().begin;
    }
    sums.store = attended != nullptr;
    p_.kernels.forward(w_.tile(), fold_, sums);
    if (attended != nullptr) w_.add_to_rows(attended, !first_);
    first_ = false;
  }

  // the log-sum-exp of the block's row i so far
  double lse(int64_t i) {
    return std::log(sum(kSum)[i]) + static_cast<double>(w_.lane_buffer(kShiftLanes)[i]);
  }

  void finish(Sums& rows, int64_t part) {
    const int64_t begin = w_.rows().begin, real = w_.rows().size();
    const T* shift = w_.lane_buffer(kShiftLanes);
    for (int field = 0; field < rows.fields(); ++field) {
      double* out = rows.of(field, part) + begin;
      if (field == kShift)
        std::copy_n(shift, real, out);
      else
        for (int64_t i = 0; i < real; ++i) out[i] += sum(field)[i];
    }
  }

 private:
  enum Lanes { kShiftLanes, kThresholdLanes, kValidLanes, kMaxLanes, kSubtractLanes };

  double* sum(int field) { return sums_.data() + field * p_.block_rows; }

  // Moves each row's shift up to the largest logit of the tile and rescales its sums. Returns what
  // to subtract: the shift, or 0 for a row that has met no pair yet.
  const T* raise_shift(T* attended) {
    const int64_t d = p_.x.d();
    T* shift = w_.lane_buffer(kShiftLanes);
    T* largest = w_.lane_buffer(kMaxLanes);
    T* subtract = w_.lane_buffer(kSubtractLanes);
    p_.kernels.row_max(w_.tile(), largest);
    std::copy_n(shift, w_.padded_rows(), subtract);
    for (int64_t i = 0; i < w_.rows().size(); ++i) {
      if (largest[i] > shift[i]) {
        const double by = static_cast<double>(shift[i]) - largest[i], factor = std::exp(by);
        SoftmaxState<double> moved{0, 0};
        SoftmaxFold<true>::merge(moved, {sum(kSum)[i], sum(kWeighted)[i]}, by, factor);
        sum(kSum)[i] = moved.sum;
        sum(kWeighted)[i] = moved.weighted;
        if (attended != nullptr && !first_)
          for (int64_t k = 0; k < d; ++k) attended[i * d + k] *= static_cast<T>(factor);
        shift[i] = largest[i];
      }
      subtract[i] = shift[i] == -static_cast<T>(kInfinity) ? T{0} : shift[i];
    }
    return subtract;
  }

  void set_partners(bool mirrored) {
    w_.for_partners([&](int64_t row, int64_t key, int64_t i, int64_t j) {
      partner_[row] = w_.logit(i, j);
      if (mirrored) partner_[key] = partner_[row];
    });
  }

  void push_counts(Sums* keys) {
    Counts<T> counts{};
    counts.row_threshold = w_.lane_buffer(kThresholdLanes);
    counts.row_valid = w_.lane_buffer(kValidLanes);
    counts.row_rank = sum(kRank);
    counts.row_total = sum(kTotal);
    counts.row_count = sum(kCount);
    if (keys != nullptr) {
      counts.key_threshold = threshold_ + w_.keys().begin;
      counts.key_rank = keys->of(kRank) + w_.keys().begin;
      counts.key_total = keys->of(kTotal) + w_.keys().begin;
      counts.key_count = keys->of(kCount) + w_.keys().begin;
    }
    p_.kernels.add_counts(w_.tile(), counts);
  }

  const Problem<T>& p_;
  Worker<T>& w_;
  Fold fold_;
  std::optional<double> fixed_;
  const T* threshold_;
  T* partner_;
  Shifts<T> shifts_;
  bool first_ = true;
  std::vector<double> sums_;
};

}  // namespace ck
