// Cholesky whitening of one group by a team of threads, forward and backward; the formulas are in
// whiten_group() and whiten_group_backward().
//
// A Team brings for_each(count, body), whose bodies may run in any order and at once, sync(), and
// fetch() / fetch_four(), copies into shared memory that are complete after arrive(). Nothing lives
// in a thread's registers beyond one body, so a host team of one thread runs the very same code. No
// torch and no CUDA runtime here.
#pragma once

#include "triangle.h"

namespace ck {

constexpr int kParts = kBlock;  // parts in which a column is summed; they share the factor's buffer

struct GroupShape {
  int rows;
  int dim;         // at most kMaxDim
  int panel_rows;  // rows of a group held in shared memory at once; even
  bool aligned;    // dim is a multiple of 4 and all pointers are of 16 bytes
};

// Where a group's data lie in shared memory; `matrices` panels, one forward, two backward.
struct GroupMemory {
  Triangle triangle;
  float* factor;    // (8, side): the rows of U that a step of invert_factor() eliminates with
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
  static CK_HOST_DEVICE constexpr int panel_stride(int side) {
    return side + 4;  // rows start in different banks
  }
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

// Rows first, first + 1, ... of `source` (rows, dim), and zeros beyond its rows and columns; the
// caller waits with arrive().
template <class Team>
CK_DEVICE void fetch_rows(Team& team, const float* source, int first, const GroupShape& shape,
                          Panel panel) {
  const int quads = (panel.stride - 4) / 4;
  team.for_each(panel.rows * quads, [&](int i) {
    const int row = i / quads, column = 4 * (i % quads);
    const bool exists = first + row < shape.rows;
    float* target = panel.row(row) + column;
    const float* from = source + (first + row) * shape.dim + column;
    if (exists && shape.aligned && column < shape.dim) {
      team.fetch_four(target, from);
      return;
    }
    CK_UNROLL
    for (int e = 0; e < 4; ++e) {
      if (exists && column + e < shape.dim) {
        team.fetch(target + e, from + e);
      } else {
        target[e] = 0;
      }
    }
  });
}

// sums (kParts, columns) += the sums of the panel's columns, or = for the first panel
template <class Team>
CK_DEVICE void add_column_sums(Team& team, Panel panel, bool is_first, float* sums) {
  const int columns = panel.stride - 4;
  team.for_each(kParts * columns, [&](int i) {
    float sum = 0;
    for (int row = i / columns; row < panel.rows; row += kParts) {
      sum += panel.row(row)[i % columns];
    }
    sums[i] = is_first ? sum : sums[i] + sum;
  });
}

template <class Team>
CK_DEVICE void finish_means(Team& team, const float* sums, int rows, int columns, float* mean) {
  team.for_each(columns, [&](int column) {
    float sum = 0;
    CK_UNROLL
    for (int part = 0; part < kParts; ++part) sum += sums[part * columns + column];
    mean[column] = sum / static_cast<float>(rows);
  });
}

// Subtracts the mean from rows 0 ... rows - 1 of the panel; the others stay zero.
template <class Team>
CK_DEVICE void subtract_mean(Team& team, Panel panel, int rows, const float* mean) {
  const int quads = (panel.stride - 4) / 4;
  const int count = rows < panel.rows ? rows : panel.rows;
  team.for_each(count * quads, [&](int i) {
    const int column = 4 * (i % quads);
    float* target = panel.row(i / quads) + column;
    Four value = load_four(target);
    const Four less = load_four(mean + column);
    CK_UNROLL
    for (int e = 0; e < 4; ++e) value.v[e] -= less.v[e];
    store_four(target, value);
  });
}

// 8 columns of one row, from `column` on, to a (rows, dim) matrix of global memory
CK_DEVICE void store_columns(float* row, int column, const GroupShape& shape,
                             const float (&values)[kBlock]) {
  CK_UNROLL
  for (int begin = 0; begin < kBlock; begin += 4) {
    if (shape.aligned) {
      if (column + begin < shape.dim) {
        store_four(row + column + begin,
                   {values[begin], values[begin + 1], values[begin + 2], values[begin + 3]});
      }
      continue;
    }
    CK_UNROLL
    for (int e = begin; e < begin + 4; ++e) {
      if (column + e < shape.dim) row[column + e] = values[e];
    }
  }
}

// C = scale * P + eps I of the products P in the triangle, the identity in the padding, and its
// diagonal to variance.
template <class Team>
CK_DEVICE void finish_covariance(Team& team, const GroupMemory& memory, int dim, float scale,
                                 float eps) {
  const int side = memory.triangle.side;
  team.for_each(side * side, [&](int i) {
    const int row = i / side, column = i % side;
    if (column < row / kBlock * kBlock) return;
    float& entry = memory.triangle.row(row)[column];
    entry *= scale;
    if (row != column) return;
    entry = row < dim ? entry + eps : 1.0f;
    memory.variance[row] = entry;
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
    add_products(team, triangle, {panel, panel, 1.0f, 0, -1});
    team.sync();
  }
  finish_covariance(team, memory, dim, (1 - eps) / static_cast<float>(rows - 1), eps);
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
  team.for_each(dim * dim, [&](int i) {
    const int row = i / dim, column = i % dim;
    inverse[i] = column <= row ? triangle.row(column)[row] : 0.0f;
  });
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
  team.for_each(side * side, [&](int i) {
    const int row = i / side, column = i % side;  // of L^-1; the triangle holds its transpose
    if (column > row / kBlock * kBlock + kBlock - 1) return;
    float* target = triangle.row(column) + row;
    if (row < dim && column <= row) {
      team.fetch(target, inverse + row * dim + column);
    } else {
      *target = 0;
    }
  });
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
