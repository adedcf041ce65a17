// The kernels of whiten_group.h: one block of threads whitens one group.
#include "whiten.h"

#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "whiten_group.h"

namespace ck {
namespace {

struct BlockTeam {
  template <class Body>
  __device__ __forceinline__ void for_each(int count, const Body& body) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) body(i);
  }
  __device__ __forceinline__ void sync() { __syncthreads(); }
  __device__ __forceinline__ void fetch(float* target, const float* source) {
    __pipeline_memcpy_async(target, source, sizeof(float));
  }
  __device__ __forceinline__ void fetch_four(float* target, const float* source) {
    __pipeline_memcpy_async(target, source, sizeof(Four));
  }
  __device__ __forceinline__ void arrive() {
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
  }
};

template <int threads, int blocks>
struct Occupancy {
  static constexpr int kThreads = threads, kBlocks = blocks;  // blocks on one multiprocessor
};
// Small groups mostly wait for their own last result: four of them share a multiprocessor, with as
// many threads as leaves the registers that each kernel needs.
using Small = Occupancy<192, 4>;
using SmallBackward = Occupancy<160, 4>;
using Large = Occupancy<512, 1>;
constexpr int kSmallDim = 64;

template <class Occupancy>
__global__ void __launch_bounds__(Occupancy::kThreads, Occupancy::kBlocks)
    whiten_kernel(GroupShape shape, float eps, const float* x, float* z, float* inverse,
                  int* info) {
  extern __shared__ float4 shared[];
  BlockTeam team;
  const std::int64_t group = blockIdx.x, size = std::int64_t{1} * shape.rows * shape.dim;
  whiten_group(team, shape, eps, x + group * size, z + group * size,
               inverse + group * shape.dim * shape.dim, info + group,
               reinterpret_cast<float*>(shared));
}

template <class Occupancy>
__global__ void __launch_bounds__(Occupancy::kThreads, Occupancy::kBlocks)
    whiten_backward_kernel(GroupShape shape, float eps, const float* grad, const float* z,
                           const float* inverse, float* dx) {
  extern __shared__ float4 shared[];
  BlockTeam team;
  const std::int64_t group = blockIdx.x, size = std::int64_t{1} * shape.rows * shape.dim;
  whiten_group_backward(team, shape, eps, grad + group * size, z + group * size,
                        inverse + group * shape.dim * shape.dim, dx + group * size,
                        reinterpret_cast<float*>(shared));
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

int attribute(int device, cudaDeviceAttr name) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

// Bytes of shared memory that a block may use when `blocks` of them share a multiprocessor.
int shared_limit(int device, int blocks) {
  const int share = attribute(device, cudaDevAttrMaxSharedMemoryPerMultiprocessor) / blocks -
                    attribute(device, cudaDevAttrReservedSharedMemoryPerBlock);
  return min_of(share, attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

template <class Occupancy, class Kernel, class... Arguments>
void launch(Kernel kernel, int device, std::uintptr_t stream, int groups, int matrices,
            GroupShape shape, Arguments... arguments) {
  check(cudaSetDevice(device), "cudaSetDevice");
  const int limit = shared_limit(device, Occupancy::kBlocks);
  shape.panel_rows = choose_panel_rows(shape.rows, shape.dim, matrices, limit);
  if (shape.panel_rows == 0) {
    throw std::runtime_error("whitening " + std::to_string(shape.dim) + " features needs " +
                             std::to_string(shared_bytes(shape.dim, matrices, kRows)) +
                             " bytes of shared memory, and a block has " + std::to_string(limit));
  }
  const int bytes = shared_bytes(shape.dim, matrices, shape.panel_rows);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "cudaFuncSetAttribute");
  kernel<<<groups, Occupancy::kThreads, bytes, reinterpret_cast<cudaStream_t>(stream)>>>(
      shape, arguments...);
  check(cudaGetLastError(), "whitening kernel launch");
}

GroupShape describe(int rows, int dim, std::initializer_list<const float*> pointers) {
  bool aligned = dim % 4 == 0;
  for (const float* p : pointers) aligned &= reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
  return {rows, dim, 0, aligned};
}

}  // namespace

bool whiten_fits(int device, int dim) {
  if (dim > kMaxDim || attribute(device, cudaDevAttrComputeCapabilityMajor) < 8) return false;
  const int blocks = dim <= kSmallDim ? SmallBackward::kBlocks : Large::kBlocks;
  return shared_bytes(dim, 2, kRows) <= shared_limit(device, blocks);
}

void whiten_cholesky(int device, std::uintptr_t stream, int groups, int rows, int dim, float eps,
                     const float* x, float* z, float* inverse, int* info) {
  const GroupShape shape = describe(rows, dim, {x, z, inverse});
  if (dim <= kSmallDim) {
    launch<Small>(whiten_kernel<Small>, device, stream, groups, 1, shape, eps, x, z, inverse, info);
  } else {
    launch<Large>(whiten_kernel<Large>, device, stream, groups, 1, shape, eps, x, z, inverse, info);
  }
}

void whiten_cholesky_backward(int device, std::uintptr_t stream, int groups, int rows, int dim,
                              float eps, const float* grad, const float* z, const float* inverse,
                              float* dx) {
  const GroupShape shape = describe(rows, dim, {grad, z, dx});
  if (dim <= kSmallDim) {
    launch<SmallBackward>(whiten_backward_kernel<SmallBackward>, device, stream, groups, 2, shape,
                          eps, grad, z, inverse, dx);
  } else {
    launch<Large>(whiten_backward_kernel<Large>, device, stream, groups, 2, shape, eps, grad, z,
                  inverse, dx);
  }
}

}  // namespace ck
