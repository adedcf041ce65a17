// The triangular matrices of whitening in shared memory, and what a team of threads does to them:
// sums of products into the triangle, its Cholesky factor's inverse, products of rows with it. The
// Team is described in whiten_group.h.
#pragma once

#include <cmath>

#include "panel.h"

namespace ck {

constexpr int kTile = 4;  // add_products(): 4 x 4 entries are one body's
constexpr float kEpsilon = 1.1920929e-7f;
constexpr float kNoise = 10 * kEpsilon;  // of a variance: less is rounding of the elimination

CK_DEVICE float inverse_sqrt(float x) {
#ifdef __CUDA_ARCH__
  const float y = rsqrtf(x);  // 2 ulp; the Newton step makes it 1, faster than sqrt and division
  return fmaf(0.5f * y, fmaf(-x * y, y, 1.0f), y);
#else
  return 1 / std::sqrt(x);
#endif
}

// The upper triangle of a square matrix in blocks of 8 x 8, those on the diagonal whole: row k has
// the columns from 8 (k / 8) on, so that rows are of a multiple of 32 bytes.
struct Triangle {
  float* data;
  int side;  // a multiple of 8

  static CK_HOST_DEVICE constexpr int size(int side) { return side * (side + kBlock) / 2; }

  // row(k)[j] is entry (k, j)
  CK_DEVICE float* row(int k) const {
    const int block = k / kBlock;
    return data + kBlock * block * side - kBlock * kBlock / 2 * block * (block - 1) +
           k % kBlock * width(k) - kBlock * block;
  }
  // entries of row k that are stored
  CK_DEVICE int width(int k) const { return side - k / kBlock * kBlock; }
};

struct Products {
  Panel left;
  Panel right;
  float factor;
  int first_block;  // only columns from this block on
  int skip_block;   // no rows of this block; -1: all
};

// T[k][j] += factor * sum_r left[r][k] right[r][j] on and above the diagonal.
template <class Team>
CK_DEVICE void add_products(Team& team, Triangle triangle, const Products& p) {
  // Tiles are numbered by block column, then row, then the block's two columns of tiles, so that
  // neighbouring threads share operands and the columns from one block on are a range.
  const int blocks = triangle.side / kBlock;
  const int begin = 2 * p.first_block * (p.first_block + 1);
  team.for_each(2 * blocks * (blocks + 1) - begin, [&](int i) {
    const int index = (begin + i) / 2;
    const int block = static_cast<int>((std::sqrt(4.0f * index + 1.0f) - 1.0f) * 0.5f);
    const int row = kTile * (index - block * (block + 1));
    const int column = kBlock * block + kTile * ((begin + i) % 2);
    if (row > column || row / kBlock == p.skip_block) return;
    float sum[kTile][kTile] = {};
    const float* left = p.left.data + row;
    const float* right = p.right.data + column;
#ifdef __CUDACC__
#pragma unroll 4
#endif
    for (int r = 0; r < p.left.rows; ++r) {
      const Four a = load_four(left), b = load_four(right);
      left += p.left.stride;
      right += p.right.stride;
      CK_UNROLL
      for (int y = 0; y < kTile; ++y) {
        CK_UNROLL
        for (int x = 0; x < kTile; ++x) sum[y][x] += a.v[y] * b.v[x];
      }
    }
    CK_UNROLL
    for (int y = 0; y < kTile; ++y) {
      float* target = triangle.row(row + y) + column;
      Four value = load_four(target);
      CK_UNROLL
      for (int x = 0; x < kTile; ++x) value.v[x] += p.factor * sum[y][x];
      store_four(target, value);
    }
  });
}

template <class Team>
CK_DEVICE void mirror_diagonal_blocks(Team& team, Triangle triangle) {
  team.for_each(triangle.side * kBlock, [&](int i) {
    const int row = i / kBlock, column = row / kBlock * kBlock + i % kBlock;
    if (column < row) triangle.row(row)[column] = triangle.row(column)[row];
  });
}

// The upper factor of an 8 x 8 block in registers, U^T U = block, with 1 / U_kk on its diagonal.
struct BlockFactor {
  float u[kBlock][kBlock];
  float info;  // as in invert_factor()

  CK_DEVICE BlockFactor(Triangle triangle, int first, const float* lowest) : info(0) {
    CK_UNROLL
    for (int k = 0; k < kBlock; ++k) {
      const float* row = triangle.row(first + k) + first;
      CK_UNROLL
      for (int half = 0; half < kBlock; half += 4) {
        const Four value = load_four(row + half);
        CK_UNROLL
        for (int e = 0; e < 4; ++e) u[k][half + e] = value.v[e];
      }
    }
    CK_UNROLL
    for (int k = 0; k < kBlock; ++k) {
      const float noise = lowest[first + k];
      if (!(noise - noise == 0)) {
        info = 2;
      } else if (!(u[k][k] > noise) && info == 0) {
        info = 1;
      }
      u[k][k] = inverse_sqrt(u[k][k]);
      CK_UNROLL
      for (int j = k + 1; j < kBlock; ++j) u[k][j] *= u[k][k];
      CK_UNROLL
      for (int i = k + 1; i < kBlock; ++i) {
        CK_UNROLL
        for (int j = i; j < kBlock; ++j) u[i][j] -= u[k][i] * u[k][j];
      }
    }
  }

  CK_DEVICE void solve_transposed(float (&v)[kBlock]) const {  // v <- U^-T v
    CK_UNROLL
    for (int k = 0; k < kBlock; ++k) {
      v[k] *= u[k][k];
      CK_UNROLL
      for (int j = k + 1; j < kBlock; ++j) v[j] -= u[k][j] * v[k];
    }
  }

  CK_DEVICE void solve(float (&v)[kBlock]) const {  // v <- U^-1 v
    CK_UNROLL
    for (int k = kBlock - 1; k >= 0; --k) {
      v[k] *= u[k][k];
      CK_UNROLL
      for (int i = 0; i < k; ++i) v[i] -= u[i][k] * v[k];
    }
  }
};

// In place, C = U^T U to V = U^-1; U itself is never stored.
//
// Step b eliminates the rows of block b: F = U_bb^-T C_b. right of the block, and V_b. = -U_bb^-1 F
// takes their place. Above the block F^T = V_.b U_bb^-1, final. Then whatever is right of the
// block, be it C below or V above row b, loses F^T F: one update serves factor and inverse.
//
// factor (8, side) and block (8, 8) are room for a step. *failed becomes 1 if a pivot is not above
// `lowest` (side), and 2 if an entry of that is not finite.
template <class Team>
CK_DEVICE void invert_factor(Team& team, Triangle triangle, float* factor, float* block,
                             const float* lowest, float* failed) {
  const int side = triangle.side;
  const Panel eliminated{factor, side, kBlock};
  for (int first = 0; first < side; first += kBlock) {
    // Every thread factors the block for itself: shorter than waiting for one that does.
    team.for_each(side, [&](int line) {
      const BlockFactor diagonal(triangle, first, lowest);
      if (line == 0 && diagonal.info > *failed) *failed = diagonal.info;
      const bool above = line < first, right = line >= first + kBlock;
      float v[kBlock];
      CK_UNROLL
      for (int k = 0; k < kBlock; ++k) {
        v[k] = above   ? triangle.row(line)[first + k]
               : right ? triangle.row(first + k)[line]
                       : static_cast<float>(k == line - first);
      }
      if (above || right) {
        diagonal.solve_transposed(v);
        CK_UNROLL
        for (int k = 0; k < kBlock; ++k) eliminated.row(k)[line] = v[k];
      }
      if (!above) diagonal.solve(v);
      CK_UNROLL
      for (int k = 0; k < kBlock; ++k) {
        if (above) {
          triangle.row(line)[first + k] = v[k];
        } else if (right) {
          triangle.row(first + k)[line] = -v[k];
        } else {
          block[k * kBlock + line - first] = v[k];  // others still read the block itself
        }
      }
    });
    team.sync();
    team.for_each(kBlock * kBlock,
                  [&](int i) { triangle.row(first + i / kBlock)[first + i % kBlock] = block[i]; });
    const int current = first / kBlock;
    add_products(team, triangle, {eliminated, eliminated, -1.0f, current + 1, current});
    team.sync();
  }
}

enum class Part { kUpper, kSymmetric, kLower };

// store(r, 8 j, values) with the 8 columns of block j of row r of panel * B, where B is the
// triangle V itself, or V mirrored, or V^T.
template <Part part, class Team, class Store>
CK_DEVICE void multiply_rows(Team& team, Panel panel, Triangle triangle, Store store) {
  const int blocks = triangle.side / kBlock;
  const int pairs = (blocks + 1) / 2, half = (pairs + 1) / 2;
  const int groups = panel.rows / kRows;
  team.for_each(2 * pairs * groups, [&](int i) {
    // short columns meet long ones in later bodies of a thread
    const int order = i / 2 / groups;
    const int pair = order < half ? order : pairs - 1 - (order - half);
    const int column = 2 * pair + i % 2;
    if (column >= blocks) return;
    const int row = i / 2 % groups;  // and row + groups: neighbours in different banks
    float sum[kRows][kBlock] = {};
    const auto load_rows = [&](int k, Four(&a)[kRows]) {
      CK_UNROLL
      for (int r = 0; r < kRows; ++r) a[r] = load_four(panel.row(row + r * groups) + k);
    };
    if (part != Part::kLower) {  // down the columns of V
      for (int k = 0; k < kBlock * (column + 1); k += 4) {
        Four a[kRows];
        load_rows(k, a);
        const float* entries = triangle.row(k) + kBlock * column;
        CK_UNROLL
        for (int e = 0; e < 4; ++e) {
          const Four b[2] = {load_four(entries), load_four(entries + 4)};
          entries += triangle.width(k);
          CK_UNROLL
          for (int r = 0; r < kRows; ++r) {
            CK_UNROLL
            for (int c = 0; c < kBlock; ++c) sum[r][c] += a[r].v[e] * b[c / 4].v[c % 4];
          }
        }
      }
    }
    if (part != Part::kUpper) {  // along the rows of V
      const float* entries = triangle.row(kBlock * column);
      const int width = triangle.width(kBlock * column);
      const int begin = part == Part::kLower ? column : column + 1;
      for (int k = kBlock * begin; k < triangle.side; k += 4) {
        Four a[kRows];
        load_rows(k, a);
        CK_UNROLL
        for (int c = 0; c < kBlock; ++c) {
          const Four b = load_four(entries + c * width + k);
          CK_UNROLL
          for (int r = 0; r < kRows; ++r) {
            CK_UNROLL
            for (int e = 0; e < 4; ++e) sum[r][c] += a[r].v[e] * b.v[e];
          }
        }
      }
    }
    CK_UNROLL
    for (int r = 0; r < kRows; ++r) store(row + r * groups, kBlock * column, sum[r]);
  });
}

}  // namespace ck
