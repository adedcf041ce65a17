// Whitening of many small groups, in float and double; formulas and names are those of
// contrastive_kernels/whitening/operators.py. All matrices are contiguous; x and dx are of type
// groups.dtype.
#pragma once

#include <cstdint>

#include "group.h"

namespace ck {

template <class T>
void whiten_cholesky(const Groups& groups, double eps, const void* x, T* z, T* inverse,
                     int32_t* info);
template <class T>
void whiten_cholesky_backward(const Groups& groups, double eps, const T* grad, const T* z,
                              const T* inverse, void* dx);

// `vectors` (count, d, d): the eigenvectors are rows, in any order
template <class T>
void whiten_zca(const Groups& groups, double eps, const void* x, T* z, T* vectors, T* roots,
                int32_t* info);
template <class T>
void whiten_zca_backward(const Groups& groups, double eps, const T* grad, const T* z,
                         const T* vectors, const T* roots, void* dx);

template <class T>
void whiten_newton_schulz(const Groups& groups, double eps, int64_t iterations, const void* x, T* z,
                          T* covariance, int32_t* info);
template <class T>
void whiten_newton_schulz_backward(const Groups& groups, double eps, int64_t iterations,
                                   const T* grad, const void* x, const T* covariance, void* dx);

// z (views, rows, d), distance and grad (rows)
template <class T>
void view_distance(int64_t views, int64_t rows, int64_t d, bool normalize, const T* z, T* distance);
template <class T>
void view_distance_backward(int64_t views, int64_t rows, int64_t d, bool normalize, const T* grad,
                            const T* z, T* dz);

}  // namespace ck
