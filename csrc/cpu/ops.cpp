// The registered operators of the cpu backend; their schemas are defined in registration.py.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "backward.h"
#include "forward.h"
#include "schedule.h"

namespace ck {
namespace {

using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

void check_operands(const at::Tensor& x, const at::Tensor& y) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x must have shape (N, D), got ", x.sizes());
  TORCH_CHECK_VALUE(y.dim() == 2 || (y.dim() == 3 && y.size(0) == x.size(0)),
                    "y must have shape (M, D) or (N, M, D), got ", y.sizes());
  TORCH_CHECK_VALUE(x.size(-1) == y.size(-1), "x and y must have the same D, got ", x.size(-1),
                    " and ", y.size(-1));
  TORCH_CHECK_VALUE(x.numel() > 0 && y.numel() > 0, "x and y must not be empty, got ", x.sizes(),
                    " and ", y.sizes());
  TORCH_CHECK_TYPE((x.scalar_type() == at::kDouble) == (y.scalar_type() == at::kDouble),
                   "x and y must both be float64 or neither, got ", x.scalar_type(), " and ",
                   y.scalar_type());
}

void check_length(const OptionalTensor& t, const char* name, int64_t size) {
  if (!t.has_value()) return;
  TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == size, name, " must have shape (", size,
                    "), got ", t->sizes());
}

PairArguments check_pairs(const at::Tensor& x, const OptionalTensor& y, const at::Tensor& scale,
                          const OptionalTensor& bias, const OptionalTensor& exclude_rows,
                          const OptionalTensor& exclude_cols, const OptionalTensor& keep_rows,
                          const OptionalTensor& keep_cols, bool normalize, bool together = false) {
  static const OptionalTensor none;
  if (together) {  // the rows of both, with themselves
    TORCH_CHECK_VALUE(y.has_value() && y->dim() == 2 && y->scalar_type() == x.scalar_type() &&
                          !bias.has_value() && !exclude_cols.has_value() && !keep_cols.has_value(),
                      "together takes y (M, D) of the dtype of x, row ids only, and no bias");
    check_operands(x, *y);
    check_length(exclude_rows, "exclude_rows", x.size(0) + y->size(0));
    check_length(keep_rows, "keep_rows", x.size(0) + y->size(0));
    TORCH_CHECK_VALUE(scale.numel() == 1, "scale must have one element, got ", scale.sizes());
    return {
        .x = x,
        .x_more = y,
        .y = none,
        .y_more = none,
        .scale = scale,
        .bias = none,
        .exclude_rows = exclude_rows,
        .exclude_cols = exclude_rows,
        .keep_rows = keep_rows,
        .keep_cols = keep_rows,
        .normalize = normalize,
    };
  }
  const at::Tensor& keys = y.has_value() ? *y : x;
  check_operands(x, keys);
  TORCH_CHECK_VALUE(scale.numel() == 1, "scale must have one element, got ", scale.sizes());
  check_length(bias, "bias", keys.size(-2));
  check_length(exclude_rows, "exclude_rows", x.size(0));
  check_length(keep_rows, "keep_rows", x.size(0));
  check_length(exclude_cols, "exclude_cols", keys.size(-2));
  check_length(keep_cols, "keep_cols", keys.size(-2));
  TORCH_CHECK_VALUE(
      y.has_value() || (!bias.has_value() && !exclude_cols.has_value() && !keep_cols.has_value()),
      "a self-similarity (y absent) takes row ids only, and no bias");
  // ids of a self-similarity serve both sides
  const bool self = !y.has_value();
  return {
      .x = x,
      .x_more = none,
      .y = y,
      .y_more = none,
      .scale = scale,
      .bias = bias,
      .exclude_rows = exclude_rows,
      .exclude_cols = self ? exclude_rows : exclude_cols,
      .keep_rows = keep_rows,
      .keep_cols = self ? keep_rows : keep_cols,
      .normalize = normalize,
  };
}

at::Tensor or_empty(const at::Tensor& t, const at::Tensor& x) {
  if (t.defined()) return t;
  return at::empty({0}, x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
           at::Tensor, at::Tensor, at::Tensor, at::Tensor>
row_stats(const at::Tensor& x, const OptionalTensor& y, const at::Tensor& scale,
          const OptionalTensor& bias, const OptionalTensor& exclude_rows,
          const OptionalTensor& exclude_cols, const OptionalTensor& keep_rows,
          const OptionalTensor& keep_cols, const OptionalTensor& threshold, bool mean,
          bool normalize, bool columns, bool attend, bool together) {
  const auto pairs = check_pairs(x, y, scale, bias, exclude_rows, exclude_cols, keep_rows,
                                 keep_cols, normalize, together);
  check_length(threshold, "threshold", x.size(0) + (together ? y->size(0) : 0));
  TORCH_CHECK_VALUE(!columns || (y.has_value() && y->dim() == 2 && !together),
                    "columns need keys (M, D)");
  TORCH_CHECK_VALUE(!attend || !(together || (y.has_value() && y->dim() == 3)),
                    "attend needs shared keys");
  const Fold fold = mean ? Fold::kLseMean : Fold::kLse;
  // a backward sweep may follow: this runs below autograd, which leaves the mode on where it
  // records
  const auto learned = [](const OptionalTensor& t) { return t.has_value() && t->requires_grad(); };
  const bool keep = at::GradMode::is_enabled() && !attend &&
                    (learned(x) || learned(y) || learned(scale) || learned(bias));
  const ForwardResult r = with_compute_type(x, [&](auto t) {
    return forward_sweep<decltype(t)>(
        pairs,
        {.fold = fold, .columns = columns, .attend = attend, .keep = keep, .threshold = threshold});
  });
  return {r.lse,
          or_empty(r.mean, x),
          or_empty(r.col_lse, x),
          or_empty(r.col_mean, x),
          or_empty(r.rank, x),
          or_empty(r.total, x),
          or_empty(r.count, x),
          or_empty(r.attended, x),
          or_empty(at::Tensor(), x),
          or_empty(r.lse_low, x),
          or_empty(r.col_lse_low, x)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
           at::Tensor>
row_softplus(const at::Tensor& x, const OptionalTensor& y, const at::Tensor& scale,
             const OptionalTensor& bias, const OptionalTensor& exclude_rows,
             const OptionalTensor& exclude_cols, const OptionalTensor& keep_rows,
             const OptionalTensor& keep_cols, const OptionalTensor& threshold, bool normalize,
             std::array<bool, 4> attend) {
  TORCH_CHECK_VALUE(y.has_value(), "row_softplus needs y");
  TORCH_CHECK_VALUE(attend == (std::array<bool, 4>{}), "the sum over rows is not offered here");
  const auto pairs =
      check_pairs(x, y, scale, bias, exclude_rows, exclude_cols, keep_rows, keep_cols, normalize);
  check_length(threshold, "threshold", x.size(0));
  const ForwardResult r = with_compute_type(x, [&](auto t) {
    return forward_sweep<decltype(t)>(pairs, {.fold = Fold::kSoftplus, .threshold = threshold});
  });
  return {r.lse,
          or_empty(r.rank, x),
          or_empty(r.total, x),
          or_empty(r.count, x),
          at::empty({0}, x.options()),
          at::empty({0}, y->options()),
          or_empty(at::Tensor(), x),
          or_empty(at::Tensor(), x)};
}

Four run_backward(const PairArguments& pairs, const BackwardInputs& inputs,
                  std::array<bool, 4> needs) {
  const bool together = pairs.x_more.has_value();
  const BackwardResult r = with_compute_type(pairs.x, [&](auto t) {
    return backward_sweep<decltype(t)>(pairs, inputs,
                                       {.x = needs[0] || (together && needs[1]),
                                        .y = needs[1] && !together,
                                        .scale = needs[2],
                                        .bias = needs[3]});
  });
  return {r.x, r.y, r.scale, r.bias};
}

Four row_stats_backward(const at::Tensor& x, const OptionalTensor& y, const at::Tensor& scale,
                        const OptionalTensor& bias, const OptionalTensor& exclude_rows,
                        const OptionalTensor& exclude_cols, const OptionalTensor& keep_rows,
                        const OptionalTensor& keep_cols, const at::Tensor& lse,
                        const at::Tensor& mean, const at::Tensor& col_lse,
                        const at::Tensor& col_mean, const at::Tensor& attended,
                        const at::Tensor& /*slope*/, const at::Tensor& lse_low,
                        const at::Tensor& col_lse_low, const OptionalTensor& grad_lse,
                        const OptionalTensor& grad_mean, const OptionalTensor& grad_col_lse,
                        const OptionalTensor& grad_col_mean, bool normalize,
                        std::array<bool, 4> needs, bool together) {
  const auto pairs = check_pairs(x, y, scale, bias, exclude_rows, exclude_cols, keep_rows,
                                 keep_cols, normalize, together);
  return run_backward(pairs,
                      {
                          .lse = lse,
                          .lse_low = lse_low,
                          .mean = mean,
                          .col_lse = col_lse,
                          .col_lse_low = col_lse_low,
                          .col_mean = col_mean,
                          .attended = attended,
                          .grad_lse = grad_lse,
                          .grad_mean = grad_mean,
                          .grad_col_lse = grad_col_lse,
                          .grad_col_mean = grad_col_mean,
                      },
                      needs);
}

Four row_softplus_backward(const at::Tensor& x, const OptionalTensor& y, const at::Tensor& scale,
                           const OptionalTensor& bias, const OptionalTensor& exclude_rows,
                           const OptionalTensor& exclude_cols, const OptionalTensor& keep_rows,
                           const OptionalTensor& keep_cols, const at::Tensor& grad, bool normalize,
                           std::array<bool, 4> needs) {
  const auto pairs =
      check_pairs(x, y, scale, bias, exclude_rows, exclude_cols, keep_rows, keep_cols, normalize);
  const at::Tensor none = at::empty({0}, grad.options());
  return run_backward(pairs,
                      {
                          .softplus = true,
                          .lse = none,
                          .lse_low = none,
                          .mean = none,
                          .col_lse = none,
                          .col_lse_low = none,
                          .col_mean = none,
                          .attended = none,
                          .grad_lse = grad,
                      },
                      needs);
}

// Which keys are those of a row: as many for each, or the run that ends where `ends` says.
struct Runs {
  int64_t keys;
  const int64_t* ends = nullptr;

  Range of(int64_t row) const {
    if (!ends) return {row * keys, (row + 1) * keys};
    return {row > 0 ? ends[row - 1] : 0, ends[row]};
  }
};

Runs check_runs(const at::Tensor& x, const at::Tensor& y, const OptionalTensor& ends) {
  check_operands(x, y);
  TORCH_CHECK_VALUE(ends.has_value() == (y.dim() == 2), "y must have shape (N, K, D), or (T, D) ",
                    "with ends, got ", y.sizes());
  if (!ends.has_value()) return {y.size(1)};
  check_length(ends, "ends", x.size(0));
  TORCH_CHECK_TYPE(ends->scalar_type() == at::kLong && ends->is_contiguous(),
                   "ends must be contiguous int64");
  const int64_t* values = ends->const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(values[0] >= 0 && std::is_sorted(values, values + x.size(0)) &&
                        values[x.size(0) - 1] == y.size(0),
                    "the keys of the rows must be >= 0 in number and ", y.size(0), " in all, got ",
                    values[x.size(0) - 1], " in all");
  return {y.size(0) / x.size(0) + 1, values};
}

// visit(i, row i of x, a block of its own keys, where they are, their stride) for the blocks of
// each row in turn, then done(i, row i of x)
template <class T, class Visit, class Done>
void for_rows(const Features<T>& x, const Features<T>& y, const Runs& runs, Visit visit,
              Done done) {
  constexpr int64_t kBlock = 64;
  const int64_t d = x.d();
  const int64_t grain = divide_up(kSerialWork, runs.keys * d);
  at::parallel_for(0, x.rows(), grain, [&](int64_t begin, int64_t end) {
    const at::Tensor buffer = at::empty({(1 + kBlock) * d}, kScalar<T>);
    T* copy = buffer.template data_ptr<T>();
    for (int64_t i = begin; i < end; ++i) {
      int64_t x_stride, y_stride;
      const T* row = x.read({i, i + 1}, copy, &x_stride);
      const Range own = runs.of(i);
      for (int64_t j = own.begin; j < own.end; j += kBlock) {
        const Range block{j, std::min(own.end, j + kBlock)};
        const T* keys = y.read(block, copy + d, &y_stride);
        visit(i, row, block, keys, y_stride);
      }
      done(i, row);
    }
  });
}

at::Tensor flat(const at::Tensor& y) { return y.dim() == 3 ? y.reshape({-1, y.size(2)}) : y; }

at::Tensor row_dot(const at::Tensor& x, const at::Tensor& y, const OptionalTensor& ends,
                   bool normalize) {
  const Runs runs = check_runs(x, y, ends);
  return with_compute_type(x, [&](auto t) {
    using T = decltype(t);
    const Features<T> queries(x, normalize), own(flat(y), normalize, false);
    const at::Tensor out = at::empty(y.sizes().slice(0, y.dim() - 1), kScalar<T>);
    const at::Tensor inverse = at::empty_like(out);
    T* values = out.data_ptr<T>();
    T* inverses = inverse.data_ptr<T>();
    for_rows(
        queries, own, runs,
        [&](int64_t i, const T* row, Range block, const T* keys, int64_t stride) {
          tile_kernels<T>().dots(row, keys, stride, normalize, queries.inverse()[i], block.size(),
                                 x.size(1), values + block.begin, inverses + block.begin, 1);
        },
        [](int64_t, const T*) {});
    return out;
  });
}

// A key whose product has the gradient 0 is not read: NaN in one that is left out goes nowhere.
std::tuple<at::Tensor, at::Tensor> row_dot_backward(const at::Tensor& x, const at::Tensor& y,
                                                    const OptionalTensor& ends,
                                                    const at::Tensor& grad, bool normalize,
                                                    std::array<bool, 2> needs) {
  const Runs runs = check_runs(x, y, ends);
  return with_compute_type(x, [&](auto t) -> std::tuple<at::Tensor, at::Tensor> {
    using T = decltype(t);
    const auto& kernels = tile_kernels<T>();
    const int64_t d = x.size(1);
    const Features<T> queries(x, normalize), own(flat(y), normalize);
    const at::Tensor weights = grad.to(kScalar<T>).contiguous();
    const T* weight_of = weights.const_data_ptr<T>();
    const at::Tensor dx = at::empty({needs[0] ? x.size(0) : 0, d}, kScalar<T>);
    const at::Tensor dy = at::empty({needs[1] ? own.rows() : 0, d}, kScalar<T>);
    T *to_x = dx.data_ptr<T>(), *to_y = dy.data_ptr<T>();
    if (needs[0]) dx.zero_();
    for_rows(
        queries, own, runs,
        [&](int64_t i, const T* row, Range block, const T* keys, int64_t stride) {
          for (int64_t j = block.begin; j < block.end; ++j) {
            if (weight_of[j] == 0) {
              if (needs[1]) std::fill_n(to_y + j * d, d, T{0});
              continue;
            }
            const T* key = keys + (j - block.begin) * stride;
            const T weight = weight_of[j] * queries.inverse()[i] * own.inverse()[j];
            if (needs[0]) kernels.add_scaled(weight, key, d, to_x + i * d);
            if (needs[1])
              kernels.project(row, key, own.inverse()[j], normalize, weight, d, to_y + j * d);
          }
        },
        [&](int64_t i, const T* row) {
          if (needs[0])
            kernels.project(to_x + i * d, row, queries.inverse()[i], normalize, T{1}, d,
                            to_x + i * d);
        });
    return {needs[0] ? dx.to(x.scalar_type()) : at::empty({0}, x.options()),
            needs[1] ? dy.to(y.scalar_type()).view(y.sizes()) : at::empty({0}, y.options())};
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(contrastive_kernels, CPU, m) {
  m.impl("row_stats_cpu", row_stats);
  m.impl("row_stats_backward_cpu", row_stats_backward);
  m.impl("row_softplus_cpu", row_softplus);
  m.impl("row_softplus_backward_cpu", row_softplus_backward);
  m.impl("row_dot_cpu", row_dot);
  m.impl("row_dot_backward_cpu", row_dot_backward);
}

}  // namespace ck
