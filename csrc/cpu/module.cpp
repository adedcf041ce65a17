// The Python module `_cpu`. It knows no torch: tensors come as addresses, sizes and strides, from
// contrastive_kernels/cpu/, which checks them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "backward.h"
#include "bfloat16.h"
#include "binding.h"
#include "class_dot.h"
#include "forward.h"
#include "max_sim.h"
#include "nested.h"
#include "row_dot.h"
#include "top_k.h"

namespace py = pybind11;

namespace ck {

void bind_whitening(py::module_& m);

namespace {

// address, sizes, strides, dtype
using MatrixTuple = std::tuple<Address, int64_t, int64_t, int64_t, int64_t, int>;

Matrix matrix(const std::optional<MatrixTuple>& given) {
  if (!given) return {};
  const auto [data, rows, d, row_stride, col_stride, dtype] = *given;
  return {at<void>(data), rows, d, row_stride, col_stride, static_cast<Dtype>(dtype)};
}

// those of the rows, those of the keys, whether both are narrow
using IdTuple = std::tuple<Address, Address, bool>;

IdPair id_pair(const IdTuple& given) {
  const auto [rows, keys, narrow] = given;
  return {{at<void>(rows), narrow}, {at<void>(keys), narrow}};
}

// The fields of PairArguments, but y_more.
using PairTuple = std::tuple<MatrixTuple, std::optional<MatrixTuple>, std::optional<MatrixTuple>,
                             int64_t, double, Address, IdTuple, IdTuple, bool>;

template <class T>
PairArguments<T> pair_arguments(const PairTuple& given) {
  const auto& [x, x_more, y, own_keys, scale, bias, exclude, keep, normalize] = given;
  PairArguments<T> a;
  a.x = matrix(x);
  a.x_more = matrix(x_more);
  a.y = matrix(y);
  a.own_keys = own_keys;
  a.scale = static_cast<T>(scale);
  a.bias = at<T>(bias);
  a.exclude = id_pair(exclude);
  a.keep = id_pair(keep);
  a.normalize = normalize;
  return a;
}

Dtype dtype_of(const MatrixTuple& given) { return static_cast<Dtype>(std::get<5>(given)); }

// the fields of Statistics
using StatisticsTuple = std::tuple<Address, Address, Address, Address, Address>;
// threshold, rank, total, count
using CountsTuple = std::tuple<Address, Address, Address, Address>;

template <class T>
Statistics<T> statistics(const StatisticsTuple& to) {
  const auto [lse, low, mean, mean_low, attended] = to;
  return {at<T>(lse), at<T>(low), at<T>(mean), at<T>(mean_low), at<T>(attended)};
}

std::unique_ptr<Keeper> forward(const PairTuple& pairs, int fold, bool keep,
                                const StatisticsTuple& rows, const StatisticsTuple& columns,
                                const CountsTuple& counts, Address partner) {
  return with_compute_type(dtype_of(std::get<0>(pairs)), [&](auto t) {
    using T = decltype(t);
    const auto [threshold, rank, total, count] = counts;
    return forward_sweep<T>(pair_arguments<T>(pairs), {
                                                          .fold = static_cast<Fold>(fold),
                                                          .keep = keep,
                                                          .rows = statistics<T>(rows),
                                                          .columns = statistics<T>(columns),
                                                          .threshold = at<T>(threshold),
                                                          .rank = at<T>(rank),
                                                          .total = at<T>(total),
                                                          .count = at<T>(count),
                                                          .partner = at<T>(partner),
                                                      });
  });
}

// lse, low, mean, grad_lse, grad_mean
using UpstreamTuple = std::tuple<Address, Address, Address, Address, Address>;
// the fields of Gradients
using GradientTuple = std::tuple<Address, Address, bool, Address, bool, bool>;

template <class T>
Upstream<T> upstream(const UpstreamTuple& from) {
  const auto [lse, low, mean, grad_lse, grad_mean] = from;
  return {at<T>(lse), at<T>(low), at<T>(mean), at<T>(grad_lse), at<T>(grad_mean)};
}

template <class T>
Gradients<T> gradients(const GradientTuple& to) {
  const auto [x, y, scale, bias, add_x, add_y] = to;
  return {at<void>(x), at<void>(y), scale, at<T>(bias), add_x, add_y};
}

double backward(const PairTuple& pairs, bool softplus, const UpstreamTuple& rows,
                const UpstreamTuple& columns, Address attended, Address partner,
                const GradientTuple& to) {
  return with_compute_type(dtype_of(std::get<0>(pairs)), [&](auto t) {
    using T = decltype(t);
    return backward_sweep<T>(
        pair_arguments<T>(pairs),
        {softplus, upstream<T>(rows), upstream<T>(columns), at<T>(attended), at<T>(partner)},
        gradients<T>(to));
  });
}

// `ends` of prefixes; rows and columns of each prefix, one after the other
std::unique_ptr<Keeper> forward_nested(const PairTuple& pairs, const std::vector<int64_t>& ends,
                                       int fold, bool keep, const StatisticsTuple& rows,
                                       const StatisticsTuple& columns, Address partner) {
  return with_compute_type(dtype_of(std::get<0>(pairs)), [&](auto t) {
    using T = decltype(t);
    return nested_forward<T>(pair_arguments<T>(pairs), ends,
                             {
                                 .fold = static_cast<Fold>(fold),
                                 .keep = keep,
                                 .rows = statistics<T>(rows),
                                 .columns = statistics<T>(columns),
                                 .partner = at<T>(partner),
                             });
  });
}

double backward_nested(const PairTuple& pairs, const std::vector<int64_t>& ends, bool softplus,
                       const UpstreamTuple& rows, const UpstreamTuple& columns, Address partner,
                       const GradientTuple& to) {
  return with_compute_type(dtype_of(std::get<0>(pairs)), [&](auto t) {
    using T = decltype(t);
    return nested_backward<T>(
        pair_arguments<T>(pairs), ends,
        {softplus, upstream<T>(rows), upstream<T>(columns), nullptr, at<T>(partner)},
        gradients<T>(to));
  });
}

void largest(const PairTuple& pairs, int64_t k, Address floor, Address ceiling, Address values,
             Address ids) {
  with_compute_type(dtype_of(std::get<0>(pairs)), [&](auto t) {
    using T = decltype(t);
    top_k<T>(pair_arguments<T>(pairs),
             {k, at<T>(floor), at<T>(ceiling), at<T>(values), at<int64_t>(ids)});
  });
}

void check_ends(const int64_t* ends, int64_t rows, int64_t total) {
  if (ends[0] >= 0 && std::is_sorted(ends, ends + rows) && ends[rows - 1] == total) return;
  const std::string all = std::to_string(total), got = std::to_string(ends[rows - 1]);
  throw py::value_error("the keys of the rows must be >= 0 in number and " + all + " in all, got " +
                        got + " in all");
}

template <class T>
OwnRows<T> own_rows(const MatrixTuple& x, const MatrixTuple& y, int64_t keys, Address ends,
                    bool normalize) {
  const OwnRows<T> rows{matrix(x), matrix(y), keys, at<int64_t>(ends), normalize};
  if (rows.ends != nullptr) check_ends(rows.ends, rows.x.rows, rows.y.rows);
  return rows;
}

void dot(const MatrixTuple& x, const MatrixTuple& y, int64_t keys, Address ends, bool normalize,
         Address out) {
  with_compute_type(dtype_of(x), [&](auto t) {
    using T = decltype(t);
    row_dot<T>(own_rows<T>(x, y, keys, ends, normalize), at<T>(out));
  });
}

void dot_backward(const MatrixTuple& x, const MatrixTuple& y, int64_t keys, Address ends,
                  bool normalize, Address grad, Address dx, Address dy) {
  with_compute_type(dtype_of(x), [&](auto t) {
    using T = decltype(t);
    row_dot_backward<T>(own_rows<T>(x, y, keys, ends, normalize), at<T>(grad), at<void>(dx),
                        at<void>(dy));
  });
}

void distance(const MatrixTuple& x, const MatrixTuple& y, int64_t keys, bool normalize,
              Address out) {
  with_compute_type(dtype_of(x), [&](auto t) {
    using T = decltype(t);
    row_distance<T>(own_rows<T>(x, y, keys, 0, normalize), at<T>(out));
  });
}

void distance_backward(const MatrixTuple& x, const MatrixTuple& y, int64_t keys, bool normalize,
                       Address distance, Address grad, Address dx, Address dy) {
  with_compute_type(dtype_of(x), [&](auto t) {
    using T = decltype(t);
    row_distance_backward<T>(own_rows<T>(x, y, keys, 0, normalize), at<T>(distance), at<T>(grad),
                             at<void>(dx), at<void>(dy));
  });
}

void dot_of_classes(const MatrixTuple& x, Address places, bool normalize, Address out) {
  with_compute_type(dtype_of(x), [&](auto t) {
    using T = decltype(t);
    class_dot<T>({matrix(x), at<int32_t>(places), normalize}, at<T>(out));
  });
}

void dot_of_classes_backward(const MatrixTuple& x, Address places, bool normalize, Address grad,
                             Address dx, bool add) {
  with_compute_type(dtype_of(x), [&](auto t) {
    using T = decltype(t);
    class_dot_backward<T>({matrix(x), at<int32_t>(places), normalize}, at<T>(grad), at<void>(dx),
                          add);
  });
}

// tokens, ends, sets, kept
using TokenTuple = std::tuple<MatrixTuple, Address, int64_t, Address>;
// the fields of MaxSimArguments
using TokenPairTuple = std::tuple<TokenTuple, TokenTuple, int64_t, double, bool, bool>;

template <class T>
MaxSimArguments<T> max_sim_arguments(const TokenPairTuple& given) {
  const auto token_sets = [](const TokenTuple& side) {
    const auto& [tokens, ends, sets, kept] = side;
    check_ends(at<int64_t>(ends), sets, std::get<1>(tokens));
    return TokenSets{matrix(tokens), at<int64_t>(ends), sets, at<bool>(kept)};
  };
  const auto& [queries, documents, own, temperature, normalize, zeros] = given;
  return {token_sets(queries),
          token_sets(documents),
          own,
          static_cast<T>(temperature),
          normalize,
          zeros};
}

void largest_products(const TokenPairTuple& pairs, Address winners, Address lse, Address scores) {
  with_compute_type(dtype_of(std::get<0>(std::get<0>(pairs))), [&](auto t) {
    using T = decltype(t);
    max_sim<T>(max_sim_arguments<T>(pairs), {at<int32_t>(winners), at<T>(lse)}, at<T>(scores));
  });
}

void largest_products_backward(const TokenPairTuple& pairs, Address winners, Address lse,
                               Address grad, Address dx, Address dy) {
  with_compute_type(dtype_of(std::get<0>(std::get<0>(pairs))), [&](auto t) {
    using T = decltype(t);
    max_sim_backward<T>(max_sim_arguments<T>(pairs), {at<int32_t>(winners), at<T>(lse)},
                        at<T>(grad), at<void>(dx), at<void>(dy));
  });
}

void start(const std::string& capability, Address parallel_for, Address num_threads,
           Address thread_num) {
  set_capability(capability.c_str());
  ThreadFunctions functions;
  functions.parallel_for = reinterpret_cast<decltype(functions.parallel_for)>(parallel_for);
  functions.num_threads = reinterpret_cast<decltype(functions.num_threads)>(num_threads);
  functions.thread_num = reinterpret_cast<decltype(functions.thread_num)>(thread_num);
  set_thread_functions(functions);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = CK_COMPILER;
  info["flags"] = CK_FLAGS;
  info["isa"] = CK_ISAS;
  return info;
}

py::buffer_info values_of(Keeper& keeper) {
  Buffer<char>& values = keeper.values();
  return {values.data(), 1, "B", values.size()};
}

}  // namespace
}  // namespace ck

PYBIND11_MODULE(_cpu, m) {
  using namespace ck;
  m.def("build_info", &build_info, "Compiler, flags and instruction sets of this build.");
  m.def("start", &start,
        "What torch says of the processor, and the addresses of its torch_parallel_for, "
        "torch_get_num_threads and torch_get_thread_idx.");
  m.def(
      "capability", [] { return tile_kernels<float>().isa; },
      "The instruction set that tiles use on this machine.");
  m.def(
      "bfloat16", [] { return bfloat16_kernels() == nullptr ? nullptr : bfloat16_kernels()->isa; },
      "The instruction set of bfloat16 products, or None: they are those of floats.");

  py::class_<Keeper>(m, "Keeper", py::buffer_protocol(), "Logits, and values that stand for them.")
      .def_buffer(&values_of);
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("forward_nested", &forward_nested);
  m.def("backward_nested", &backward_nested);
  m.def("top_k", &largest);
  m.def("row_dot", &dot);
  m.def("row_dot_backward", &dot_backward);
  m.def("row_distance", &distance);
  m.def("row_distance_backward", &distance_backward);
  m.def("class_dot", &dot_of_classes);
  m.def("class_dot_backward", &dot_of_classes_backward);
  m.def("max_sim", &largest_products);
  m.def("max_sim_backward", &largest_products_backward);

  bind_whitening(m);

  m.def("workspace_limit", &workspace_limit, "Bytes of logits that may wait for backwards.");
  m.def("set_workspace_limit", &set_workspace_limit, "Sets that.");
  m.def("workspace_used", &workspace_used, "Bytes of logits that wait for backwards.");
  m.def(
      "memory_peak",
      [] {
        const int64_t now = memory_use.now;
        return memory_use.peak.exchange(now);
      },
      "The most bytes of buffers at one time since this was last asked.");
}
