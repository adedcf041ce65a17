// Cholesky whitening of one group by a team of threads, forward and backward; the formulas are in
// whiten_group() and whiten_group_backward().
//
// A Team brings for_each(count, body), whose bodies may run in any order and at once, sync(), and
// fetch() / fetch_four(), copies into shared memory that are complete after arrive(). Nothing lives
// in a thread's registers beyond one body, so a team of host threads runs the very same code.
// No torch and no CUDA runtime here.
#pragma once

#include "triangle.h"

namespace ck {

static_assert(kParts <= kBlock);  // column sums and the factor share their room

// Where a group's data lie in shared memory; `matrices` panels, one forward, two backward.
struct GroupMemory {
  Triangle triangle;
  float* factor;    // (8, side): for a step of invert_factor(), and for column sums
  float* block;     // (8, 8)
  float* mean;      // (side)
  float* variance;  // (side)
  float* failed;    // the group's info
  Panel panels[2];

  CK_HOST_DEVICE GroupMemory(float* memory, const GroupShape& shape) {
    const int side = round_up(shape.dim, kBlock);
    triangle = {memory, side};
    factor = memory + Triangle::size(side);
    block = factor + kBlock * side;
    mean = block + kBlock * kBlock;
    variance = mean + side;
    failed = variance + side;
    for (int i = 0; i < 2; ++i) {
      const int stride = panel_stride(side);
      panels[i] = {failed + 4 + i * shape.panel_rows * stride, stride, shape.panel_rows};
    }
  }

  // floats of shared memory, without and for each row of one panel
  static CK_HOST_DEVICE constexpr int fixed_size(int side) {
    return Triangle::size(side) + (kBlock + 2) * side + kBlock * kBlock + 4;
  }
  static CK_HOST_DEVICE constexpr int panel_stride(int side) { return side + kPadding; }
};

// Rows of a panel when `matrices` panels share `bytes` of shared memory with the rest, as even as
// can be; 0 if nothing fits.
inline int choose_panel_rows(int rows, int dim, int matrices, int bytes) {
  const int side = round_up(dim, kBlock);
  const int left = bytes / 4 - GroupMemory::fixed_size(side);
  const int most = left / (matrices * GroupMemory::panel_stride(side)) / kRows * kRows;
  if (most <= 0) return 0;
  const int panels = (rows + most - 1) / most;
  return round_up((rows + panels - 1) / panels, kRows);
}

inline int shared_bytes(int dim, int matrices, int panel_rows) {
  const int side = round_up(dim, kBlock);
  return 4 *
         (GroupMemory::fixed_size(side) + matrices * panel_rows * GroupMemory::panel_stride(side));
}

// Adds eps I to the covariance in the triangle, makes its padding the identity, and keeps its
// diagonal.
template <class Team>
CK_DEVICE void finish_covariance(Team& team, const GroupMemory& memory, int dim, float eps) {
  team.for_each(memory.triangle.side, [&](int k) {
    float& entry = memory.triangle.row(k)[k];
    entry = k < dim ? entry + eps : 1.0f;
    memory.variance[k] = entry;
  });
}

// The triangle's transpose to a (dim, dim) matrix of global memory, zeros above its diagonal.
template <class Team>
CK_DEVICE void store_transposed(Team& team, Triangle triangle, const GroupShape& shape,
                                float* target) {
  const int blocks = triangle.side / kBlock;
  team.for_each(shape.dim * blocks, [&](int i) {
    const int row = i / blocks, column = kBlock * (i % blocks);
    const float* entries = triangle.row(column) + row;
    float values[kBlock];
    CK_UNROLL
    for (int e = 0; e < kBlock; ++e) {
      values[e] = column + e <= row ? entries[e * triangle.width(column)] : 0.0f;
    }
    store_columns(target + row * shape.dim, column, shape, values);
  });
}

// The reverse; the caller waits with arrive().
template <class Team>
CK_DEVICE void fetch_transposed(Team& team, const float* source, int dim, Triangle triangle) {
  const int blocks = triangle.side / kBlock;
  team.for_each(triangle.side * blocks, [&](int i) {
    const int row = i / blocks, column = kBlock * (i % blocks);
    if (column > row) return;
    float* entries = triangle.row(column) + row;
    CK_UNROLL
    for (int e = 0; e < kBlock; ++e) {
      float* target = entries + e * triangle.width(column);
      if (row < dim && column + e <= row) {
        team.fetch(target, source + row * dim + column + e);
      } else {
        *target = 0;
      }
    }
  });
}

// One group: Xc = X - mean, C = (1 - eps) Xc^T Xc / (n - 1) + eps I = L L^T, Z = Xc L^-T.
//
// x, z (n, D); inverse (D, D) = L^-1, lower; info: 0, or 1 if C is not positive definite to working
// precision, 2 if it is not finite, and then z and inverse are NaN. `memory` is shared memory.
template <class Team>
CK_DEVICE void whiten_group(Team& team, const GroupShape& shape, float eps, const float* x,
                            float* z, float* inverse, int* info, float* shared) {
  const GroupMemory memory(shared, shape);
  const Triangle triangle = memory.triangle;
  const Panel panel = memory.panels[0];
  const int side = triangle.side, rows = shape.rows, dim = shape.dim;
  const bool resident = panel.rows >= rows;  // one panel: fetched once, else three times
  const float scale = (1 - eps) / static_cast<float>(rows - 1);

  team.for_each(Triangle::size(side), [&](int i) { triangle.data[i] = 0; });
  team.for_each(1, [&](int) { *memory.failed = 0; });
  for (int first = 0; first < rows; first += panel.rows) {
    fetch_rows(team, x, first, shape, panel);
    team.arrive();
    add_column_sums(team, panel, first == 0, memory.factor);
    team.sync();
  }
  finish_means(team, memory.factor, rows, side, memory.mean);
  team.sync();
  for (int first = 0; first < rows; first += panel.rows) {
    if (!resident) {
      fetch_rows(team, x, first, shape, panel);
      team.arrive();
    }
    subtract_mean(team, panel, rows - first, memory.mean);
    team.sync();
    add_products(team, triangle, {panel, panel, scale, 0, -1});
    team.sync();
  }
  finish_covariance(team, memory, dim, eps);
  team.sync();
  invert_factor(team, triangle, memory.factor, memory.block, memory.variance, memory.failed);

  const float failed = *memory.failed;
  team.for_each(1, [&](int) { *info = static_cast<int>(failed); });
  if (failed != 0) {
    const float nan = __builtin_nanf("");
    team.for_each(rows * dim, [&](int i) { z[i] = nan; });
    team.for_each(dim * dim, [&](int i) { inverse[i] = nan; });
    return;
  }
  store_transposed(team, triangle, shape, inverse);
  for (int first = 0; first < rows; first += panel.rows) {
    if (!resident) {
      fetch_rows(team, x, first, shape, panel);
      team.arrive();
      subtract_mean(team, panel, rows - first, memory.mean);
      team.sync();
    }
    multiply_rows<Part::kUpper>(team, panel, triangle,
                                [&](int row, int column, const float (&values)[kBlock]) {
                                  if (first + row < rows)
                                    store_columns(z + (first + row) * dim, column, shape, values);
                                });
    team.sync();
  }
}

// Gradient of one group: M = G^T Z, S = the lower triangle of M mirrored, c = (1 - eps) / (n - 1),
// H = G - c Z S, dX = (H - column mean of H) L^-1.
//
// grad, z, dx (n, D); inverse (D, D) = L^-1, lower. The mean is taken of H, not of H L^-1, so that
// dX is stored once. With more than one panel dx holds H in between.
template <class Team>
CK_DEVICE void whiten_group_backward(Team& team, const GroupShape& shape, float eps,
                                     const float* grad, const float* z, const float* inverse,
                                     float* dx, float* shared) {
  const GroupMemory memory(shared, shape);
  const Triangle triangle = memory.triangle;
  const Panel whitened = memory.panels[0], gradient = memory.panels[1];
  const int side = triangle.side, rows = shape.rows, dim = shape.dim;
  const bool resident = gradient.rows >= rows;
  const float scale = -(1 - eps) / static_cast<float>(rows - 1);
  const auto fetch_both = [&](int first) {
    fetch_rows(team, z, first, shape, whitened);
    fetch_rows(team, grad, first, shape, gradient);
    team.arrive();
  };

  team.for_each(Triangle::size(side), [&](int i) { triangle.data[i] = 0; });
  for (int first = 0; first < rows; first += gradient.rows) {
    fetch_both(first);
    add_products(team, triangle, {whitened, gradient, 1.0f, 0, -1});  // M^T above the diagonal
    team.sync();
  }
  mirror_diagonal_blocks(team, triangle);
  team.sync();
  for (int first = 0; first < rows; first += gradient.rows) {
    if (!resident) fetch_both(first);
    multiply_rows<Part::kSymmetric>(team, whitened, triangle,
                                    [&](int row, int column, const float (&values)[kBlock]) {
                                      float* target = gradient.row(row) + column;
                                      CK_UNROLL
                                      for (int e = 0; e < kBlock; ++e)
                                        target[e] += scale * values[e];
                                    });
    team.sync();
    add_column_sums(team, gradient, first == 0, memory.factor);
    if (!resident) {
      const int count = min_of(gradient.rows, rows - first);
      team.for_each(count * dim,
                    [&](int i) { dx[first * dim + i] = gradient.row(i / dim)[i % dim]; });
    }
    team.sync();
  }
  finish_means(team, memory.factor, rows, side, memory.mean);
  fetch_transposed(team, inverse, dim, triangle);
  team.arrive();
  for (int first = 0; first < rows; first += gradient.rows) {
    if (!resident) {
      fetch_rows(team, dx, first, shape, gradient);
      team.arrive();
    }
    subtract_mean(team, gradient, rows - first, memory.mean);
    team.sync();
    multiply_rows<Part::kLower>(team, gradient, triangle,
                                [&](int row, int column, const float (&values)[kBlock]) {
                                  if (first + row < rows)
                                    store_columns(dx + (first + row) * dim, column, shape, values);
                                });
    team.sync();
  }
}

}  // namespace ck
