// The Python module `_cuda`. It knows no torch: pointers and the stream are integers, and the
// caller answers for sizes, types and contiguity (contrastive_kernels/whitening/cuda.py).
#include <pybind11/pybind11.h>

#include "whiten.h"

namespace {

using Address = std::uintptr_t;

template <class T = float>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.attr("ARCHITECTURES") = CK_CUDA_ARCHITECTURES;
  m.attr("COMPILER") = CK_CUDA_COMPILER;
  m.def("whiten_fits", &ck::whiten_fits, pybind11::arg("device"), pybind11::arg("dim"));
  m.def("whiten_cholesky", [](int device, Address stream, int groups, int rows, int dim, float eps,
                              Address x, Address z, Address inverse, Address info) {
    ck::whiten_cholesky(device, stream, groups, rows, dim, eps, pointer(x), pointer(z),
                        pointer(inverse), pointer<int>(info));
  });
  m.def("whiten_cholesky_backward",
        [](int device, Address stream, int groups, int rows, int dim, float eps, Address grad,
           Address z, Address inverse, Address dx) {
          ck::whiten_cholesky_backward(device, stream, groups, rows, dim, eps, pointer(grad),
                                       pointer(z), pointer(inverse), pointer(dx));
        });
}
