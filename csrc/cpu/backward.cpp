// Backward sweep: logits are made again, turned into dL/dz, and multiplied with both sides.
#include "backward.h"

#include <cmath>

#include "schedule.h"

namespace ck {
namespace {

enum Field { kLse, kMean, kGradLse, kGradMean, kFields };

// The fields of one side as the tiles take them. A row with no pair (lse = -inf) gets lse = +inf
// and no gradient, so that it adds nothing, whatever came from above.
template <class T>
class Side {
 public:
  Side() = default;
  Side(int64_t size, const at::Tensor& lse, const at::Tensor& mean, const OptionalTensor& grad_lse,
       const OptionalTensor& grad_mean) {
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
    for (int64_t i = 0; i < size; ++i) {
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

template <class T>
class BackwardSweep {
 public:
  BackwardSweep(const PairArguments& arguments, const BackwardInputs& in, Needs needs)
      : a_(arguments), in_(in), needs_(needs), p_(arguments) {
    const bool with_mean = in.grad_mean.has_value() || in.grad_col_mean.has_value();
    fold_ = in.softplus ? Fold::kSoftplus : with_mean ? Fold::kLseMean : Fold::kLse;
    rows_ = Side<T>(p_.x.rows(), in.lse, in.mean, in.grad_lse, in.grad_mean);
    if (in.grad_col_lse.has_value() || in.grad_col_mean.has_value())
      keys_ = Side<T>(p_.keys, in.col_lse, in.col_mean, in.grad_col_lse, in.grad_col_mean);
  }

  BackwardResult run() {
    const bool need_u = needs_.x || needs_.scale;
    const at::TensorOptions options(kScalar<T>);
    at::Tensor u, v, totals;
    const bool attended = in_.attended.numel() > 0 && !needs_.y && !needs_.bias;
    if (attended && need_u) {
      u = from_attended();
    } else if (p_.paired) {
      if (needs_.bias) totals = at::zeros({p_.keys}, at::kDouble);
      if (needs_.y) v = at::zeros(a_.y->sizes(), a_.y->options());  // tiles may be left out
      u = sweep_pairs(v, totals);
    } else if (p_.symmetric) {
      u = at::zeros({p_.x.rows(), p_.x.d()}, options);
      sweep_half(u);
    } else if (needs_.y || needs_.bias) {
      if (need_u) u = at::zeros({p_.x.rows(), p_.x.d()}, options);
      if (needs_.y) v = at::zeros({p_.y.rows(), p_.y.d()}, options);
      if (needs_.bias) totals = at::zeros({p_.keys}, at::kDouble);
      sweep_all(u, v, totals);
    } else if (need_u) {
      u = sweep_rows();
    }
    const at::Tensor none = at::empty({0}, options);
    BackwardResult result{none, none, none, none};
    double along = 0;
    if (need_u) {
      const at::Tensor dx = finish_gradient<T>(u, a_.x, p_.x, p_.normalize, p_.scale, &along);
      if (needs_.x) result.x = dx;
    }
    // both orders of a pair are in u when the matrix is symmetric
    const bool twice = p_.symmetric && !attended;
    if (needs_.scale)
      result.scale = at::scalar_tensor(twice ? along / 2 : along, a_.scale.options());
    if (needs_.y)
      result.y =
          p_.paired ? v : finish_gradient<T>(v, *a_.y, p_.y, p_.normalize, p_.scale, nullptr);
    if (needs_.bias) result.bias = totals.to(a_.bias->scalar_type());
    return result;
  }

 private:
  // dL/dx from the keys weighted in the forward sweep
  at::Tensor from_attended() {
    const at::Tensor u = at::empty({p_.x.rows(), p_.x.d()}, kScalar<T>);
    const int64_t d = p_.x.d();
    const T* attended = in_.attended.template const_data_ptr<T>();
    T* out = u.template data_ptr<T>();
    at::parallel_for(0, p_.x.rows(), divide_up(kSerialWork, d), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T weight = rows_.of(kGradLse)[i] * p_.x.inverse()[i];
        for (int64_t k = 0; k < d; ++k) out[i * d + k] = weight * attended[i * d + k];
      }
    });
    return u;
  }

  void sweep_half(const at::Tensor& u) {
    T* out = u.template data_ptr<T>();
    Workers<T> workers(p_, true);
    for_half_pairs(p_, workers, [&](Worker<T>& w, Range rows, Range keys) {
      part(w, rows, keys, true, out, out, nullptr);
    });
  }

  void sweep_all(const at::Tensor& u, const at::Tensor& v, const at::Tensor& totals) {
    T* to_rows = u.defined() ? u.template data_ptr<T>() : nullptr;
    T* to_keys = v.defined() ? v.template data_ptr<T>() : nullptr;
    double* key_totals = totals.defined() ? totals.data_ptr<double>() : nullptr;
    Workers<T> workers(p_, true);
    for_all_pairs(p_, workers, [&](Worker<T>& w, Range rows, Range keys) {
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
        w.add_to_pairs(to_rows + w.rows().begin * p_.x.d(), v.defined() ? &v : nullptr);
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
  Problem<T> p_;
  Fold fold_;
  Side<T> rows_, keys_;
};

}  // namespace

template <class T>
at::Tensor finish_gradient(const at::Tensor& u, const at::Tensor& tensor, const Features<T>& x,
                           bool normalize, T scale, double* along) {
  const int64_t rows = x.rows(), d = x.d();
  const at::Tensor alongs = at::empty({rows}, kScalar<T>);
  T* out = u.template data_ptr<T>();
  T* products = alongs.template data_ptr<T>();
  x.for_read_blocks([&](Range range, const T* features, int64_t stride) {
    for (int64_t i = range.begin; i < range.end; ++i)
      products[i] = tile_kernels<T>().project(out + i * d, features + (i - range.begin) * stride,
                                              x.inverse()[i], normalize, scale, d, out + i * d);
  });
  if (along != nullptr)
    for (int64_t i = 0; i < rows; ++i) *along += products[i];
  return u.to(tensor.scalar_type());
}

template <class T>
BackwardResult backward_sweep(const PairArguments& arguments, const BackwardInputs& inputs,
                              Needs needs) {
  return BackwardSweep<T>(arguments, inputs, needs).run();
}

template at::Tensor finish_gradient<float>(const at::Tensor&, const at::Tensor&,
                                           const Features<float>&, bool, float, double*);
template at::Tensor finish_gradient<double>(const at::Tensor&, const at::Tensor&,
                                            const Features<double>&, bool, double, double*);
template BackwardResult backward_sweep<float>(const PairArguments&, const BackwardInputs&, Needs);
template BackwardResult backward_sweep<double>(const PairArguments&, const BackwardInputs&, Needs);

}  // namespace ck
