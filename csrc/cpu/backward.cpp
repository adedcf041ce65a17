// Backward sweep: logits, kept or made again, are turned into dL/dz and multiplied with both sides.
#include "backward.h"

#include <cmath>
#include <optional>

#include "gradient.h"
#include "schedule.h"
#include "side.h"
#include "sums.h"

namespace ck {
namespace {

template <class T>
class BackwardSweep {
 public:
  BackwardSweep(const PairArguments<T>& arguments, const BackwardInputs<T>& in,
                const Gradients<T>& to)
      : a_(arguments), in_(in), to_(to), p_(arguments), rows_(p_.x.rows(), of_rows()) {
    const bool with_mean = in.rows.grad_mean != nullptr || in.columns.grad_mean != nullptr;
    fold_ = in.softplus ? Fold::kSoftplus : with_mean ? Fold::kLseMean : Fold::kLse;
    if (in.columns.grad_lse != nullptr || in.columns.grad_mean != nullptr)
      keys_ = Side<T>(p_.keys, in.columns);
    if (p_.paired) return;
    // what products of bfloat16 round is then not in the gradient of the scale
    if (p_.bits && to.scale && !attended() && p_.scale != 0)
      slopes_ = Buffer<double>(num_threads() * kApart, 0.0);
    share_shift();
    const KeptLogits kept = find_logits(in.rows.low);
    // half of a matrix is walked by as many threads as it was
    if (!kept.half || (p_.symmetric && kept.threads == num_threads())) p_.kept = kept;
  }

  double run() {
    const bool need_u = to_.x != nullptr || to_.scale;
    const auto shared = [&](bool needed, void* out, Dtype dtype, bool add, const Features<T>& f) {
      return Gradient<T>(needed, out, dtype, add, f, p_.normalize, p_.scale);
    };
    Gradient<T> u = shared(need_u, to_.x, a_.x.dtype, to_.add_x, p_.x);
    Buffer<double> totals;
    if (to_.bias != nullptr) totals = Buffer<double>(p_.keys, 0.0);
    if (attended()) {
      for (Range slab : u.slabs(true)) {
        u.start(slab);
        if (need_u) from_attended(slab, u.rows());
        u.finish();
      }
    } else if (p_.paired) {
      if (to_.y != nullptr)  // tiles may be left out
        clear(static_cast<char*>(to_.y), p_.x.rows() * p_.keys * p_.x.d() * size_of(a_.y.dtype));
      for (Range slab : u.slabs(true)) {
        u.start(slab);
        sweep_pairs(slab, u.rows(), totals);
        u.finish();
      }
    } else if (p_.symmetric && fixed_shift(p_).promising && u.large()) {
      p_.kept = {};  // of half the matrix
      for (Range slab : u.slabs(true)) {
        u.start(slab);
        sweep_all(slab, {0, p_.keys}, u.rows(), nullptr, nullptr);
        u.finish();
      }
    } else if (p_.symmetric) {
      u.start(u.slabs(false)[0]);
      if (fixed_shift(p_).promising)
        sweep_half(u.rows());
      else
        sweep_half_by_factor(u.rows());
      u.finish();
    } else {
      Gradient<T> v = shared(to_.y != nullptr, to_.y, a_.y.dtype, to_.add_y, p_.y);
      // each sum in full of one side at most, of the shorter one
      const bool by_rows = u.apart() && !(v.apart() && p_.keys > p_.x.rows());
      const auto rows = u.slabs(by_rows), keys = v.slabs(!by_rows);
      if (u.large() && v.large()) {  // one side after the other
        for (Range slab : u.slabs(true)) {
          u.start(slab);
          sweep_all(slab, {0, p_.keys}, u.rows(), nullptr, totals.data());
          u.finish();
        }
        take_slopes();  // of each pair once
        for (Range slab : v.slabs(true)) {
          v.start(slab);
          sweep_all({0, p_.x.rows()}, slab, nullptr, v.rows(), nullptr);
          v.finish();
        }
      } else if (to_.y == nullptr && to_.bias == nullptr && rows.size() == 1) {
        u.start(rows[0]);
        sweep_rows(u.rows());
        u.finish();
      } else {
        for (Range row_slab : rows) {
          u.start(row_slab);
          for (Range key_slab : keys) {
            v.start(key_slab);
            sweep_all(row_slab, key_slab, u.rows(), v.rows(), totals.data());
            if (keys.size() > 1) v.finish();
          }
          u.finish();
        }
        if (keys.size() == 1) v.finish();
      }
    }
    std::copy_n(totals.data(), totals.size(), to_.bias);
    take_slopes();
    if (slope_) return *slope_ / p_.scale;
    // both orders of a pair are in u when the matrix is symmetric
    return p_.symmetric && !attended() ? u.along() / 2 : u.along();
  }

 private:
  bool attended() const {
    return in_.attended != nullptr && to_.y == nullptr && to_.bias == nullptr;
  }
  Upstream<T> of_rows() const {
    Upstream<T> rows = in_.rows;
    // the weights of attended keys are of the sums themselves; of softplus it stands for logits
    if (attended() || in_.softplus) rows.low = nullptr;
    return rows;
  }

  // Where rows and keys have statistics, of one fixed shift, both take one exponential.
  void share_shift() {
    if (attended() || in_.softplus || !(p_.symmetric || keys_.given())) return;
    const FixedShift fixed = fixed_shift(p_);
    const double shift = static_cast<T>(fixed.shift), least = shift + std::log(fixed.smallest);
    if (!fixed.promising) return;
    one_shift_ = rows_.reaches(least) && keys_.reaches(least);
    if (!one_shift_) return;
    rows_.shift_to(shift);
    keys_.shift_to(shift);
  }

  // dL/dx from the keys weighted in the forward sweep
  void from_attended(Range slab, T* out) {
    const int64_t d = p_.x.d();
    parallel_for(slab.begin, slab.end, divide_up(kSerialWork, d), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T weight = rows_.of(Side<T>::kGradLse)[i] * p_.x.inverse()[i];
        for (int64_t k = 0; k < d; ++k) out[i * d + k] = weight * in_.attended[i * d + k];
      }
    });
  }

  void sweep_half(T* out) {
    Workers<T> workers(p_);
    for_half_pairs(p_, workers, [&](Worker<T>& w, Range rows, Range keys) {
      part(w, rows, keys, true, out, out, nullptr);
    });
  }

  // for large logits: those of the forward sweep, bit by bit
  void sweep_half_by_factor(T* out) {
    slopes_ = {};  // of float products
    const Buffer<T> factor = symmetric_factor(p_);
    BackwardSweep(with_factor(p_, a_, factor), in_, to_).sweep_half(out);
    const T root = std::sqrt(std::abs(p_.scale));
    for (int64_t i = 0; i < p_.x.rows(); ++i) {
      T* row = out + i * p_.x.d();
      for (int64_t k = 0; k < p_.x.d(); ++k) row[k] *= p_.x.inverse()[i] / root;
    }
  }

  void sweep_all(Range all_rows, Range all_keys, T* to_rows, T* to_keys, double* key_totals) {
    const int64_t d = p_.x.d(), size = all_rows.size() * d;
    const auto parts = parts_of_few_rows(p_, all_rows, all_keys, d * sizeof(T));
    Workers<T> workers(p_);
    if (parts.empty())
      return for_all_pairs(p_, workers, all_rows, all_keys,
                           [&](Worker<T>& w, Range rows, Range keys) {
                             part(w, rows, keys, false, to_rows, to_keys, key_totals);
                           });
    // each part has sums of its own for the rows, the first those that are there
    Buffer<T> memory(to_rows == nullptr ? 0 : (parts.size() - 1) * size);
    clear(memory.data(), memory.size());
    for_key_parts(workers, parts, [&](Worker<T>& w, Range keys, int64_t index) {
      T* own = to_rows;
      if (own != nullptr && index > 0)
        own = memory.data() + (index - 1) * size - all_rows.begin * d;
      part(w, all_rows, keys, false, own, to_keys, key_totals);
    });
    if (memory.empty()) return;
    T* sums = to_rows + all_rows.begin * d;
    parallel_for(0, size, kSerialWork, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t at = i; at < memory.size(); at += size) sums[i] += memory[at];
    });
  }

  // to_rows (N, D): the sums that add(worker, rows, keys, sums of all rows) makes of each block of
  // `all_rows`; they are 0 before, or null
  template <class Add>
  void sweep_blocks(Range all_rows, T* to_rows, Add add) {
    const auto parts = key_parts(p_);
    const int64_t count = static_cast<int64_t>(parts.size()), d = p_.x.d();
    const int64_t size = all_rows.size() * d, before = all_rows.begin * d;
    const bool several = count > 1 && to_rows != nullptr;
    Buffer<T> memory(several ? count * size : 0);
    if (several) clear(memory.data(), count * size);
    Workers<T> workers(p_);
    for_row_blocks(p_, workers, all_rows, parts, [&](Worker<T>& w, Range rows, int64_t index) {
      add(w, rows, parts[index], several ? memory.data() + index * size - before : to_rows);
    });
    if (several) add_up(memory.data(), count, size, to_rows + before);
  }

  void sweep_rows(T* to_rows) {
    sweep_blocks({0, p_.x.rows()}, to_rows, [&](Worker<T>& w, Range rows, Range keys, T* out) {
      part(w, rows, keys, false, out, nullptr, nullptr);
    });
  }

  // Keys of their own: each block of rows owns all of its pairs, but shares the keys' biases.
  void sweep_pairs(Range all_rows, T* to_rows, Buffer<double>& totals) {
    const int64_t blocks = divide_up(p_.x.rows(), p_.block_rows), d = p_.x.d();
    Buffer<double> block_totals(totals.empty() ? 0 : blocks * p_.keys, 0.0);
    sweep_blocks(all_rows, to_rows, [&](Worker<T>& w, Range rows, Range keys, T* out) {
      double* key_totals = nullptr;
      if (!totals.empty()) key_totals = block_totals.data() + rows.begin / p_.block_rows * p_.keys;
      visit(w, rows, keys, false, key_totals, [&](bool) {
        w.add_to_pairs(out == nullptr ? out : out + w.rows().begin * d, to_.y, a_.y.dtype);
      });
    });
    for (int64_t i = 0; i < block_totals.size(); ++i) totals[i % p_.keys] += block_totals[i];
  }

  enum Lanes { kLseLanes, kMeanLanes, kGradLseLanes, kGradMeanLanes, kScaleLanes, kValidLanes };

  // adds dL/dz times keys to the rows, and times rows to the keys, where a place is given
  void part(Worker<T>& w, Range rows, Range keys, bool half, T* to_rows, T* to_keys,
            double* key_totals) {
    const int64_t d = p_.x.d();
    visit(w, rows, keys, half, key_totals, [&](bool mirrored) {
      if (to_rows != nullptr) w.add_to_rows(to_rows + w.rows().begin * d, true);
      if (to_keys != nullptr && (mirrored || !half)) w.add_to_keys(to_keys + w.keys().begin * d);
    });
  }

  // use(mirrored) for every tile once it holds dL/dz
  template <class Use>
  void visit(Worker<T>& w, Range rows, Range keys, bool half, double* key_totals, Use use) {
    BackwardTile<T> b{};
    const auto start = [&](Range) {
      constexpr T infinity = std::numeric_limits<T>::infinity();
      b.row.lse = w.lanes(kLseLanes, rows_.of(Side<T>::kLse), infinity);
      b.row.mean = w.lanes(kMeanLanes, rows_.of(Side<T>::kMean), 0);
      b.row.grad_lse = w.lanes(kGradLseLanes, rows_.of(Side<T>::kGradLse), 0);
      b.row.grad_mean = w.lanes(kGradMeanLanes, rows_.of(Side<T>::kGradMean), 0);
      b.row_scale = w.lanes(kScaleLanes, p_.x.inverse(), 0);
      b.row_valid = w.valid_lanes(kValidLanes);
    };
    const auto push = [&](bool mirrored) {
      const int64_t first_key = w.keys().begin;
      // a symmetric matrix has its rows' statistics on its columns
      const Side<T>& side = p_.symmetric ? rows_ : keys_;
      if (side.given()) b.key = side.from(first_key);
      b.one_shift = one_shift_;
      if (key_totals != nullptr) b.key_total = key_totals + first_key;
      double slope = 0;
      if (!slopes_.empty()) {
        b.slope = &slope;
        slope = slope_of_partners(w);
      }
      p_.kernels.backward(w.tile(), fold_, b);
      if (!slopes_.empty())  // both orders of a pair may be there
        slopes_[thread_num() * kApart] += p_.symmetric && !mirrored ? slope / 2 : slope;
      if (in_.grad_partner != nullptr) add_partners(w, b);
      use(mirrored);
    };
    for_tiles(p_, w, rows, keys, half, start, push, [](Range) {});
  }

  void add_partners(Worker<T>& w, const BackwardTile<T>& b) {
    const Tile<T>& tile = w.tile();
    w.for_partners([&](int64_t row, int64_t key, int64_t i, int64_t j) {
      const T grad = grad_of_partner(row, key);
      tile.data[j * tile.ld + i] += grad * b.row_scale[i] * tile.key_scale[j];
      if (b.key_total != nullptr) b.key_total[j] += grad;
    });
  }

  T grad_of_partner(int64_t row, int64_t key) const {
    return in_.grad_partner[row] + (p_.symmetric ? in_.grad_partner[key] : T{0});
  }

  // of the logits, which the tile still holds
  double slope_of_partners(Worker<T>& w) {
    double slope = 0;
    if (in_.grad_partner == nullptr) return slope;
    w.for_partners([&](int64_t row, int64_t key, int64_t i, int64_t j) {
      slope += grad_of_partner(row, key) * w.product(i, j);
    });
    return slope;
  }

  // the sum of dL/dz (z - bias), if it was gathered
  void take_slopes() {
    if (slopes_.empty()) return;
    slope_ = 0;
    for (int64_t i = 0; i < slopes_.size(); ++i) *slope_ += slopes_[i];
    slopes_ = {};
  }

  static constexpr int64_t kApart = 8;  // a cache line between threads

  const PairArguments<T> a_;
  const BackwardInputs<T> in_;
  const Gradients<T> to_;
  Problem<T> p_;
  Side<T> rows_, keys_;
  Fold fold_;
  Buffer<double> slopes_;  // of each thread
  std::optional<double> slope_;
  bool one_shift_ = false;
};

}  // namespace

template <class T>
double backward_sweep(const PairArguments<T>& arguments, const BackwardInputs<T>& inputs,
                      const Gradients<T>& to) {
  return BackwardSweep<T>(arguments, inputs, to).run();
}

template double backward_sweep(const PairArguments<float>&, const BackwardInputs<float>&,
                               const Gradients<float>&);
template double backward_sweep(const PairArguments<double>&, const BackwardInputs<double>&,
                               const Gradients<double>&);

}  // namespace ck
