// Compiled once for each instruction set, with CK_ISA naming it; no torch and little of the
// standard library here, so that no inline function built for a newer machine leaks elsewhere.
#include "tile.h"

#include <type_traits>

#include "columns.h"
#include "convert.h"
#include "eigen.h"
#include "product.h"
#include "simd.h"
#include "transpose.h"
#include "vectors.h"

#define CK_STRING_(x) #x
#define CK_STRING(x) CK_STRING_(x)

namespace ck {
namespace CK_ISA {
namespace {

constexpr int kMaxKeys = 256;

// Row vectors worked on at once: as many as the instruction set's registers hold the sums of.
template <class T>
struct Lane {
  static constexpr int W = kLanes<T>;
  static constexpr int U = W >= 16 ? 4 : 2;
  static constexpr int kBlock = W * U;
  static_assert(kRowPadding % kBlock == 0);
};

template <class T>
CK_FOLD Vec<T> splat(T x) {
  return Vec<T>{} + x;
}

// lanes whose pair stays
template <class T>
CK_FOLD IVec<T> kept(const Tile<T>& tile, int i, int j) {
  using I = IVec<T>;
  const I exclude = load<I>(tile.exclude_row + i) != tile.exclude_key[j];
  return exclude & (load<I>(tile.keep_row + i) == tile.keep_key[j]);
}

// what a logit is made of, as it lies
template <class T>
CK_FOLD Vec<T> entry(const Tile<T>& tile, int i, int j) {
  const T* at = tile.logits.data + i / kPanel * tile.logits.panel + i % kPanel;
  return load<Vec<T>>(at + j * tile.logits.row);
}

template <class T>
CK_FOLD Vec<T> logit(const Tile<T>& tile, int i, int j) {
  return entry(tile, i, j) * tile.key_scale[j] + tile.bias[j];
}

// the statistics of keys, beside those of rows
enum class KeySums { kNone, kSameShift, kOwnShift };

template <class T>
CK_FOLD void add_lanes(double* out, Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int l = 0; l < kLanes<T>; ++l) out[l] += lanes[l];
}

// adds the sum of the lanes of each of `count` vectors
template <class T>
void add_sums(double* out, const Vec<T>* vectors, int count) {
  constexpr int W = kLanes<T>;
  int j = 0;
  for (; j + W <= count; j += W) {
    Vec<T> block[W];
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) block[r] = vectors[j + r];
    transpose_steps<1, T>(block);
#pragma GCC unroll 4
    for (int width = W / 2; width > 0; width /= 2)
#pragma GCC unroll 8
      for (int r = 0; r < width; ++r) block[r] += block[r + width];
    add_lanes<T>(out + j, block[0]);
  }
  for (; j < count; ++j) out[j] += sum_lanes<T>(vectors[j]);
}

template <class T, bool Mean, bool Masked, KeySums OfKeys, bool Store>
void softmax_forward(const Tile<T>& tile, const ForwardSums<T>& sums) {
  using L = Lane<T>;
  using V = Vec<T>;
  using F = SoftmaxFold<Mean>;
  constexpr bool Keys = OfKeys != KeySums::kNone;
  const V infinity = splat(static_cast<T>(__builtin_inf()));
  SoftmaxState<V> key_state[Keys ? kMaxKeys : 1];
  if constexpr (Keys)
    for (int j = 0; j < tile.keys; ++j) key_state[j] = F::template init<V>();
  for (int i0 = 0; i0 < tile.rows; i0 += L::kBlock) {
    SoftmaxState<V> state[L::U];
    V shift[L::U];
    for (int u = 0; u < L::U; ++u) {
      state[u] = F::template init<V>();
      shift[u] = load<V>(sums.shift + i0 + u * L::W);
    }
    for (int j = 0; j < tile.keys; ++j) {
#pragma GCC unroll 8
      for (int u = 0; u < L::U; ++u) {
        const int i = i0 + u * L::W;
        const V z = logit(tile, i, j), above = z - shift[u];
        V weight = exp_of(above), key_above = above, key_weight = weight;
        if constexpr (OfKeys == KeySums::kOwnShift) {
          key_above = z - sums.key_shift[j];
          key_weight = exp_of(key_above);
          key_weight = shift[u] == infinity ? V{} : key_weight;
        }
        if constexpr (Masked) {
          const IVec<T> stays = kept(tile, i, j);
          weight = stays ? weight : V{};
          key_weight = stays ? key_weight : V{};
        }
        F::push(state[u], weight, above);
        if constexpr (Keys) F::push(key_state[j], key_weight, key_above);
        if constexpr (Store) store(tile.data + j * tile.ld + i, weight * tile.key_scale[j]);
      }
    }
    for (int u = 0; u < L::U; ++u) {
      add_lanes<T>(sums.row_sum + i0 + u * L::W, state[u].sum);
      if constexpr (Mean) add_lanes<T>(sums.row_weighted + i0 + u * L::W, state[u].weighted);
    }
  }
  if constexpr (Keys) {
    for (int j = 0; j < tile.keys; ++j) {
      sums.key_sum[j] += sum_lanes<T>(key_state[j].sum);
      if constexpr (Mean) sums.key_weighted[j] += sum_lanes<T>(key_state[j].weighted);
    }
  }
}

template <class T>
void softplus_forward(const Tile<T>& tile, const ForwardSums<T>& sums) {
  using V = Vec<T>;
  for (int i = 0; i < tile.rows; i += kLanes<T>) {
    V total{};
    for (int j = 0; j < tile.keys; ++j) {
      V value = softplus<VectorMath>(logit(tile, i, j));
      if (tile.masked) value = kept(tile, i, j) ? value : V{};
      total += value;
    }
    add_lanes<T>(sums.row_sum + i, total);
  }
}

// runtime flags to template parameters, one at a time
template <class Next>
CK_FOLD void with_flag(bool flag, Next next) {
  if (flag)
    next(std::true_type{});
  else
    next(std::false_type{});
}

template <class T>
void forward(const Tile<T>& tile, Fold fold, const ForwardSums<T>& sums) {
  if (fold == Fold::kSoftplus) return softplus_forward(tile, sums);
  with_flag(fold == Fold::kLseMean, [&](auto mean) {
    with_flag(tile.masked, [&](auto masked) {
      if (sums.store)
        softmax_forward<T, mean(), masked(), KeySums::kNone, true>(tile, sums);
      else if (sums.key_sum == nullptr)
        softmax_forward<T, mean(), masked(), KeySums::kNone, false>(tile, sums);
      else if (sums.key_shift == nullptr)
        softmax_forward<T, mean(), masked(), KeySums::kSameShift, false>(tile, sums);
      else
        softmax_forward<T, mean(), masked(), KeySums::kOwnShift, false>(tile, sums);
    });
  });
}

template <class T, bool Mean, KeySums OfKeys>
CK_FOLD Vec<T> softmax_gradient(const BackwardTile<T>& b, int i, int j, Vec<T> z) {
  using V = Vec<T>;
  const V p = exp_of(z - load<V>(b.row.lse + i));
  V mean{}, grad_mean{};
  if constexpr (Mean) {
    mean = load<V>(b.row.mean + i);
    grad_mean = load<V>(b.row.grad_mean + i);
  }
  V g = softmax_coefficient<Mean>(p, z, mean, load<V>(b.row.grad_lse + i), grad_mean);
  if constexpr (OfKeys != KeySums::kNone) {
    const V q = OfKeys == KeySums::kSameShift ? p : exp_of(z - b.key.lse[j]);
    if constexpr (Mean) {
      mean = splat(b.key.mean[j]);
      grad_mean = splat(b.key.grad_mean[j]);
    }
    g += softmax_coefficient<Mean>(q, z, mean, splat(b.key.grad_lse[j]), grad_mean);
  }
  return g;
}

template <class T, Fold F, bool Masked, KeySums OfKeys, bool Total>
void fold_backward(const Tile<T>& tile, const BackwardTile<T>& b) {
  using L = Lane<T>;
  using V = Vec<T>;
  V key_total[Total ? kMaxKeys : 1], slope{};
  if constexpr (Total)
    for (int j = 0; j < tile.keys; ++j) key_total[j] = V{};
  for (int i0 = 0; i0 < tile.rows; i0 += L::kBlock) {
    for (int j = 0; j < tile.keys; ++j) {
#pragma GCC unroll 8
      for (int u = 0; u < L::U; ++u) {
        const int i = i0 + u * L::W;
        const V z = logit(tile, i, j);
        V g;
        if constexpr (F == Fold::kSoftplus)
          g = load<V>(b.row.grad_lse + i) * sigmoid<VectorMath>(z);
        else
          g = softmax_gradient<T, F == Fold::kLseMean, OfKeys>(b, i, j, z);
        if constexpr (Masked) g = kept(tile, i, j) ? g : V{};
        if constexpr (Total) {
          // the key's part of a padded row may have overflowed
          const V real = load<V>(b.row_valid + i) > 0 ? g : V{};
          key_total[j] += real;
          slope += real == V{} ? V{} : real * (z - tile.bias[j]);
        }
        store(tile.data + j * tile.ld + i, g * load<V>(b.row_scale + i) * tile.key_scale[j]);
      }
    }
  }
  if constexpr (Total) {
    if (b.slope != nullptr) *b.slope += sum_lanes<T>(slope);
    if (b.key_total != nullptr) add_sums<T>(b.key_total, key_total, tile.keys);
  }
}

template <class T>
void backward(const Tile<T>& tile, Fold fold, const BackwardTile<T>& b) {
  with_flag(tile.masked, [&](auto masked) {
    with_flag(b.key_total != nullptr || b.slope != nullptr, [&](auto total) {
      if (fold == Fold::kSoftplus)
        return fold_backward<T, Fold::kSoftplus, masked(), KeySums::kNone, total()>(tile, b);
      with_flag(fold == Fold::kLseMean, [&](auto mean) {
        constexpr Fold F = mean() ? Fold::kLseMean : Fold::kLse;
        if (b.key.lse == nullptr)
          fold_backward<T, F, masked(), KeySums::kNone, total()>(tile, b);
        else if (b.one_shift)
          fold_backward<T, F, masked(), KeySums::kSameShift, total()>(tile, b);
        else
          fold_backward<T, F, masked(), KeySums::kOwnShift, total()>(tile, b);
      });
    });
  });
}

template <class T, Fold F, bool Masked, KeySums OfKeys>
void add_coefficients(const Tile<T>& tile, const PrefixTile<T>& p) {
  using L = Lane<T>;
  using V = Vec<T>;
  const BackwardTile<T>& b = p.of;
  V key_total[kMaxKeys], key_along[kMaxKeys];
  for (int j = 0; j < tile.keys; ++j) key_total[j] = key_along[j] = V{};
  for (int i0 = 0; i0 < tile.rows; i0 += L::kBlock) {
    V along[L::U]{};
    for (int j = 0; j < tile.keys; ++j) {
#pragma GCC unroll 8
      for (int u = 0; u < L::U; ++u) {
        const int i = i0 + u * L::W;
        const V product = entry(tile, i, j);
        const V z = product * tile.key_scale[j] + tile.bias[j];
        V g;
        if constexpr (F == Fold::kSoftplus)
          g = load<V>(b.row.grad_lse + i) * sigmoid<VectorMath>(z);
        else
          g = softmax_gradient<T, false, OfKeys>(b, i, j, z);
        if constexpr (Masked) g = kept(tile, i, j) ? g : V{};
        // the key's part of a padded row may have overflowed
        g = load<V>(b.row_valid + i) > 0 ? g : V{};
        key_total[j] += g;
        along[u] += g * product;
        key_along[j] += g * product;
        T* to = tile.data + j * tile.ld + i;
        const V coefficient = g * load<V>(b.row_scale + i) * p.key_inverse[j];
        store(to, p.add ? load<V>(to) + coefficient : coefficient);
      }
    }
    for (int u = 0; u < L::U; ++u) add_lanes<T>(p.row_along + i0 + u * L::W, along[u]);
  }
  if (b.key_total != nullptr) add_sums<T>(b.key_total, key_total, tile.keys);
  if (p.key_along != nullptr) add_sums<T>(p.key_along, key_along, tile.keys);
}

template <class T>
void prefix_backward(const Tile<T>& tile, Fold fold, const PrefixTile<T>& prefix) {
  with_flag(tile.masked, [&](auto masked) {
    if (fold == Fold::kSoftplus)
      return add_coefficients<T, Fold::kSoftplus, masked(), KeySums::kNone>(tile, prefix);
    with_flag(prefix.of.key.lse != nullptr, [&](auto keys) {
      constexpr KeySums OfKeys = keys() ? KeySums::kOwnShift : KeySums::kNone;
      add_coefficients<T, Fold::kLse, masked(), OfKeys>(tile, prefix);
    });
  });
}

template <class T>
void row_max(const Tile<T>& tile, T* out) {
  using V = Vec<T>;
  const V lowest = splat(-static_cast<T>(__builtin_inf()));
  for (int i = 0; i < tile.rows; i += kLanes<T>) {
    V largest = lowest;
    for (int j = 0; j < tile.keys; ++j) {
      V z = logit(tile, i, j);
      if (tile.masked) z = kept(tile, i, j) ? z : lowest;
      largest = z > largest ? z : largest;
    }
    store(out + i, largest);
  }
}

template <class T>
void raise_key_max(const Tile<T>& tile, const T* row_valid, T* out) {
  using V = Vec<T>;
  const V lowest = splat(-static_cast<T>(__builtin_inf()));
  for (int j = 0; j < tile.keys; ++j) {
    V largest = lowest;
    for (int i = 0; i < tile.rows; i += kLanes<T>) {
      V z = logit(tile, i, j);
      if (tile.masked) z = kept(tile, i, j) ? z : lowest;
      z = load<V>(row_valid + i) > 0 ? z : lowest;
      largest = z > largest ? z : largest;
    }
    T lanes[kLanes<T>];
    store(lanes, largest);
    for (T lane : lanes) out[j] = lane > out[j] ? lane : out[j];
  }
}

template <class T, bool Masked>
void raise_largest_of(const Tile<T>& tile, typename LaneId<T>::type first, T* largest,
                      typename LaneId<T>::type* which) {
  using L = Lane<T>;
  using V = Vec<T>;
  using I = IVec<T>;
  const V lowest = splat(-static_cast<T>(__builtin_inf()));
  for (int i0 = 0; i0 < tile.rows; i0 += L::kBlock) {
    V top[L::U];
    I id[L::U];
    for (int u = 0; u < L::U; ++u) {
      top[u] = load<V>(largest + i0 + u * L::W);
      id[u] = load<I>(which + i0 + u * L::W);
    }
    for (int j = 0; j < tile.keys; ++j) {
#pragma GCC unroll 8
      for (int u = 0; u < L::U; ++u) {
        V z = logit(tile, i0 + u * L::W, j);
        if constexpr (Masked) z = kept(tile, i0 + u * L::W, j) ? z : lowest;
        const I higher = ~(z <= top[u]) & (top[u] == top[u]);
        top[u] = higher ? z : top[u];
        id[u] = higher ? I{} + (first + j) : id[u];
      }
    }
    for (int u = 0; u < L::U; ++u) {
      store(largest + i0 + u * L::W, top[u]);
      store(which + i0 + u * L::W, id[u]);
    }
  }
}

template <class T>
void raise_largest(const Tile<T>& tile, typename LaneId<T>::type first, T* largest,
                   typename LaneId<T>::type* which) {
  with_flag(tile.masked,
            [&](auto masked) { raise_largest_of<T, masked()>(tile, first, largest, which); });
}

template <class T>
void add_counts(const Tile<T>& tile, const Counts<T>& counts) {
  using V = Vec<T>;
  for (int i = 0; i < tile.rows; i += kLanes<T>) {
    const V threshold = load<V>(counts.row_threshold + i);
    const V valid = load<V>(counts.row_valid + i);
    V rank{}, total{}, count{};
    for (int j = 0; j < tile.keys; ++j) {
      const V z = logit(tile, i, j);
      V one = valid;
      if (tile.masked) one = kept(tile, i, j) ? one : V{};
      rank += z <= threshold ? V{} : one;
      total += one * z;
      count += one;
      if (counts.key_threshold != nullptr) {
        counts.key_rank[j] += sum_lanes<T>(z <= counts.key_threshold[j] ? V{} : one);
        counts.key_total[j] += sum_lanes<T>(one * z);
        counts.key_count[j] += sum_lanes<T>(one);
      }
    }
    add_lanes<T>(counts.row_rank + i, rank);
    add_lanes<T>(counts.row_total + i, total);
    add_lanes<T>(counts.row_count + i, count);
  }
}

// those of `Keys` keys from j on and the rows of a block from i0 on; most often there is none
template <class T, bool Masked, bool Bounded, int Keys>
CK_FOLD Found<T>* find_in_block(const Tile<T>& tile, int i0, int j, const Vec<T>* floor,
                                const Vec<T>* ceiling, Found<T>* out) {
  using L = Lane<T>;
  using V = Vec<T>;
  using I = IVec<T>;
  I found[Keys][L::U], some{};
#pragma GCC unroll 4
  for (int q = 0; q < Keys; ++q) {
#pragma GCC unroll 4
    for (int u = 0; u < L::U; ++u) {
      const int i = i0 + u * L::W;
      const V z = logit(tile, i, j + q);
      I above = ~(z <= floor[u]);
      if constexpr (Bounded) above &= (z < ceiling[u]) | (z != z);
      if constexpr (Masked) above &= kept(tile, i, j + q);
      found[q][u] = above;
      some |= above;
    }
  }
  if (!any_lane(some)) return out;
  for (int q = 0; q < Keys; ++q) {
    for (int u = 0; u < L::U; ++u) {
      if (!any_lane(found[q][u])) continue;
      const int i = i0 + u * L::W;
      T values[L::W];
      typename Simd<T>::Integer above[L::W];
      store(values, logit(tile, i, j + q));
      store(above, found[q][u]);
      for (int l = 0; l < L::W; ++l)
        if (above[l] != 0) *out++ = {values[l], i + l, j + q};
    }
  }
  return out;
}

template <class T, bool Masked, bool Bounded>
Found<T>* find_in(const Tile<T>& tile, int begin, int end, const T* floor, const T* ceiling,
                  Found<T>* out) {
  using L = Lane<T>;
  constexpr int kKeys = 4;
  for (int i0 = 0; i0 < tile.rows; i0 += L::kBlock) {
    Vec<T> low[L::U], high[L::U];
    for (int u = 0; u < L::U; ++u) {
      low[u] = load<Vec<T>>(floor + i0 + u * L::W);
      if constexpr (Bounded) high[u] = load<Vec<T>>(ceiling + i0 + u * L::W);
    }
    int j = begin;
    for (; j + kKeys <= end; j += kKeys)
      out = find_in_block<T, Masked, Bounded, kKeys>(tile, i0, j, low, high, out);
    for (; j < end; ++j) out = find_in_block<T, Masked, Bounded, 1>(tile, i0, j, low, high, out);
  }
  return out;
}

template <class T>
int find(const Tile<T>& tile, int begin, int end, const T* floor, const T* ceiling, Found<T>* out) {
  Found<T>* last = out;
  with_flag(tile.masked, [&](auto masked) {
    with_flag(ceiling != nullptr, [&](auto bounded) {
      last = find_in<T, masked(), bounded()>(tile, begin, end, floor, ceiling, out);
    });
  });
  return static_cast<int>(last - out);
}

template <class T>
void pack(const T* x, int64_t stride, int rows, int64_t d, const T* scale, T* out, int64_t ld) {
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < ld; i += W) {
    const int count = rows - i < 0 ? 0 : rows - i < W ? static_cast<int>(rows - i) : W;
    int64_t k = 0;
    for (; k + W <= d; k += W) {
      Vec<T> block[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) {
        block[r] = r < count ? load<Vec<T>>(x + (i + r) * stride + k) : Vec<T>{};
        if (scale != nullptr && r < count) block[r] *= scale[i + r];
      }
      transpose_steps<1, T>(block);
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) store(out + (k + r) * ld + i, block[r]);
    }
    for (; k < d; ++k)
      for (int r = 0; r < W; ++r) {
        T value = r < count ? x[(i + r) * stride + k] : T(0);
        if (scale != nullptr && r < count) value *= scale[i + r];
        out[k * ld + i + r] = value;
      }
  }
}

template <class T>
void scale_rows(T* tile, int64_t ld, int keys, int rows, const T* scale) {
  for (int j = 0; j < keys; ++j)
    for (int i = 0; i < rows; i += kLanes<T>)
      store(tile + j * ld + i, load<Vec<T>>(tile + j * ld + i) * load<Vec<T>>(scale + i));
}

template <class T>
void scaled_tile(const T* tile, int64_t ld, int keys, int rows, const T* row_factor,
                 const T* key_factor, PanelMatrix<T> out) {
  for (int j = 0; j < keys; ++j)
    for (int i = 0; i < rows; i += kLanes<T>)
      store(out.data + i / kPanel * out.panel + j * out.row + i % kPanel,
            load<Vec<T>>(tile + j * ld + i) * (load<Vec<T>>(row_factor + i) * key_factor[j]));
}

}  // namespace

template <class T>
const TileKernels<T>& kernels() {
  static const TileKernels<T> table = {
      .isa = CK_STRING(CK_ISA),
      .read_rows = read_rows<T>,
      .write = write<T>,
      .norms = norms<T>,
      .pack = pack<T>,
      .scale_rows = scale_rows<T>,
      .scaled_tile = scaled_tile<T>,
      .row_max = row_max<T>,
      .raise_key_max = raise_key_max<T>,
      .raise_largest = raise_largest<T>,
      .forward = forward<T>,
      .backward = backward<T>,
      .prefix_backward = prefix_backward<T>,
      .add_counts = add_counts<T>,
      .find = find<T>,
      .dots = dots<T>,
      .project = project<T>,
      .scaled = scaled<T>,
      .distance = distance<T>,
      .add_difference = add_difference<T>,
      .add_scaled = add_scaled<T>,
      .multiply = multiply<Numbers<T>>,
      .center = center<T>,
      .column_squares = column_squares<T>,
      .eliminate = eliminate<T>,
      .eigen = eigen<T>,
  };
  return table;
}

template const TileKernels<float>& kernels<float>();
template const TileKernels<double>& kernels<double>();

}  // namespace CK_ISA
}  // namespace ck
