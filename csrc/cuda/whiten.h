// Launchers of the whitening kernels; all pointers are of the device's memory. They throw
// std::runtime_error with the text of a CUDA error.
#pragma once

#include <cstdint>

namespace ck {

// Whether groups of this dim fit into the device's shared memory, forward and backward.
bool whiten_fits(int device, int dim);

// One launch, one block for each group; the arguments are those of whiten_group() in
// whiten_group.h, for all groups one after another.
void whiten_cholesky(int device, std::uintptr_t stream, int groups, int rows, int dim, float eps,
                     const float* x, float* z, float* inverse, int* info);

void whiten_cholesky_backward(int device, std::uintptr_t stream, int groups, int rows, int dim,
                              float eps, const float* grad, const float* z, const float* inverse,
                              float* dx);

}  // namespace ck
