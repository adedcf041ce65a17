// One similarity matrix at several prefixes of the features: products are made once, block of
// features by block, and each prefix has the logits of its own norms.
#pragma once

#include "schedule.h"

namespace ck {

// PairArguments of the whole features, which prefixes that end at `ends`, ascending, are of; the
// last one is d. blocks[k] are the features that prefix k has and k - 1 has not.
template <class T>
struct NestedProblem : Problem<T> {
  NestedProblem(const PairArguments<T>& arguments, const std::vector<int64_t>& ends)
      : Problem<T>(without_scale(arguments), ends),
        logit_scale(arguments.scale),
        row_inverse(inverses(this->x)),
        key_inverse(this->symmetric ? Buffer<T>() : inverses(this->y)),
        key_scale(this->block_keys, logit_scale) {}

  int64_t count() const { return static_cast<int64_t>(this->blocks.size()); }
  const T* of_rows(int64_t k) const { return row_inverse.data() + k * this->x.rows(); }
  const T* of_keys(int64_t k) const {
    return this->symmetric ? of_rows(k) : key_inverse.data() + k * this->keys;
  }

  // Of how many prefixes logits are kept where there is room for those of `room`: the longest
  // ones, as what is made again of a prefix is made of all shorter ones; so many as save most, or
  // none. Each counts for half as many features as in a single sweep: it is scaled again too.
  int64_t best_kept(double room) const {
    int64_t best = 0;
    double most = 0;
    for (int64_t sets = 1; sets <= count(); ++sets) {
      const double share = this->symmetric && room < sets ? 0 : std::min(1.0, room / sets);
      const int64_t again = this->x.d() - this->blocks[count() - sets].begin;
      const double saved = share * (again - sets * this->few_features() / 2);
      if (saved > most) best = sets, most = saved;
    }
    return best;
  }
  int64_t padded_rows() const { return divide_up(this->x.rows(), kRowPadding) * kRowPadding; }
  // the first prefix whose logits are kept
  int64_t first_kept() const { return count() - this->kept.rows / padded_rows(); }

  const T logit_scale;
  Buffer<T> row_inverse, key_inverse;  // (prefixes, rows or keys): 1 / norm
  Buffer<T> key_scale;                 // of a tile's keys: that of logits

 private:
  static PairArguments<T> without_scale(PairArguments<T> arguments) {
    arguments.scale = 1;
    return arguments;
  }

  Buffer<T> inverses(const Features<T>& features) const {
    Buffer<T> out(count() * features.rows(), T{1});
    if (!this->normalize) return out;
    features.for_read_blocks({0, features.rows()}, [&](Range range, const T* rows, int64_t stride) {
      for (int64_t k = 0; k < count(); ++k)
        this->kernels.norms(rows, stride, range.size(), this->blocks[k].end,
                            out.data() + k * features.rows() + range.begin, nullptr);
    });
    return out;
  }
};

// One thread's tile, which has the logits of one prefix at a time.
template <class T>
class NestedWorker : public Worker<T> {
 public:
  explicit NestedWorker(const NestedProblem<T>& problem)
      : Worker<T>(problem),
        nested_(problem),
        factors_(problem.count() * problem.block_rows),
        logits_(problem.count()) {}

  void take_rows(Range rows) {
    Worker<T>::take_rows(rows, false);
    for (int64_t k = 0; k < nested_.count(); ++k)
      put_lanes(nested_.of_rows(0), k, 0, factors_.data());
  }
  // 1 / norm of the block's rows; 0 for the padding
  const T* row_inverse(int64_t k) const { return factors_.data() + k * nested_.block_rows; }

  // makes the products of normalised features of all prefixes against `keys`; false: every pair is
  // dropped
  bool make_tile(Range keys) {
    if (!this->aim(keys)) return false;
    const Tile<T>& tile = this->tile_;
    const int64_t size = nested_.block_keys * tile.ld;
    const bool kept = this->kept_place().data != nullptr;
    const int64_t first = kept ? nested_.first_kept() : nested_.count();
    if (first > 0 && own_.empty()) own_ = Buffer<T>(nested_.count() * nested_.block_keys * room());
    for (int64_t k = 0; k < nested_.count(); ++k) {
      if (k < first)
        logits_[k] = {own_.data() + k * size, tile.ld};
      else
        logits_[k] = this->kept_place(k - first);
    }
    const int64_t made = nested_.keeps ? nested_.count() : first;  // the others are there
    for (int64_t i = 0; i < tile.rows; i += kPanel) {
      const PanelMatrix<T> sums = this->panel({tile.data, tile.ld}, i);
      for (int64_t k = 0; k < made; ++k) {
        this->multiply(k, i, sums, k > 0);
        nested_.kernels.scaled_tile(sums.data, sums.row, tile.keys, kPanel, row_inverse(k) + i,
                                    key_inverse(k), this->panel(logits_[k], i));
      }
    }
    return true;
  }

  // the tile's logits are those of prefix k
  void select(int64_t k) {
    this->tile_.logits = {logits_[k].data, logits_[k].row, logits_[k].panel};
    this->tile_.key_scale = nested_.key_scale.data();
  }
  const T* key_inverse(int64_t k) const { return nested_.of_keys(k) + this->keys_.begin; }

  // values (prefixes, rows) of the block's rows for prefix k, padded with `pad`, at its place in
  // lanes (prefixes, block_rows), which is returned
  T* put_lanes(const T* values, int64_t k, T pad, T* lanes) const {
    T* out = lanes + k * nested_.block_rows;
    std::copy_n(values + k * nested_.x.rows() + this->rows_.begin, this->rows_.size(), out);
    std::fill(out + this->rows_.size(), out + this->tile_.rows, pad);
    return out;
  }

  using Worker<T>::entry;
  T& coefficient(int64_t i, int64_t j) { return this->tile_.data[j * this->tile_.ld + i]; }

 private:
  int64_t room() const { return nested_.block_rows + 64 / static_cast<int64_t>(sizeof(T)); }

  const NestedProblem<T>& nested_;
  Buffer<T> factors_, own_;
  std::vector<PanelMatrix<T>> logits_;
};

template <class T>
using NestedWorkers = Workers<T, NestedWorker<T>, NestedProblem<T>>;

}  // namespace ck
