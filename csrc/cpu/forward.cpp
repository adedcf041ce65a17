// Forward sweeps: statistics of rows and columns.
#include "forward.h"

#include <cmath>
#include <tuple>
#include <utility>

#include "schedule.h"
#include "sums.h"

namespace ck {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

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
           const T* threshold, const Shifts<T>& shifts = {})
      : p_(problem),
        w_(worker),
        fold_(fold),
        fixed_(shift),
        threshold_(threshold),
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
        const double factor = std::exp(static_cast<double>(shift[i]) - largest[i]);
        sum(kSum)[i] *= factor;
        sum(kWeighted)[i] *= factor;
        if (attended != nullptr && !first_)
          for (int64_t k = 0; k < d; ++k) attended[i * d + k] *= static_cast<T>(factor);
        shift[i] = largest[i];
      }
      subtract[i] = shift[i] == -static_cast<T>(kInfinity) ? T{0} : shift[i];
    }
    return subtract;
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
  Shifts<T> shifts_;
  bool first_ = true;
  std::vector<double> sums_;
};

// Those of one side; what was not asked for is undefined.
struct Statistics {
  at::Tensor lse, low, mean, attended;
};

template <class T>
class ForwardSweep {
 public:
  ForwardSweep(const PairArguments& arguments, const ForwardOptions& options)
      : arguments_(arguments), options_(options), p_(arguments) {
    if (options.threshold.has_value()) {
      threshold_tensor_ = options.threshold->to(kScalar<T>).contiguous();
      threshold_ = threshold_tensor_.template const_data_ptr<T>();
    }
  }

  ForwardResult run() {
    const FixedShift fixed = fixed_shift(p_);
    const bool one_shift = options_.fold != Fold::kSoftplus && fixed.promising;
    const bool two_ways = options_.columns || (p_.symmetric && options_.fold != Fold::kSoftplus);
    if (two_ways && !options_.attend) {
      if (!one_shift && p_.symmetric) return both_by_factor();
      keep(p_.symmetric);
      return with_kept(one_shift ? both(fixed) : both_by_maxima());
    }
    Sums sums(0, kRank);
    keep(false);
    ForwardResult result = rows(one_shift ? std::optional(fixed.shift) : std::nullopt, sums);
    if (one_shift)
      redo(sums, fixed.smallest, false, {result.lse, result.lse_low, result.mean, result.attended});
    return with_kept(std::move(result));
  }

 private:
  bool with_mean() const { return options_.fold == Fold::kLseMean; }
  int row_fields() const { return threshold_ != nullptr ? kFields : kRank; }

  // From now on logits are kept, as far as there is room.
  void keep(bool half) {
    constexpr int64_t kSmallest = 1 << 18;  // pairs whose product costs more than the memory does
    if (!options_.keep || options_.fold == Fold::kSoftplus || p_.paired) return;
    if (p_.x.rows() * p_.keys < kSmallest) return;
    p_.kept = take_logits(p_.x.rows(), p_.keys, p_.block_keys, kScalar<T>, half);
    p_.keeps = true;
  }

  // They live as long as lse_low, which the backward sweep is given.
  ForwardResult with_kept(ForwardResult result) const {
    if (p_.kept.memory.defined()) result.lse_low = tie_logits(result.lse_low, p_.kept);
    return result;
  }

  // Rows and columns in one sweep. Of a symmetric matrix the columns are rows: half the tiles.
  ForwardResult both(const FixedShift& fixed) {
    ForwardResult result;
    Sums rows(p_.x.rows(), row_fields());
    if (p_.symmetric) {
      rows_and_keys(rows, rows, fixed.shift);
    } else {
      Sums keys(p_.keys, kRank);
      rows_and_keys(rows, keys, fixed.shift);
      std::fill_n(keys.of(kShift), keys.size(), static_cast<T>(fixed.shift));
      set_columns(result, keys);
      redo(keys, fixed.smallest, true, {result.col_lse, result.col_lse_low, result.col_mean, {}});
    }
    set_rows(result, rows);
    redo(rows, fixed.smallest, false, {result.lse, result.lse_low, result.mean, {}});
    return result;
  }

  // The same for logits of any size: one sweep finds the largest of each row and key, a second one
  // sums. Logits are those of the backward sweep, bit by bit: with sides exchanged they would be
  // rounded otherwise, and exp(z - lse) be off by as much as logits are.
  ForwardResult both_by_maxima() {
    const T lowest = -static_cast<T>(kInfinity);
    const at::Tensor row_max = at::full({p_.x.rows()}, lowest, kScalar<T>);
    const at::Tensor key_max = p_.symmetric ? row_max : at::full({p_.keys}, lowest, kScalar<T>);
    find_maxima(row_max.template data_ptr<T>(), key_max.template data_ptr<T>());
    row_max.masked_fill_(row_max == lowest, 0);  // no pair
    key_max.masked_fill_(key_max == lowest, 0);
    const Shifts<T> shifts{row_max.template const_data_ptr<T>(),
                           key_max.template const_data_ptr<T>()};
    ForwardResult result;
    Sums rows(p_.x.rows(), row_fields());
    if (p_.symmetric) {
      rows_and_keys(rows, rows, {}, shifts);
    } else {
      Sums keys(p_.keys, kRank);
      rows_and_keys(rows, keys, {}, shifts);
      std::copy_n(shifts.keys, keys.size(), keys.of(kShift));
      set_columns(result, keys);
    }
    set_rows(result, rows);
    return result;
  }

  ForwardResult both_by_factor() {
    const at::Tensor factor = symmetric_factor(p_, arguments_), sign = sign_of_scale(p_);
    const PairArguments given = with_factor(arguments_, factor, sign);
    return ForwardSweep(given, options_).both_by_maxima();
  }

  void find_maxima(T* of_rows, T* of_keys) {
    Workers<T> workers(p_, false);
    const auto visit = [&](Worker<T>& w, Range row_part, Range key_part) {
      enum Lanes { kMaxLanes, kValidLanes };
      const T* valid = nullptr;
      const auto push = [&](bool mirrored) {
        T* largest = w.lane_buffer(kMaxLanes);
        p_.kernels.row_max(w.tile(), largest);
        T* out = of_rows + w.rows().begin;
        for (int64_t i = 0; i < w.rows().size(); ++i) out[i] = std::max(out[i], largest[i]);
        if (mirrored || !p_.symmetric)
          p_.kernels.raise_key_max(w.tile(), valid, of_keys + w.keys().begin);
      };
      for_tiles(
          p_, w, row_part, key_part, p_.symmetric,
          [&](Range) { valid = w.valid_lanes(kValidLanes); }, push, [](Range) {});
    };
    visit_pairs(workers, visit);
  }

  // Rows only; without a shift, for logits of any size.
  ForwardResult rows(std::optional<double> shift, Sums& sums) {
    const auto parts = key_parts(p_);
    const int64_t count = static_cast<int64_t>(parts.size());
    sums = Sums(p_.x.rows(), row_fields(), count);
    ForwardResult result;
    at::Tensor attended;
    if (options_.attend) attended = at::zeros({count, p_.x.rows(), p_.x.d()}, kScalar<T>);
    sweep_rows(sums, parts, attended, shift);
    const at::Tensor factors = sums.merge();
    if (options_.attend) {
      const at::Tensor weights = factors / sums.field(kSum);
      attended *= weights.masked_fill(sums.field(kSum) == 0, 0).to(kScalar<T>).unsqueeze(2);
      result.attended = count == 1 ? attended[0] : attended.sum(0);
    }
    set_rows(result, sums);
    return result;
  }

  void rows_and_keys(Sums& rows, Sums& keys, std::optional<double> shift,
                     const Shifts<T>& shifts = {}) {
    Workers<T> workers(p_, false);
    const auto visit = [&](Worker<T>& w, Range row_part, Range key_part) {
      RowBlock<T> block(p_, w, options_.fold, shift, threshold_, shifts);
      for_tiles(
          p_, w, row_part, key_part, p_.symmetric, [&](Range) { block.start(); },
          [&](bool mirrored) {
            block.push(p_.symmetric && !mirrored ? nullptr : &keys, mirrored, nullptr);
          },
          [&](Range) { block.finish(rows, 0); });
    };
    visit_pairs(workers, visit);
  }

  template <class Visit>
  void visit_pairs(Workers<T>& workers, Visit visit) {
    if (p_.symmetric)
      for_half_pairs(p_, workers, visit);
    else
      for_all_pairs(p_, workers, {0, p_.x.rows()}, {0, p_.keys}, visit);
  }

  void sweep_rows(Sums& rows, const std::vector<Range>& parts, const at::Tensor& attended,
                  std::optional<double> shift) {
    Workers<T> workers(p_, attended.defined());
    for_row_blocks(p_, workers, parts, [&](Worker<T>& w, Range row_range, int64_t part) {
      RowBlock<T> block(p_, w, options_.fold, shift, threshold_);
      T* out = nullptr;
      if (attended.defined())
        out = attended.data_ptr<T>() + (part * p_.x.rows() + row_range.begin) * p_.x.d();
      for_tiles(
          p_, w, row_range, parts[part], false, [&](Range) { block.start(); },
          [&](bool) { block.push(nullptr, false, out); }, [&](Range) { block.finish(rows, part); });
    });
  }

  static at::Tensor field(Sums& sums, int which) {
    const at::Tensor out = at::empty({sums.size()}, kScalar<T>);
    std::copy_n(sums.of(which), sums.size(), out.template data_ptr<T>());
    return out;
  }

  // lse, and what rounding took from it: of large logits that is more than exp can bear
  static std::pair<at::Tensor, at::Tensor> lse(Sums& sums) {
    const at::Tensor out = at::empty({sums.size()}, kScalar<T>);
    const at::Tensor low = at::zeros({sums.size()}, kScalar<T>);
    T *values = out.template data_ptr<T>(), *lows = low.template data_ptr<T>();
    for (int64_t i = 0; i < sums.size(); ++i) {
      const double sum = sums.of(kSum)[i], shift = sums.of(kShift)[i], log = std::log(sum);
      values[i] = static_cast<T>(sum == 0 ? -kInfinity : log + shift);
      if (std::isfinite(values[i])) lows[i] = static_cast<T>(log - (values[i] - shift));
    }
    return {out, low};
  }

  static at::Tensor mean(Sums& sums) {
    const at::Tensor out = at::empty({sums.size()}, kScalar<T>);
    T* values = out.template data_ptr<T>();
    for (int64_t i = 0; i < sums.size(); ++i) {
      const SoftmaxState<double> state{sums.of(kSum)[i], sums.of(kWeighted)[i]};
      values[i] = static_cast<T>(state.sum == 0 ? 0 : SoftmaxFold<true>::mean(state));
    }
    return out;
  }

  void set_rows(ForwardResult& result, Sums& rows) {
    if (options_.fold == Fold::kSoftplus)
      result.lse = field(rows, kSum);
    else
      std::tie(result.lse, result.lse_low) = lse(rows);
    if (with_mean()) result.mean = mean(rows);
    if (threshold_ != nullptr) {
      result.rank = field(rows, kRank);
      result.total = field(rows, kTotal);
      result.count = field(rows, kCount);
    }
  }

  void set_columns(ForwardResult& result, Sums& keys) {
    std::tie(result.col_lse, result.col_lse_low) = lse(keys);
    if (with_mean()) result.col_mean = mean(keys);
  }

  // Does the rows (or keys) again whose sum is too small to be trusted under the fixed shift.
  void redo(Sums& sums, double smallest, bool of_keys, const Statistics& out) {
    std::vector<int64_t> which;
    for (int64_t i = 0; i < sums.size(); ++i)
      if (sums.of(kSum)[i] < smallest) which.push_back(i);
    if (!which.empty()) online_subset(at::tensor(which), of_keys, out);
  }

  static at::Tensor rows_of(const PairArguments& a, const at::Tensor& which) {
    if (!a.x_more.has_value()) return a.x.index_select(0, which);
    const at::Tensor of_x = which.masked_select(which < a.x.size(0));  // they ascend
    const at::Tensor of_more = which.slice(0, of_x.size(0)) - a.x.size(0);
    return at::cat({a.x.index_select(0, of_x), a.x_more->index_select(0, of_more)});
  }

  // Statistics of some rows (or of some keys, with both sides swapped), into their places.
  void online_subset(const at::Tensor& which, bool of_keys, const Statistics& to) {
    const PairArguments& a = arguments_;
    const bool all = which.size(0) == to.lse.size(0);
    const auto select = [&](const OptionalTensor& t) {
      return t.has_value() && !all ? OptionalTensor(t->index_select(0, which)) : t;
    };
    const at::Tensor keys = a.y.has_value() ? *a.y : a.x;
    const at::Tensor x = of_keys ? *select(keys) : all ? a.x : rows_of(a, which);
    const OptionalTensor x_more = all ? a.x_more : OptionalTensor();
    const OptionalTensor y = of_keys ? a.x : p_.paired ? select(keys) : keys;
    const OptionalTensor exclude = select(of_keys ? a.exclude_cols : a.exclude_rows);
    const OptionalTensor keep = select(of_keys ? a.keep_cols : a.keep_rows);
    const OptionalTensor bias = of_keys ? OptionalTensor() : a.bias;
    const PairArguments subset{
        .x = x,
        .x_more = x_more,
        .y = y,
        .y_more = a.x_more,
        .scale = a.scale,
        .bias = bias,
        .exclude_rows = exclude,
        .exclude_cols = of_keys ? a.exclude_rows : a.exclude_cols,
        .keep_rows = keep,
        .keep_cols = of_keys ? a.keep_rows : a.keep_cols,
        .normalize = a.normalize,
    };
    ForwardSweep sweep(subset, {.fold = options_.fold, .attend = to.attended.defined()});
    Sums sums(0, kRank);
    ForwardResult out = sweep.rows(std::nullopt, sums);
    if (of_keys && a.bias.has_value()) {
      // a key's bias is the same for all its logits
      const at::Tensor shift = a.bias->to(kScalar<T>).index_select(0, which);
      out.lse += shift;
      if (out.mean.defined()) out.mean += at::where(out.lse == -kInfinity, 0, shift);
    }
    to.lse.index_copy_(0, which, out.lse);
    to.low.index_copy_(0, which, out.lse_low);
    if (out.mean.defined()) to.mean.index_copy_(0, which, out.mean);
    if (to.attended.defined()) to.attended.index_copy_(0, which, out.attended);
  }

  const PairArguments& arguments_;
  ForwardOptions options_;
  Problem<T> p_;
  at::Tensor threshold_tensor_;
  const T* threshold_ = nullptr;
};

}  // namespace

template <class T>
ForwardResult forward_sweep(const PairArguments& arguments, const ForwardOptions& options) {
  return ForwardSweep<T>(arguments, options).run();
}

template ForwardResult forward_sweep<float>(const PairArguments&, const ForwardOptions&);
template ForwardResult forward_sweep<double>(const PairArguments&, const ForwardOptions&);

}  // namespace ck
