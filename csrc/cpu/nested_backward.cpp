// Backward sweeps at several prefixes of the features.
//
// A block of features is in some prefixes and not in shorter ones. From the longest prefix on, a
// tile gathers the coefficients of dL/dz of one prefix after the other, so that each block of
// features is multiplied once, by the sum of those of all the prefixes that it is in.
#include <cmath>

#include "gradient.h"
#include "nested.h"
#include "nested_problem.h"
#include "side.h"

namespace ck {
namespace {

template <class T>
class NestedBackward {
 public:
  NestedBackward(const PairArguments<T>& arguments, const std::vector<int64_t>& ends,
                 const BackwardInputs<T>& in, const Gradients<T>& to)
      : a_(arguments),
        in_(in),
        to_(to),
        p_(arguments, ends),
        rows_(p_.count() * p_.x.rows(), of_rows()),
        row_along_(p_.count() * p_.x.rows(), 0.0),
        key_along_(p_.symmetric ? 0 : p_.count() * p_.keys, 0.0),
        totals_(to.bias == nullptr ? 0 : p_.keys, 0.0) {
    if (in.columns.grad_lse != nullptr) keys_ = Side<T>(p_.count() * p_.keys, in.columns);
    const KeptLogits kept = find_logits(in.rows.low);
    // half of a matrix is walked by as many threads as it was
    if (!kept.half || kept.threads == num_threads()) p_.kept = kept;
  }

  double run() {
    // sums over the other side, which `project` makes those of normalised features
    Gradient<T> u(to_.x != nullptr, to_.x, a_.x.dtype, false, p_.x, false, p_.logit_scale);
    Gradient<T> v(to_.y != nullptr, to_.y, a_.y.dtype, false, p_.y, false, p_.logit_scale);
    u.start({0, p_.x.rows()});
    v.start({0, p_.y.rows()});
    NestedWorkers<T> workers(p_);
    const auto visit = [&](NestedWorker<T>& w, Range rows, Range keys) {
      part(w, rows, keys, u.rows(), p_.symmetric ? u.rows() : v.rows());
    };
    if (p_.symmetric)
      for_half_pairs(p_, workers, visit);
    else
      for_all_pairs(p_, workers, {0, p_.x.rows()}, {0, p_.keys}, visit);
    project(p_.x, p_.of_rows(0), row_along_, u.rows());
    u.finish();
    if (!p_.symmetric) project(p_.y, p_.of_keys(0), key_along_, v.rows());
    v.finish();
    std::copy_n(totals_.data(), totals_.size(), to_.bias);
    double slope = 0;
    for (int64_t i = 0; i < row_along_.size(); ++i) slope += row_along_[i];
    return p_.symmetric ? slope / 2 : slope;  // both orders of a pair are in it
  }

 private:
  Upstream<T> of_rows() const {
    Upstream<T> rows = in_.rows;
    if (in_.softplus) rows.low = nullptr;  // stands for logits
    return rows;
  }

  void part(NestedWorker<T>& w, Range rows, Range keys, T* to_rows, T* to_keys) {
    enum Lanes { kValidLanes };
    const int64_t size = p_.count() * p_.block_rows;
    Buffer<T> lse(size), grad(size);
    Buffer<double> along(size);
    const T* valid = nullptr;
    const auto start = [&](Range) {
      std::fill_n(along.data(), size, 0.0);
      valid = w.valid_lanes(kValidLanes);
      for (int64_t k = 0; k < p_.count(); ++k) {
        w.put_lanes(rows_.of(Side<T>::kLse), k, std::numeric_limits<T>::infinity(), lse.data());
        w.put_lanes(rows_.of(Side<T>::kGradLse), k, 0, grad.data());
      }
    };
    const auto push = [&](bool mirrored) {
      for (int64_t k = p_.count() - 1; k >= 0; --k) {
        const int64_t at = k * p_.block_rows, first_key = k * p_.keys + w.keys().begin;
        const bool both = mirrored || !p_.symmetric;
        w.select(k);
        PrefixTile<T> tile{};
        tile.of.row = {lse.data() + at, nullptr, grad.data() + at, nullptr};
        tile.of.row_scale = w.row_inverse(k);
        tile.of.row_valid = valid;
        const Side<T>& side = p_.symmetric ? rows_ : keys_;
        if (side.given()) tile.of.key = side.from(first_key);
        if (!totals_.empty()) tile.of.key_total = totals_.data() + w.keys().begin;
        tile.key_inverse = w.key_inverse(k);
        tile.add = k < p_.count() - 1;
        tile.row_along = along.data() + at;
        if (both) tile.key_along = (p_.symmetric ? row_along_ : key_along_).data() + first_key;
        p_.kernels.prefix_backward(w.tile(), in_.softplus ? Fold::kSoftplus : Fold::kLse, tile);
        if (in_.grad_partner != nullptr) add_partners(w, tile, k);
        if (to_rows != nullptr) w.add_to_rows(to_rows + w.rows().begin * p_.x.d(), true, k);
        if (to_keys != nullptr && both) w.add_to_keys(to_keys + w.keys().begin * p_.x.d(), k);
      }
    };
    for_tiles(p_, w, rows, keys, p_.symmetric, start, push, [&](Range block) {
      for (int64_t k = 0; k < p_.count(); ++k)
        for (int64_t i = 0; i < block.size(); ++i)
          row_along_[k * p_.x.rows() + block.begin + i] += along[k * p_.block_rows + i];
    });
  }

  void add_partners(NestedWorker<T>& w, const PrefixTile<T>& tile, int64_t k) {
    const T* from = in_.grad_partner + k * p_.x.rows();
    w.for_partners([&](int64_t row, int64_t key, int64_t i, int64_t j) {
      const T grad = from[row] + (p_.symmetric ? from[key] : T{0});
      const T part = grad * w.entry(i, j);
      w.coefficient(i, j) += grad * tile.of.row_scale[i] * tile.key_inverse[j];
      tile.row_along[i] += part;
      if (tile.key_along != nullptr) tile.key_along[j] += part;
      if (tile.of.key_total != nullptr) tile.of.key_total[j] += grad;
    });
  }

  // For z = <x, y> / |x| of each prefix: u -= x <x, u> / |x|^2, with `along` = <x, u>, in the
  // features that the prefix has.
  void project(const Features<T>& features, const T* inverse, const Buffer<double>& along, T* u) {
    if (u == nullptr || !p_.normalize) return;
    const int64_t d = features.d(), n = features.rows();
    features.for_read_blocks({0, n}, [&](Range range, const T* rows, int64_t stride) {
      for (int64_t i = range.begin; i < range.end; ++i) {
        double radial = 0;
        for (int64_t k = p_.count() - 1; k >= 0; --k) {
          const T one = inverse[k * n + i];
          // a norm that was raised to 1e-12 is a constant
          if (one < kLargestInverse<T>) radial += along[k * n + i] * one * one;
          const Range block = p_.blocks[k];
          p_.kernels.add_scaled(-static_cast<T>(radial),
                                rows + (i - range.begin) * stride + block.begin, block.size(),
                                u + i * d + block.begin);
        }
      }
    });
  }

  const PairArguments<T> a_;
  const BackwardInputs<T> in_;
  const Gradients<T> to_;
  NestedProblem<T> p_;
  Side<T> rows_, keys_;
  // of each prefix and each row (key): the sum of dL/dz times the product of normalised features
  Buffer<double> row_along_, key_along_;
  Buffer<double> totals_;
};

}  // namespace

template <class T>
double nested_backward(const PairArguments<T>& arguments, const std::vector<int64_t>& ends,
                       const BackwardInputs<T>& inputs, const Gradients<T>& to) {
  return NestedBackward<T>(arguments, ends, inputs, to).run();
}

template double nested_backward(const PairArguments<float>&, const std::vector<int64_t>&,
                                const BackwardInputs<float>&, const Gradients<float>&);
template double nested_backward(const PairArguments<double>&, const std::vector<int64_t>&,
                                const BackwardInputs<double>&, const Gradients<double>&);

}  // namespace ck
