// Cholesky whitening of one group by a team of threads, forward and backward; the formulas are in
// whiten_group() and whiten_group_backward().
//
// A Team brings for_each(count, body), whose bodies may run in any order and at once, sync(), and
// fetch() / fetch_four(), copies into shared memory that are complete after arrive(). Nothing lives
// in a thread's registers beyond one body, so a team of host threads runs the very same code.
// No torch and no CUDA runtime here: whiten.cu includes it for the device, a test for the CPU.
#pragma once

#include "triangle.h"

namespace ck {

static_assert(kParts <= kBlock);    // column sums and the factor share their room
constexpr float kTolerance = 0.1f;  // of a variance of the result
constexpr float kLargest = 3.4028235e38f;

// Where a group's data lie in shared memory; `matrices` panels, one forward, two backward.
struct GroupMemory {
  Triangle triangle;
  float* factor;    // (8, side): for a step of invert_factor(), and for column sums
  float* block;     // (8, 8)
  float* mean;      // (side)
  float* lowest;    // (side), of a pivot
  float* failed;    // the group's info
  float* doubtful;  // whether the variances of the result must be looked at
  Panel panels[2];

  CK_HOST_DEVICE GroupMemory(float* memory, const GroupShape& shape) {
    const int side = round_up(shape.dim, kBlock);
    triangle = {memory, side};
    factor = memory + Triangle::size(side);
    block = factor + kBlock * side;
    mean = block + kBlock * kBlock;
    lowest = mean + side;
    failed = lowest + side;
    doubtful = failed + 1;
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
  return round_up(divide_up(rows, divide_up(rows, most)), kRows);
}

inline int shared_bytes(int dim, int matrices, int panel_rows) {
  const int side = round_up(dim, kBlock);
  return 4 *
         (GroupMemory::fixed_size(side) + matrices * panel_rows * GroupMemory::panel_stride(side));
}

// Adds eps I to the covariance in the triangle, makes its padding the identity, and finds what is
// rounding alone in a pivot: of the elimination, or of the mean, whose longest chain of additions
// is known. It is finite where the variance is.
template <class Team>
CK_DEVICE void finish_covariance(Team& team, const GroupMemory& memory, const GroupShape& shape,
                                 float eps) {
  const int additions =
      divide_up(shape.panel_rows, kParts) + divide_up(shape.rows, shape.panel_rows);
  const float mean_noise = kNoise + kEpsilon / 2 * static_cast<float>(additions);
  team.for_each(memory.triangle.side, [&](int k) {
    float& entry = memory.triangle.row(k)[k];
    entry = k < shape.dim ? entry + eps : 1.0f;
    const float noise = mean_noise * memory.mean[k], square = noise * noise;
    const float of_mean = square < kLargest ? square : kLargest;
    const float of_variance = kNoise * entry;
    memory.lowest[k] = of_mean > of_variance ? of_mean : of_variance;  // NaN stays
  });
}

// The triangle's transpose, L^-1, to a (dim, dim) matrix of global memory, zeros above its
// diagonal. *doubtful becomes 1 where rounding can have spoilt a variance of Z: its noise is
// sum_j L^-1_kj^2 lowest_j, were each product rounded once; sums of `rows` and `side` products have
// more of it. Looking at eight of the terms at once costs next to nothing here.
template <class Team>
CK_DEVICE void store_inverse(Team& team, const GroupMemory& memory, const GroupShape& shape,
                             float* inverse) {
  const Triangle triangle = memory.triangle;
  const int blocks = triangle.side / kBlock;
  const float sums = static_cast<float>(blocks * (shape.rows + triangle.side));
  const float most = kTolerance * kNoise / (kEpsilon * sums);
  team.for_each(shape.dim * blocks, [&](int i) {
    const int row = i / blocks, column = kBlock * (i % blocks);
    const float* entries = triangle.row(column) + row;
    float values[kBlock], noise = 0;
    CK_UNROLL
    for (int e = 0; e < kBlock; ++e) {
      values[e] = column + e <= row ? entries[e * triangle.width(column)] : 0.0f;
      noise += values[e] * values[e] * memory.lowest[column + e];
    }
    if (!(noise < most)) *memory.doubtful = 1;  // whoever writes writes the same
    store_columns(inverse + row * shape.dim, column, shape, values);
  });
}

// *failed becomes 1 unless the diagonal of L^-1 C L^-T, C of Z's own rows, is 1: a pivot that was
// rounding alone shows here. z (n, D) is read back from global memory.
template <class Team>
CK_DEVICE void check_variances(Team& team, const GroupMemory& memory, const GroupShape& shape,
                               float eps, const float* z) {
  const int side = memory.triangle.side;
  team.for_each(kParts * side, [&](int i) {
    const int column = i % side;
    float sum = 0;
    for (int row = i / side; column < shape.dim && row < shape.rows; row += kParts) {
      const float value = z[row * shape.dim + column];
      sum += value * value;
    }
    memory.factor[i] = sum;
  });
  team.sync();
  team.for_each(shape.dim, [&](int k) {
    float squares = 0;
    CK_UNROLL
    for (int part = 0; part < kParts; ++part) squares += memory.factor[part * side + k];
    float shrinkage = 0;
    for (int j = 0; j <= k; ++j) {
      const float entry = memory.triangle.row(j)[k];
      shrinkage += entry * entry;
    }
    const float scale = (1 - eps) / static_cast<float>(shape.rows - 1);
    const float variance = scale * squares + eps * shrinkage;
    if (!(std::fabs(variance - 1) < kTolerance)) *memory.failed = 1;
  });
  team.sync();
}

// The reverse of store_inverse(); the caller waits with arrive().
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

// Rows first, first + 1, ... of `out` (n, D): those of the panel times the triangle's part.
template <Part part, class Team>
CK_DEVICE void store_product(Team& team, Panel panel, Triangle triangle, int first,
                             const GroupShape& shape, float* out) {
  multiply_rows<part>(team, panel, triangle,
                      [&](int row, int column, const float (&values)[kBlock]) {
                        if (first + row < shape.rows)
                          store_columns(out + (first + row) * shape.dim, column, shape, values);
                      });
}

// One group: Xc = X - mean, C = (1 - eps) Xc^T Xc / (n - 1) + eps I = L L^T, Z = Xc L^-T.
//
// x, z (n, D); inverse (D, D) = L^-1, lower; info: 0, or 1 if C is not positive definite to working
// precision, 2 if it is not finite, and then z and inverse are NaN. `shared` is shared memory.
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
  team.for_each(1, [&](int) { *memory.failed = *memory.doubtful = 0; });
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
  finish_covariance(team, memory, shape, eps);
  team.sync();
  invert_factor(team, triangle, memory.factor, memory.block, memory.lowest, memory.failed);
  if (*memory.failed == 0) {
    store_inverse(team, memory, shape, inverse);
    for (int first = 0; first < rows; first += panel.rows) {
      if (!resident) {
        fetch_rows(team, x, first, shape, panel);
        team.arrive();
        subtract_mean(team, panel, rows - first, memory.mean);
        team.sync();
      }
      store_product<Part::kUpper>(team, panel, triangle, first, shape, z);
      team.sync();
    }
    if (*memory.doubtful != 0) check_variances(team, memory, shape, eps, z);
  }

  const float failed = *memory.failed;
  team.for_each(1, [&](int) { *info = static_cast<int>(failed); });
  if (failed != 0) {
    const float nan = __builtin_nanf("");
    team.for_each(rows * dim, [&](int i) { z[i] = nan; });
    team.for_each(dim * dim, [&](int i) { inverse[i] = nan; });
  }
}

// Gradient of one group: M = G^T Z, S = the lower triangle of M mirrored, c = (1 - eps) / (n - 1),
// H = G - c Z S, dX = (H - column mean of H) L^-1.
//
// grad, z, dx (n, D); inverse (D, D) = L^-1, lower, and where it is NaN the group failed and dX is
// 0. The mean is taken of H, not of H L^-1, so that dX is stored once. With more than one panel dx
// holds H in between.
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
  if (triangle.data[0] != triangle.data[0]) {
    team.for_each(rows * dim, [&](int i) { dx[i] = 0; });
    return;
  }
  for (int first = 0; first < rows; first += gradient.rows) {
    if (!resident) {
      fetch_rows(team, dx, first, shape, gradient);
      team.arrive();
    }
    subtract_mean(team, gradient, rows - first, memory.mean);
    team.sync();
    store_product<Part::kLower>(team, gradient, triangle, first, shape, dx);
    team.sync();
  }
}

}  // namespace ck
