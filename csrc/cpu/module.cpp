// The Python module `_cpu`. Loading it registers the ops; it offers build_info() only.
#include <pybind11/pybind11.h>

#include "tile.h"
#include "workspace_limit.h"

namespace {

#ifdef _OPENMP
constexpr bool kThreaded = true;
#else
constexpr bool kThreaded = false;
#endif

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = CK_COMPILER;
  info["flags"] = CK_FLAGS;
  info["torch"] = CK_TORCH;
  info["isa"] = CK_ISAS;
  info["threaded"] = kThreaded;
  return info;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def("build_info", &build_info,
        "Compiler, flags, torch version, instruction sets and threading of this build.");
  m.def(
      "capability", [] { return ck::tile_kernels<float>().isa; },
      "The instruction set that tiles use on this machine.");
  m.def("workspace_limit", &ck::workspace_limit, "Bytes of logits that may wait for backwards.");
  m.def("set_workspace_limit", &ck::set_workspace_limit, "Sets that.");
  m.def("workspace_used", &ck::workspace_used, "Bytes of logits that wait for backwards.");
}
