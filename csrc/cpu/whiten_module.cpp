// The functions of `_cpu` that whiten. Tensors come as addresses, and the caller answers for sizes,
// types and contiguity (contrastive_kernels/whitening/cpu.py); `dtype` is that of the samples.
#include "binding.h"
#include "whiten.h"

namespace py = pybind11;

namespace ck {

void bind_whitening(py::module_& m) {
  m.def("whiten_cholesky", [](int dtype, int64_t count, int64_t rows, int64_t d, double eps,
                              Address x, Address z, Address inverse, Address info) {
    with_compute_type(Dtype(dtype), [&](auto t) {
      using T = decltype(t);
      whiten_cholesky<T>({count, rows, d, Dtype(dtype)}, eps, at<void>(x), at<T>(z), at<T>(inverse),
                         at<int32_t>(info));
    });
  });
  m.def("whiten_cholesky_backward",
        [](int dtype, int64_t count, int64_t rows, int64_t d, double eps, Address grad, Address z,
           Address inverse, Address dx) {
          with_compute_type(Dtype(dtype), [&](auto t) {
            using T = decltype(t);
            whiten_cholesky_backward<T>({count, rows, d, Dtype(dtype)}, eps, at<T>(grad), at<T>(z),
                                        at<T>(inverse), at<void>(dx));
          });
        });
  m.def("whiten_zca", [](int dtype, int64_t count, int64_t rows, int64_t d, double eps, Address x,
                         Address z, Address vectors, Address roots, Address info) {
    with_compute_type(Dtype(dtype), [&](auto t) {
      using T = decltype(t);
      whiten_zca<T>({count, rows, d, Dtype(dtype)}, eps, at<void>(x), at<T>(z), at<T>(vectors),
                    at<T>(roots), at<int32_t>(info));
    });
  });
  m.def("whiten_zca_backward",
        [](int dtype, int64_t count, int64_t rows, int64_t d, double eps, Address grad, Address z,
           Address vectors, Address roots, Address dx) {
          with_compute_type(Dtype(dtype), [&](auto t) {
            using T = decltype(t);
            whiten_zca_backward<T>({count, rows, d, Dtype(dtype)}, eps, at<T>(grad), at<T>(z),
                                   at<T>(vectors), at<T>(roots), at<void>(dx));
          });
        });
  m.def("whiten_newton_schulz",
        [](int dtype, int64_t count, int64_t rows, int64_t d, double eps, int64_t iterations,
           Address x, Address z, Address covariance, Address info) {
          with_compute_type(Dtype(dtype), [&](auto t) {
            using T = decltype(t);
            whiten_newton_schulz<T>({count, rows, d, Dtype(dtype)}, eps, iterations, at<void>(x),
                                    at<T>(z), at<T>(covariance), at<int32_t>(info));
          });
        });
  m.def("whiten_newton_schulz_backward", [](int dtype, int64_t count, int64_t rows, int64_t d,
                                            double eps, int64_t iterations, Address grad, Address x,
                                            Address covariance, Address dx) {
    with_compute_type(Dtype(dtype), [&](auto t) {
      using T = decltype(t);
      whiten_newton_schulz_backward<T>({count, rows, d, Dtype(dtype)}, eps, iterations, at<T>(grad),
                                       at<void>(x), at<T>(covariance), at<void>(dx));
    });
  });
  m.def("view_distance", [](int dtype, int64_t views, int64_t rows, int64_t d, bool normalize,
                            Address z, Address distance) {
    with_compute_type(Dtype(dtype), [&](auto t) {
      using T = decltype(t);
      view_distance<T>(views, rows, d, normalize, at<T>(z), at<T>(distance));
    });
  });
  m.def("view_distance_backward", [](int dtype, int64_t views, int64_t rows, int64_t d,
                                     bool normalize, Address grad, Address z, Address dz) {
    with_compute_type(Dtype(dtype), [&](auto t) {
      using T = decltype(t);
      view_distance_backward<T>(views, rows, d, normalize, at<T>(grad), at<T>(z), at<T>(dz));
    });
  });
}

}  // namespace ck
