// The rows of a group that lie in shared memory: how they come there, their mean, and back to
// global memory. The Team is described in whiten_group.h.
#pragma once

#ifdef __CUDACC__
#define CK_HOST_DEVICE __host__ __device__ __forceinline__
#define CK_DEVICE __device__ __forceinline__
#define CK_UNROLL _Pragma("unroll")
#else
#define CK_HOST_DEVICE inline
#define CK_DEVICE inline
#define CK_UNROLL
#endif

namespace ck {

constexpr int kMaxDim = 256;
constexpr int kBlock = 8;    // columns that are stored at once, side of a triangle's blocks
constexpr int kRows = 2;     // multiply_rows(): 2 x 8 entries are one body's
constexpr int kParts = 8;    // column sums are made in parts
constexpr int kPadding = 4;  // of the rows in shared memory, so that they start in different banks

CK_HOST_DEVICE constexpr int divide_up(int value, int by) { return (value + by - 1) / by; }

CK_HOST_DEVICE constexpr int round_up(int value, int multiple) {
  return divide_up(value, multiple) * multiple;
}

CK_HOST_DEVICE constexpr int min_of(int a, int b) { return a < b ? a : b; }

struct alignas(16) Four {
  float v[4];
};

CK_DEVICE Four load_four(const float* p) { return *reinterpret_cast<const Four*>(p); }
CK_DEVICE void store_four(float* p, Four value) { *reinterpret_cast<Four*>(p) = value; }

struct GroupShape {
  int rows;
  int dim;         // at most kMaxDim
  int panel_rows;  // rows of a group held in shared memory at once; even
  bool aligned;    // dim is a multiple of 4 and all pointers are of 16 bytes
};

struct Panel {
  float* data;
  int stride;
  int rows;

  CK_DEVICE float* row(int r) const { return data + r * stride; }
  CK_DEVICE int columns() const { return stride - kPadding; }
};

// Rows first, first + 1, ... of `source` (rows, dim), and zeros beyond its rows and columns; the
// caller waits with arrive().
template <class Team>
CK_DEVICE void fetch_rows(Team& team, const float* source, int first, const GroupShape& shape,
                          Panel panel) {
  const int quads = panel.columns() / 4;
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
  const int columns = panel.columns();
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
  const int quads = panel.columns() / 4;
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

}  // namespace ck
