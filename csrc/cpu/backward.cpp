// Backward sweep: logits, kept or made again, are turned into dL/dz and multiplied with both sides.
#include "backward.h"

#include <cmath>

#include "schedule.h"
#include "sums.h"

namespace ck {
namespace {

enum Field { kLse, kMean, kGradLse, kGradMean, kFields };

// The fields of one side as the tiles take them. A row with no pair (lse = -inf) gets lse = +inf
// and no gradient, so that it adds nothing, whatever came from above. What rounding took from lse,
// `low`, comes into the gradients: exp(z - lse - low) = exp(z - lse) exp(-low).
template <class T>
class Side {
 public:
  Side() = default;
  Side(int64_t size, const at::Tensor& lse, const at::Tensor& low, const at::Tensor& mean,
       const OptionalTensor& grad_lse, const OptionalTensor& grad_mean) {
    values_ = at::zeros({kFields, size}, kScalar<T>);
    T* values = values_.template data_ptr<T>();
    const auto fill = [&](Field field, const at::Tensor& source) {
      const at::Tensor typed = source.to(kScalar<T>).contiguous();
      std::copy_n(typed.template const_data_ptr<T>(), size, values + field * size);
    };
    if (lse.numel() > 0) fill(kLse, lse);
    if (grad_lse.has_value()) fill(kGradLse, *grad_lse);
    if (grad_mean.has_value()) {
      fill(kMean, mean);
      fill(kGradMean, *grad_mean);
    }
    const at::Tensor of_lse = low.to(kScalar<T>).contiguous();
    const T* lows = low.numel() > 0 ? of_lse.template const_data_ptr<T>() : nullptr;
    for (int64_t i = 0; i < size; ++i) {
      if (lows != nullptr) {
        const T factor = std::exp(-lows[i]);
        values[kGradLse * size + i] *= factor;
        values[kGradMean * size + i] *= factor;
      }
      if (values[kLse * size + i] == -std::numeric_limits<T>::infinity()) {
        values[kLse * size + i] = std::numeric_limits<T>::infinity();
        values[kGradLse * size + i] = values[kGradMean * size + i] = 0;
      }
    }
  }
  bool given() const { return values_.defined(); }
  const T* of(Field field) const {
    return values_.template const_data_ptr<T>() + field * values_.size(1);
  }
  Coefficients<T> from(int64_t begin) const {
    return {of(kLse) + begin, of(kMean) + begin, of(kGradLse) + begin, of(kGradMean) + begin};
  }

 private:
  at::Tensor values_;
};

// The gradient of one side's features, from the sums over the other side of dL/dz times its
// features. Of half features it is rounded when a sum is whole, which may be so a slab at a time.
template <class T>
class Gradient {
 public:
  // not needed: rows() is null
  Gradient(bool needed, const at::Tensor& tensor, const Features<T>& x, bool normalize, T scale)
      : needed_(needed), tensor_(tensor), x_(x), normalize_(normalize), scale_(scale) {}

  bool half() const { return needed_ && tensor_.scalar_type() != kScalar<T>; }
  // all rows, or if they are half and may be `cut`, those whose sums take 16 MB
  std::vector<Range> slabs(bool cut) const {
    constexpr int64_t kSlabElements = 1 << 22;
    const int64_t rows = std::max<int64_t>(1, kSlabElements / x_.d() / kUnit) * kUnit;
    std::vector<Range> out;
    for (int64_t i = 0; i < x_.rows(); i = out.back().end)
      out.push_back({i, cut && half() ? std::min(x_.rows(), i + rows) : x_.rows()});
    return out;
  }
  void start(Range slab) {
    if (!needed_ || (sum_.defined() && slab.size() == x_.rows())) return;
    slab_ = slab;
    if (!sum_.defined()) sum_ = at::empty({slab.size(), x_.d()}, kScalar<T>);
    sum_.zero_();
  }
  // where row 0 would be, of sums of the slab
  T* rows() const { return needed_ ? sum_.template data_ptr<T>() - slab_.begin * x_.d() : nullptr; }
  // the sums of a slab to scale (u - [normalize] (x / |x|^2) <x, u>)
  void finish() {
    if (!needed_) return;
    const int64_t d = x_.d();
    const at::Tensor alongs = at::empty({slab_.size()}, kScalar<T>);
    T *out = rows(), *products = alongs.template data_ptr<T>();
    x_.for_read_blocks(slab_, [&](Range range, const T* features, int64_t stride) {
      for (int64_t i = range.begin; i < range.end; ++i)
        products[i - slab_.begin] =
            tile_kernels<T>().project(out + i * d, features + (i - range.begin) * stride,
                                      x_.inverse()[i], normalize_, scale_, d, out + i * d);
    });
    for (int64_t i = 0; i < slab_.size(); ++i) along_ += products[i];
    if (slab_.size() == x_.rows()) {
      result_ = sum_.to(tensor_.scalar_type());
      return;
    }
    if (!result_.defined())
      result_ = at::empty({x_.rows(), d}, sum_.options().dtype(tensor_.scalar_type()));
    result_.narrow(0, slab_.begin, slab_.size()).copy_(sum_.narrow(0, 0, slab_.size()));
  }
  // sums of all rows, made elsewhere
  void take(const at::Tensor& sums) {
    if (!needed_) return;
    sum_ = sums;
    slab_ = {0, x_.rows()};
    finish();
  }
  const at::Tensor& result() const { return result_; }
  double along() const { return along_; }  // sum of <x, u>

 private:
  static constexpr int64_t kUnit = 256;
  bool needed_;
  const at::Tensor& tensor_;
  const Features<T>& x_;
  bool normalize_;
  T scale_;
  at::Tensor sum_, result_;
  Range slab_{0, 0};
  double along_ = 0;
};

template <class T>
class BackwardSweep {
 public:
  BackwardSweep(const PairArguments& arguments, const BackwardInputs& in, Needs needs)
      : a_(arguments), in_(in), needs_(needs), p_(arguments) {
    const bool with_mean = in.grad_mean.has_value() || in.grad_col_mean.has_value();
    fold_ = in.softplus ? Fold::kSoftplus : with_mean ? Fold::kLseMean : Fold::kLse;
    if (!p_.paired) {
      const KeptLogits kept = find_logits(in.lse_low);
      // half of a matrix is walked by as many threads as it was
      if (!kept.half || (p_.symmetric && kept.threads == at::get_num_threads())) p_.kept = kept;
    }
    attended_ = in.attended.numel() > 0 && !needs.y && !needs.bias;
    // the weights of attended keys are of the sums themselves
    const at::Tensor low = attended_ ? in.lse_low.narrow(0, 0, 0) : in.lse_low;
    rows_ = Side<T>(p_.x.rows(), in.lse, low, in.mean, in.grad_lse, in.grad_mean);
    if (in.grad_col_lse.has_value() || in.grad_col_mean.has_value())
      keys_ = Side<T>(p_.keys, in.col_lse, in.col_lse_low, in.col_mean, in.grad_col_lse,
                      in.grad_col_mean);
  }

  BackwardResult run() {
    const bool need_u = needs_.x || needs_.scale;
    const auto none = [] { return at::empty({0}, kScalar<T>); };
    BackwardResult result{none(), none(), none(), none()};
    const auto shared = [&](bool needed, const at::Tensor& t, const Features<T>& f) {
      return Gradient<T>(needed, t, f, p_.normalize, p_.scale);
    };
    Gradient<T> u = shared(need_u, a_.x, p_.x);
    at::Tensor totals;
    if (needs_.bias) totals = at::zeros({p_.keys}, at::kDouble);
    if (attended_) {
      for (Range slab : u.slabs(true)) {
        u.start(slab);
        if (need_u) from_attended(slab, u.rows());
        u.finish();
      }
    } else if (p_.paired) {
      // tiles may be left out
      if (needs_.y) result.y = at::zeros(a_.y->sizes(), a_.y->options());
      u.take(sweep_pairs(result.y, totals));
    } else if (p_.symmetric) {
      u.start(u.slabs(false)[0]);
      if (fixed_shift(p_).promising)
        sweep_half(u.rows());
      else
        sweep_half_by_factor(u.rows());
      u.finish();
    } else {
      Gradient<T> v = shared(needs_.y, *a_.y, p_.y);
      // each sum in full of one side at most, of the shorter one
      const bool by_rows = u.half() && !(v.half() && p_.keys > p_.x.rows());
      const auto rows = u.slabs(by_rows), keys = v.slabs(!by_rows);
      if (!needs_.y && !needs_.bias && rows.size() == 1) {
        u.take(sweep_rows());
      } else {
        for (Range row_slab : rows) {
          u.start(row_slab);
          for (Range key_slab : keys) {
            v.start(key_slab);
            sweep_all(row_slab, key_slab, u.rows(), v.rows(), totals);
            if (keys.size() > 1) v.finish();
          }
          u.finish();
        }
        if (keys.size() == 1) v.finish();
      }
      if (needs_.y) result.y = v.result();
    }
    if (needs_.x) result.x = u.result();
    // both orders of a pair are in u when the matrix is symmetric
    const bool twice = p_.symmetric && !attended_;
    if (needs_.scale)
      result.scale = at::scalar_tensor(twice ? u.along() / 2 : u.along(), a_.scale.options());
    if (needs_.bias) result.bias = totals.to(a_.bias->scalar_type());
    return result;
  }

 private:
  // dL/dx from the keys weighted in the forward sweep
  void from_attended(Range slab, T* out) {
    const int64_t d = p_.x.d();
    const T* attended = in_.attended.template const_data_ptr<T>();
    at::parallel_for(slab.begin, slab.end, divide_up(kSerialWork, d),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t i = begin; i < end; ++i) {
                         const T weight = rows_.of(kGradLse)[i] * p_.x.inverse()[i];
                         for (int64_t k = 0; k < d; ++k)
                           out[i * d + k] = weight * attended[i * d + k];
                       }
                     });
  }

  void sweep_half(T* out) {
    Workers<T> workers(p_, true);
    for_half_pairs(p_, workers, [&](Worker<T>& w, Range rows, Range keys) {
      part(w, rows, keys, true, out, out, nullptr);
    });
  }

  // for large logits: those of the forward sweep, bit by bit
  void sweep_half_by_factor(T* out) {
    const at::Tensor factor = symmetric_factor(p_, a_), sign = sign_of_scale(p_);
    const PairArguments given = with_factor(a_, factor, sign);
    BackwardSweep(given, in_, needs_).sweep_half(out);
    const T root = std::sqrt(std::abs(p_.scale));
    for (int64_t i = 0; i < p_.x.rows(); ++i) {
      T* row = out + i * p_.x.d();
      for (int64_t k = 0; k < p_.x.d(); ++k) row[k] *= p_.x.inverse()[i] / root;
    }
  }

  void sweep_all(Range all_rows, Range all_keys, T* to_rows, T* to_keys, const at::Tensor& totals) {
    double* key_totals = totals.defined() ? totals.data_ptr<double>() : nullptr;
    Workers<T> workers(p_, true);
    for_all_pairs(p_, workers, all_rows, all_keys, [&](Worker<T>& w, Range rows, Range keys) {
      part(w, rows, keys, false, to_rows, to_keys, key_totals);
    });
  }

  // (N, D) of the sums that add(worker, rows, keys, sums of all rows) makes of each block of rows
  template <class Add>
  at::Tensor sweep_blocks(bool with_gradients, Add add) {
    const auto parts = key_parts(p_);
    const int64_t count = static_cast<int64_t>(parts.size()), size = p_.x.rows() * p_.x.d();
    const at::Tensor u = at::zeros({count, p_.x.rows(), p_.x.d()}, kScalar<T>);
    T* out = u.template data_ptr<T>();
    Workers<T> workers(p_, with_gradients);
    for_row_blocks(p_, workers, parts, [&](Worker<T>& w, Range rows, int64_t index) {
      add(w, rows, parts[index], out + index * size);
    });
    return count == 1 ? u[0] : u.sum(0);
  }

  at::Tensor sweep_rows() {
    return sweep_blocks(true, [&](Worker<T>& w, Range rows, Range keys, T* to_rows) {
      part(w, rows, keys, false, to_rows, nullptr, nullptr);
    });
  }

  // Keys of their own: each block of rows owns all of its pairs, but shares the keys' biases.
  at::Tensor sweep_pairs(const at::Tensor& v, at::Tensor& totals) {
    const int64_t blocks = divide_up(p_.x.rows(), p_.block_rows);
    at::Tensor block_totals;
    if (totals.defined()) block_totals = at::zeros({blocks, p_.keys}, at::kDouble);
    const auto add = [&](Worker<T>& w, Range rows, Range keys, T* to_rows) {
      double* key_totals = nullptr;
      if (totals.defined())
        key_totals = block_totals.data_ptr<double>() + rows.begin / p_.block_rows * p_.keys;
      visit(w, rows, keys, false, key_totals, [&](bool) {
        w.add_to_pairs(to_rows + w.rows().begin * p_.x.d(), v.numel() > 0 ? &v : nullptr);
      });
    };
    const at::Tensor u = sweep_blocks(false, add);
    if (totals.defined()) totals = block_totals.sum(0);
    return u;
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
      b.row.lse = w.lanes(kLseLanes, rows_.of(kLse), infinity);
      b.row.mean = w.lanes(kMeanLanes, rows_.of(kMean), 0);
      b.row.grad_lse = w.lanes(kGradLseLanes, rows_.of(kGradLse), 0);
      b.row.grad_mean = w.lanes(kGradMeanLanes, rows_.of(kGradMean), 0);
      b.row_scale = w.lanes(kScaleLanes, p_.x.inverse(), 0);
      b.row_valid = w.valid_lanes(kValidLanes);
    };
    const auto push = [&](bool mirrored) {
      const int64_t first_key = w.keys().begin;
      // a symmetric matrix has its rows' statistics on its columns
      if (half || keys_.given()) b.key = (half ? rows_ : keys_).from(first_key);
      if (key_totals != nullptr) b.key_total = key_totals + first_key;
      p_.kernels.backward(w.tile(), fold_, b);
      use(mirrored);
    };
    for_tiles(p_, w, rows, keys, half, start, push, [](Range) {});
  }

  const PairArguments& a_;
  const BackwardInputs& in_;
  Needs needs_;
  bool attended_;
  Problem<T> p_;
  Fold fold_;
  Side<T> rows_, keys_;
};

}  // namespace

template <class T>
BackwardResult backward_sweep(const PairArguments& arguments, const BackwardInputs& inputs,
                              Needs needs) {
  return BackwardSweep<T>(arguments, inputs, needs).run();
}

template BackwardResult backward_sweep<float>(const PairArguments&, const BackwardInputs&, Needs);
template BackwardResult backward_sweep<double>(const PairArguments&, const BackwardInputs&, Needs);

}  // namespace ck
