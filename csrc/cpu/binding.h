// What the functions of `_cpu` share: tensors come as addresses, and run without the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "tile.h"

namespace ck {

using Address = std::uintptr_t;  // 0: none

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Calls `run(T{})` with the type that features of a dtype are computed in, for as long without the
// GIL.
template <class Run>
auto with_compute_type(Dtype dtype, Run run) {
  const pybind11::gil_scoped_release released;
  return dtype == Dtype::kDouble ? run(double{}) : run(float{});
}

}  // namespace ck
